"""Gives XLA's CPU client threads enough for the collective operations of many devices on one host."""

import os
import re

THREADS = "PJRT_NPROC"  # read by XLA's CPU client when it starts
COLLECTIVES_AT_ONCE = 8  # per device; the steps here wait in at most two or three


def enough_threads() -> None:
    """Asks for `COLLECTIVES_AT_ONCE` threads per fake device, if XLA_FLAGS asks for several and nobody chose otherwise.

    XLA runs the programs of all devices of a host on one pool of max(cores, devices) threads, and a collective
    operation holds its thread until every device has joined it. Independent ones of one device run at once, each on a
    thread of its own: so a few devices that wait in two of them can take the whole pool, the others never come, and
    after 40 seconds XLA aborts the process. Seen with the task gradients on a data x fsdp mesh of 8 devices and 2
    cores, in one run of 40 steps in two; with more threads never. Threads that wait cost nothing. Call it before any
    array is made.
    """
    devices = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices and int(devices[-1]) > 1:
        os.environ.setdefault(THREADS, str(COLLECTIVES_AT_ONCE * int(devices[-1])))
