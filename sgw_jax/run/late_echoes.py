"""What threads of a checkpoint's reads and writes say after the first that failed: nothing new, and a trace each."""

import sys
from typing import Any

# What TensorStore's threads meet where the main thread has given up waiting for them.
CALLED_LATE = ("Event loop is closed", "cannot schedule new futures after shutdown")


def is_echo(error: BaseException | None) -> bool:
    """Whether only the end of another read or write is said: its loop was closed, or its coroutine dropped unfinished
    (GeneratorExit), which Orbax words as an error of its own."""
    if isinstance(error, RuntimeError):
        return str(error) in CALLED_LATE
    return error is not None and isinstance(error.__cause__, GeneratorExit)


def silence_echoes() -> None:
    """Leaves unsaid that other reads and writes end too late: Orbax closes its event loop over the first that fails,
    and for every one that was still under way a trace would be printed."""
    told = sys.unraisablehook
    if getattr(told, "__name__", "") == "without_echoes":
        return

    def without_echoes(found: Any) -> None:
        if not is_echo(found.exc_value):
            told(found)

    sys.unraisablehook = without_echoes
