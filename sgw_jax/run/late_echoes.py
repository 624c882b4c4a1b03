"""What threads of a checkpoint's reads and writes say after the first that failed: nothing new, and a trace each."""

import sys
from typing import Any

# What TensorStore's threads meet where the main thread has given up waiting for them.
CALLED_LATE = ("Event loop is closed", "cannot schedule new futures after shutdown")


def silence_echoes() -> None:
    """Leaves unsaid that other reads and writes end too late: Orbax closes its event loop over the first that fails,
    and for every one that was still under way a trace would be printed."""
    told = sys.unraisablehook
    if getattr(told, "__name__", "") == "without_echoes":
        return

    def without_echoes(found: Any) -> None:
        if not isinstance(found.exc_value, RuntimeError) or str(found.exc_value) not in CALLED_LATE:
            told(found)

    sys.unraisablehook = without_echoes
