"""One command as several JAX processes on this machine's CPU: the way a cluster runs it, without one.

    sgw-jax launch local --processes=2 --devices-per-process=4 -- train --config=scenes --workdir=runs/scenes

Every process has its own fake devices; together they form one mesh of processes x devices. The output is that of
process 0; of the others it is shown where one of them fails. Ctrl-C or SIGTERM lets all of them save and stop
together. If one process dies the rest is ended, because no collective operation can complete without it.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import sgw_jax
from sgw_jax.launch import command_line
from sgw_jax.launch.command_line import whole

IMPORTED_FROM = Path(sgw_jax.__file__).resolve().parents[1]
SECONDS_AFTER_DEATH = 5.0  # for the others to say what they have to say
SECONDS_TO_SAVE = 300.0  # between being asked to stop and being killed
TAIL = 8_000  # characters shown of the output of a process that failed


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits; returns 0, or the exit code of the process that failed first."""
    parser = command_line.parser("local", __doc__)
    parser.add_argument("--processes", type=whole(1), default=2, help="default: %(default)s")
    parser.add_argument("--devices-per-process", type=whole(1), default=4, help="fake; default: %(default)s")
    arguments, command = command_line.parse(parser, argv)

    address = f"127.0.0.1:{_free_port()}"
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(arguments.processes)]
        received = stack.enter_context(_signals())
        processes: list[subprocess.Popen] = []
        stack.callback(_kill, processes)
        for index in range(arguments.processes):
            environment = _environment(address, arguments.processes, index, arguments.devices_per_process)
            processes.append(_start(command, environment, None if index == 0 else logs[index]))
        code = _wait(processes, received)
        if code and not received:
            _show(processes, logs)
        return 128 + received[0] if received and code else code


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _environment(address: str, processes: int, index: int, devices: int) -> dict[str, str]:
    """What sgw_jax/__main__.py and XLA read; other flags of XLA_FLAGS stay."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    paths = (str(IMPORTED_FROM), os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        "SGW_COORDINATOR": address,
        "SGW_PROCESSES": str(processes),
        "SGW_PROCESS": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _start(command: Sequence[str], environment: dict[str, str], log: IO[str] | None) -> subprocess.Popen:
    """In a session of its own, so that a terminal's Ctrl-C reaches this launcher alone, which then asks all to stop."""
    launcher = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", "sgw_jax", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=(lambda: _die_with(launcher)) if sys.platform == "linux" else None,
    )


def _die_with(launcher: int) -> None:
    """Processes that outlive a killed launcher would go on writing into the working directory of its successor."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before it could be watched
        os._exit(1)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the SIGINTs, SIGTERMs and SIGHUPs received, as they come; what was ignored (nohup) stays so."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen], received: Sequence[int]) -> int:
    """Returns once all have ended, of themselves or because one failed; the first failure's exit code, or 0."""
    code, deadline, told = 0, float("inf"), False
    while None in [process.poll() for process in processes]:  # a list: every one of them is polled
        failed = [_exit_code(process) for process in processes if process.returncode]
        if failed and not code:
            code, deadline = failed[0], min(deadline, time.monotonic() + SECONDS_AFTER_DEATH)
        if received and not told:
            told, deadline = True, min(deadline, time.monotonic() + SECONDS_TO_SAVE)
            for process in processes:  # SIGHUP says, too, that the terminal is not to be written to
                process.send_signal(signal.SIGHUP if received[0] == signal.SIGHUP else signal.SIGTERM)
            with contextlib.suppress(OSError):
                print("local: all save after this step; again to stop at once", file=sys.stderr, flush=True)
        if len(received) > 1 or time.monotonic() > deadline:
            _kill(processes)
        time.sleep(0.05)
    return code or next((_exit_code(process) for process in processes if process.returncode), 0)


def _exit_code(process: subprocess.Popen) -> int:
    """As a shell would give it: 128 + the signal's number for a process that was killed."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _show(processes: Sequence[subprocess.Popen], logs: Sequence[IO[str]]) -> None:
    """How each process ended, and the end of what those other than process 0 wrote."""
    for index, (process, log) in enumerate(zip(processes, logs, strict=True)):
        code = process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"local: process {index} {how}", file=sys.stderr)
        log.seek(0)
        if index and (text := log.read().rstrip()):
            print("\n".join(f"  [{index}] {line}" for line in text[-TAIL:].splitlines()), file=sys.stderr)
