"""What a run carries from step to step."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class TrainState(NamedTuple):
    """Step number, trained parameters and optimizer state; nothing of it is frozen.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included.
      params: the trained parameters, unboxed.
      opt_state: Optax state of `params`.
    """

    step: Any
    params: Any
    opt_state: Any


@dataclass(frozen=True)
class DataCursor:
    """Where in the plan a run stands.

    Attributes:
      rows_consumed: rows of the plan that are behind the run, the skipped ones included.
      fingerprint: of the plan.
      anchor: what the source said of that row, so that a seek to it is short; None where it says nothing.
      skipped: first row and number of rows of each stretch that `rows_consumed` counts and nobody trained on.
    """

    rows_consumed: int
    fingerprint: str
    anchor: tuple[int, int] | None = None
    skipped: tuple[tuple[int, int], ...] = ()
