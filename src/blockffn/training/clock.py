"""Time that counts as training, and signals that ask a run to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Clock:
    """Seconds of training, without pauses, and the rate of tokens since the last reading."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._last: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def rate(self, tokens: int) -> float:
        now = self.seconds
        then, before = self._last or (0.0, 0)
        self._last = (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second one interrupts as usual."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread: signals are the caller's business
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
