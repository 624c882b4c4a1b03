"""What XLA's CPU client needs of the host: freed memory kept between steps, threads enough for many fake devices, no
fusions that compute wrongly."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys

# glibc's mallopt parameters, <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8

THREADS = "PJRT_NPROC"  # read by XLA's CPU client when it starts
COLLECTIVES_AT_ONCE = 8  # per device; the steps here wait in at most two or three

FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"  # which kinds of operations YNNPACK is given to fuse; empty: none


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory instead of returning it to the kernel; True if it agreed.

    XLA's CPU client allocates a step's temporaries anew in every step. Large blocks are mapped and unmapped each time,
    and every page is faulted in again: 96,000 faults and a fifth of the CPU time in a step (measured on a ViT of width
    128 with six tasks and 16 images of 64x96). Call it before much is allocated. The process then holds its peak until
    it ends. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}
    agreed = [mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(agreed)


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


def sound_fusions() -> None:
    """Keeps jaxlib 0.12 from YNNPACK's fusions on CPUs, unless XLA_FLAGS chooses them.

    In bfloat16 they compute two residual blocks of LayerNorm, 3x3 convolution and ReLU as 1e37 and NaN, from about
    5 x 28 x 28 positions on (seen in 0.12.0.1 on a CPU without AVX-512; fewer positions and float32 are right).
    Without them the numbers are right. Other versions do not know the flag, and XLA ends the process at one that it
    does not know: so may libtpu, which has a list of its own. Call it before any array is made;
    `sgw_jax.run.bfloat16.check_bfloat16` finds what is wrong in whatever version.
    """
    version = importlib.metadata.version("jaxlib").split(".")
    given = os.environ.get("XLA_FLAGS", "")
    if version[:2] == ["0", "12"] and FUSIONS not in given and importlib.util.find_spec("libtpu") is None:
        os.environ["XLA_FLAGS"] = f"{given} {FUSIONS}=".lstrip()
