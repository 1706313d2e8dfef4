"""Goodput: the share of a run's wall time in steps that count, over all starts, and where the rest went.

Every start of a run has a file of its own in the folder `goodput` of the run's directory, replaced as a whole
at every log line, so that a start that was killed has told how far it came.
"""

import fnmatch
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from slm_jax import storage
from slm_jax.errors import RemoteError, UserError
from slm_jax.training.phases import BETWEEN, Phases

FOLDER = "goodput"
# Phases of a process that come with every step or save; all others belong to its start.
_WHILE_TRAINING = {
    "training": "steps",
    "data wait": "data wait",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "tracing": "compilation",
    "compiling": "compilation",
    "compile": "compilation",
    "first step": "start",
    "profile": "profile",
    BETWEEN: "other",
}


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as far as it told.

    Attributes:
      began: seconds since 1970 when its first process began.
      first_step: step that it went on from.
      step: steps that are behind it.
      seconds: phase -> seconds until it told last; none is left out.
    """

    began: float
    first_step: int
    step: int
    seconds: dict[str, float]

    @property
    def until(self) -> float:
        """Seconds since 1970 when it told last."""
        return self.began + sum(self.seconds.values())


class GoodputLog:
    """Writes down how far a start of a run came; of the first process alone.

    Args:
      model_dir: the run's directory.
      phases: clock of this process since its beginning.
      first_step: step that it goes on from.
    """

    def __init__(self, model_dir: Path, phases: Phases, first_step: int):
        self._phases, self._first_step = phases, first_step
        self._began = time.time() - sum(phases.seconds().values())
        self._model_dir = model_dir
        self._path = model_dir / FOLDER / f"{round(self._began * 1000)}.json"

    def write(self, step: int) -> None:
        """Tells what was done until now; raises UserError where it cannot be written."""
        attempt = Attempt(self._began, self._first_step, step, self._phases.seconds())
        try:
            storage.make_folder(self._path.parent)
            storage.write(self._path, json.dumps(asdict(attempt)) + "\n")
        except OSError as error:
            raise storage.failed(f"cannot write {self._path}", error, self._path) from error

    def line(self) -> str:
        """One line about all starts of the run until now, or why it cannot be told: no run ends by that."""
        try:
            return goodput(read_attempts(self._model_dir)).line()
        except (UserError, RemoteError) as error:
            return f"goodput is unknown: {error}"


def read_attempts(model_dir: Path) -> list[Attempt]:
    """Returns the starts of a run in their order.

    Raises:
      UserError: a file of them is damaged.
    """
    attempts = []
    folder = model_dir / FOLDER
    try:
        names = fnmatch.filter(storage.list_folder(folder), "*.json")
    except FileNotFoundError:
        return []
    for path in (folder / name for name in names):
        try:
            told = json.loads(storage.asked(path, functools.partial(storage.read, path)))
            # Another release may tell more.
            attempts.append(Attempt(**{field.name: told[field.name] for field in fields(Attempt)}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged, expected what a start of the run took; remove it") from error
    return sorted(attempts, key=lambda attempt: attempt.began)


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went.

    Attributes:
      wall: seconds from its first start to what it told last.
      seconds: cause -> seconds, which add up to `wall`; `steps` are those that count.
      lost_steps: steps that were taken and not saved, or rolled back.
      starts: of the run.
    """

    wall: float
    seconds: dict[str, float]
    lost_steps: int
    starts: int

    @property
    def share(self) -> float:
        """Of the wall time in steps that count, from 0 to 1."""
        return self.seconds.get("steps", 0.0) / self.wall if self.wall else 0.0

    def line(self) -> str:
        """One line: the share, and the causes of the rest from the largest on."""
        rest = {cause: value for cause, value in self.seconds.items() if cause != "steps"}
        parts = [
            f"{cause} {100 * value / self.wall:.1f} %"
            for cause, value in sorted(rest.items(), key=lambda item: -item[1])
            if value >= 0.0005 * self.wall
        ]
        begun = f"{self.starts} start{'s' if self.starts != 1 else ''}"
        lost = f", {self.lost_steps} steps taken twice" if self.lost_steps else ""
        head = f"goodput {100 * self.share:.1f} % of {self.wall:.0f} s in {begun}{lost}"
        return f"{head}: {', '.join(parts)}" if parts else head


def goodput(attempts: Sequence[Attempt]) -> Goodput:
    """Adds up starts in their order. A step that a later start takes again does not count the first time.

    What a start that was killed did after it had told last is `down`, as is the time to the next start.
    """
    seconds: dict[str, float] = {}
    lost_steps = 0

    def add(cause: str, value: float) -> None:
        if value:
            seconds[cause] = seconds.get(cause, 0.0) + value

    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        taken = attempt.step - attempt.first_step
        # A later start than the next one may go further back, by a rollback.
        back_to = min((later.first_step for later in attempts if later.began > attempt.began), default=None)
        lost = 0 if back_to is None else min(max(0, attempt.step - back_to), taken)
        lost_steps += lost
        for phase, value in attempt.seconds.items():
            cause = _WHILE_TRAINING.get(phase, "start")
            if cause == "steps" and taken:
                add("steps", value * (taken - lost) / taken)
                add("steps taken twice", value * lost / taken)
            else:
                add("start" if cause == "steps" else cause, value)
        if following is not None:
            add("down", max(0.0, following.began - attempt.until))
    return Goodput(sum(seconds.values()), seconds, lost_steps, len(attempts))
