"""Ctrl-C and SIGTERM as a request to save and stop."""

import signal
import threading
from types import FrameType
from typing import Any

import jax


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; a second Ctrl-C stops at once.

    Several processes must stop at the same step. They agree on it through the cluster's preemption notice, which
    SIGTERM to any one of them sets off (`Checkpoints.reached_preemption`); Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None  # what stops the run
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
            if jax.process_count() > 1:
                handlers = {signal.SIGINT: _terminate}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def request(self, number: signal.Signals) -> None:
        """Asks for a stop after the current step."""
        self.number = self.number or number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
