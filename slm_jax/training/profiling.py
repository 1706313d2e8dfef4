"""A trace of some steps of a run, for XProf."""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slm_jax import storage
from slm_jax.errors import UserError


class ProfileSteps(NamedTuple):
    """Steps that are traced: `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfileSteps":
        """Reads `100:105`; raises UserError where the text names no such steps."""
        first, _, last = text.partition(":")
        # `isdecimal` alone takes digits of any script.
        decimal = all(number.isascii() and number.isdecimal() for number in (first, last))
        if decimal and 1 <= int(first) <= int(last):
            return cls(int(first), int(last))
        raise UserError(
            f"--profile_steps is {text!r}, expected the first and the last step to trace, such as 100:105"
        )

    def check(self, train_steps: int) -> None:
        """Raises UserError where a run of so many steps has none of these."""
        if self.first > train_steps:
            raise UserError(
                f"--profile_steps is '{self.first}:{self.last}' and LoopConfig.train_steps {train_steps}, "
                f"expected a first step up to {train_steps}"
            )


class StepProfiler:
    """Starts and stops JAX's profiler around steps; a trace is written when it stops.

    Args:
      directory: where traces go, each in a folder of its own time.
      steps: which are traced; None traces nothing.
      say: tells where the trace lies, or that there is none.
      apart: counts the time in which the profiler starts and writes, see `Throughput.apart`.
    """

    def __init__(
        self,
        directory: Path,
        steps: ProfileSteps | None,
        say: Callable[[str], None],
        apart: Callable[[str], contextlib.AbstractContextManager[None]],
    ):
        self._directory, self._steps, self._say, self._apart = directory, steps, say, apart
        self._running, self._traced = False, False
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int, state: Any) -> None:
        """Starts before the first of the steps; of a run that goes on among them, before its first one."""
        if self._steps and not self._running and self._steps.first <= step <= self._steps.last:
            # What was dispatched before is no part of these steps.
            jax.block_until_ready(state)
            with self._apart("profile"):
                if storage.is_remote(self._directory):
                    self._local = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(self._local.name if self._local else str(self._directory))
            self._running = self._traced = True

    def after(self, step: int, state: Any) -> None:
        """Stops after the last of the steps."""
        if self._steps and self._running and step >= self._steps.last:
            jax.block_until_ready(state)
            self._stop()

    def close(self) -> None:
        """Stops and writes a trace under way; says so where none of the steps was taken."""
        self._stop()
        if self._steps and not self._traced:
            self._say(
                f"no trace: none of steps {self._steps.first} to {self._steps.last} was taken by this start"
            )

    def _copy(self, folder: Path) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                path = self._directory / str(file.relative_to(folder))
                storage.asked(path, functools.partial(storage.put, file, str(path)))

    def _stop(self) -> None:
        if self._running:
            self._running = False
            with self._apart("profile"):
                jax.profiler.stop_trace()
                if self._local:
                    self._copy(Path(self._local.name))
            self._say(
                f"trace written to {self._directory}; `pip install xprof`, then "
                f"`xprof --logdir {self._directory}` or TensorBoard shows it"
            )
