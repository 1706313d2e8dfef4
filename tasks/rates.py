"""Rates of the parts of a mixture that are counted when they are first asked for."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass

import numpy as np
import seqio

from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError, nearest


# A number and not a function: SeqIO takes no function for the rate of a mixture within a mixture.
@dataclass(frozen=True)
class PartRate(numbers.Number):
    """The rate `min(n, maximum) ** (1 / temperature)` of a part with n examples, or n hours.

    Attributes:
      mixture: its name, for errors.
      part: name of a registered task or mixture; a mixture counts what its tasks count together.
      measure: `examples` or `hours`.
      split: whose references are counted.
      temperature: positive.
      maximum: of n; None for no limit.

    Raises:
      UserError: the measure is unknown, or the temperature or the maximum is not positive.
    """

    mixture: str
    part: str
    measure: str
    split: str
    temperature: float = 1.0
    maximum: float | None = None

    def __post_init__(self):
        where = f"mixture {self.mixture!r}"
        if self.measure not in MEASURES:
            raise UserError(f"{where}: measure is {self.measure!r}{nearest(self.measure, MEASURES)}")
        for field in ("temperature", "maximum"):
            value = getattr(self, field)
            if not (field == "maximum" and value is None):
                check_rate(value, f"{where}: {field}", "is")

    def __float__(self) -> float:
        return self._value

    @functools.cached_property
    def _value(self) -> float:
        part = find_part(self.part, f"mixture {self.mixture!r}")
        tasks = part.tasks if isinstance(part, seqio.Mixture) else [part]
        count = sum(MEASURES[self.measure](task, self.split) for task in tasks)
        if not count:
            raise UserError(
                f"mixture {self.mixture!r}: {self.part!r} has no {self.measure} in split {self.split!r}, "
                "so that its rate would be 0, expected a positive one"
            )
        return min(count, math.inf if self.maximum is None else self.maximum) ** (1 / self.temperature)


def number_of_references(task: seqio.Task, split: str = "train") -> float:
    """Returns how many references a split of a task has, from its source alone.

    Raises:
      UserError: the task has no such split, or its source cannot say.
    """
    _check_split(task, split)
    count = task.num_input_examples(split)
    if count is None and isinstance(task.source, ReferenceSource):
        count = sum(len(chunk["id"]) for chunk in task.source.chunks(split))
    if count is None:
        raise UserError(f"task {task.name!r}: its source does not say how many examples split {split!r} has")
    return float(count)


def hours_of_references(task: seqio.Task, split: str = "train") -> float:
    """Returns how many hours of speech a split of a task has, from its source alone.

    Raises:
      UserError: the task has no such split, or its source knows no lengths.
    """
    _check_split(task, split)
    if not isinstance(task.source, ReferenceSource):
        raise UserError(f"task {task.name!r}: its source does not say how long its examples are")
    samples = sum(int(chunk["samples"].sum(dtype=np.int64)) for chunk in task.source.chunks(split))
    return samples / SAMPLE_RATE / 3600


MEASURES = {"examples": number_of_references, "hours": hours_of_references}


def find_part(name: str, where: str) -> seqio.Task | seqio.Mixture:
    """Returns a registered task or mixture; raises UserError, with the nearest name, where there is none."""
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise UserError(f"{where} names unknown task {name!r}{nearest(name, known)}")
    return seqio.get_mixture_or_task(name)


def check_rate(value: object, where: str, verb: str = "has rate") -> None:
    """Raises UserError unless a value is a positive number."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else value
    if not 0 < number < math.inf:
        raise UserError(f"{where} {verb} {value!r}, expected a positive number")


def _check_split(task: seqio.Task, split: str) -> None:
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}{nearest(split, task.splits)}")
