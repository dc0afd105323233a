"""Signals that ask a run to stop: it finishes its step and saves; a second one ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fluxfast.util.platform import SIGNALS


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved everything up to its step `step` of `steps`."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"stopped after step {step} of {steps}, which is saved")
        self.step, self.steps = step, steps


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """The first of SIGNALS sets the event. A second one raises KeyboardInterrupt wherever the
    process is: files in the making are left out whole, so that does no harm.

    A signal that the process was started to ignore stays ignored. Outside the main thread, which
    alone gets signals, nothing is done.
    """
    stop = threading.Event()

    def ask(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with handled(ask):
        yield stop


@contextmanager
def handled(handler) -> Iterator[None]:
    """handler(number, frame) gets the SIGNALS inside."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {
            number: was for number, was in before.items() if was not in (signal.SIG_IGN, None)
        }
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def interrupt(number, frame) -> None:
    """A handler: every signal is taken as Ctrl-C usually is."""
    raise KeyboardInterrupt
