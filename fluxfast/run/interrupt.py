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
        self.step = step


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """The first of SIGNALS sets the event. A second one raises KeyboardInterrupt wherever the
    process is, which does no harm: files are written whole or not at all.
    """
    stop = threading.Event()

    def request_stop(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with handle_signals(request_stop):
        yield stop


@contextmanager
def handle_signals(handler=signal.default_int_handler) -> Iterator[None]:
    """Inside, SIGNALS call `handler(number, frame)`; by default they raise KeyboardInterrupt.

    A signal that the process was started to ignore stays ignored. Outside the main thread, which
    alone receives signals, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            old = signal.getsignal(number)
            if old not in (signal.SIG_IGN, None):
                previous[number] = old
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
