"""Ctrl-C, SIGTERM and a lost terminal (SIGHUP) as a request to save and stop."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 2.0  # seconds, in which Python must come to a second Ctrl-C


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to save and stop; a second Ctrl-C stops at once.

    Python calls a signal's handler between two of its own instructions, which a compilation or a long step puts off by
    many seconds. So a thread of its own answers on standard error the moment that a signal comes, lest one presses
    again and loses the save; and it ends the process where a second Ctrl-C finds Python still not listening. A signal
    that was ignored when the run began (`nohup`) stays so.

    Several processes must stop at the same step. They agree on it through the cluster's preemption notice, which
    SIGTERM to any one of them sets off (`Checkpoints.reached_preemption`); the other signals are passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None  # what stops the run
        self._previous: dict[int, Any] = {}
        self._interrupted = False  # Python has come to the second Ctrl-C

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = dict.fromkeys(STOPPING, self._on_signal)
            if jax.process_count() > 1:
                handlers = {signal.SIGINT: self._pass_on, signal.SIGHUP: self._pass_on}
            wanted = {n: handler for n, handler in handlers.items() if signal.getsignal(n) != signal.SIG_IGN}
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            self._listen(set(wanted))
            self._previous = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        return self

    def request(self, number: signal.Signals) -> None:
        """Asks for a stop after the current step."""
        self.number = self.number or number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.number and number == signal.SIGINT:
            self._interrupted = True
            raise KeyboardInterrupt
        self.request(signal.Signals(number))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        signal.raise_signal(signal.SIGTERM)

    def _leave_terminal(self) -> None:
        """Writing to a terminal that is gone is an error, which would keep the run from its save."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _listen(self, numbers: set[int]) -> None:
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._earlier = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)  # written to by C, at once
        self._thread = threading.Thread(target=self._answer, args=(numbers,), daemon=True)
        self._thread.start()

    def _answer(self, numbers: set[int]) -> None:
        """What the thread does: a byte a signal, until the pipe is closed."""
        seen = 0
        while received := os.read(self._reads, 1):
            number = received[0]
            if number not in numbers:
                continue
            seen += 1
            if seen == 1 and number != signal.SIGHUP:
                again = "; again to stop at once" if number == signal.SIGINT and jax.process_count() == 1 else ""
                _say(f"{signal.Signals(number).name}: saving after this step{again}.")
            elif number == signal.SIGINT and jax.process_count() == 1:
                deadline = time.monotonic() + PATIENCE
                while not self._interrupted and time.monotonic() < deadline:
                    time.sleep(0.05)
                if not self._interrupted:
                    _say("Stopped at once. The same command goes on from the last checkpoint, if there is one.")
                    os._exit(128 + signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        if self._previous or hasattr(self, "_thread"):
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._earlier)
            os.close(self._writes)
            self._thread.join()
            os.close(self._reads)


def _say(text: str) -> None:
    """A line on standard error, without the locks that the interrupted code may hold."""
    start = b"\n" if os.isatty(2) else b""  # the line of the progress bar stays
    os.write(2, start + text.encode() + b"\n")
