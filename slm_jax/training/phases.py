"""What a process is busy with, by name, and the seconds of it: for the time to the first step."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What no phase claims.
BETWEEN = "other"


class Phases:
    """A clock of named phases, which may stand inside each other; a second counts for the innermost alone.

    Args:
      age: seconds that had passed before, which the phase `process start and imports` gets.

    Attributes:
      step: the training step that it is about; None before the first one.
      moves: how often something went on; may be asked from another thread, as `current` may.
    """

    def __init__(self, age: float = 0.0):
        self._open: list[str] = []
        self._seconds: dict[str, float] = {"process start and imports": age} if age else {}
        self._mark = time.monotonic()
        self.step: int | None = None
        self.moves = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of a block for the phase of that name."""
        self._count()
        self._open.append(name)
        self.moves += 1
        try:
            yield
        finally:
            self._count()
            self._open.pop()
            self.moves += 1

    def touch(self) -> None:
        """Tells that a phase goes on, however long it lasts."""
        self.moves += 1

    def timed(self, name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Returns the function with its time counted for the phase of that name."""

        def inside(argument: Any) -> Any:
            with self.phase(name):
                return function(argument)

        return inside

    @property
    def current(self) -> str:
        """The phase that is going on; may be asked from another thread."""
        return self._open[-1] if self._open else BETWEEN

    def seconds(self) -> dict[str, float]:
        """Seconds until now by phase, in order of appearance; their sum is all time since the beginning."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        now = time.monotonic()
        name = self.current
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def start_line(seconds: dict[str, float]) -> str:
    """One line about the time to the first step; phases of less than 50 ms are left out but count."""
    parts = [f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05]
    return f"first step done after {sum(seconds.values()):.1f} s: " + ", ".join(parts)


def process_age() -> float:
    """Seconds since this process began, or 0 where the system does not say."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8")
        # Behind the name, which may hold anything, field 22 of proc(5) is the 20th.
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
