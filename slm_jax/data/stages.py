"""A plan whose mixture changes at given steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from slm_jax.data.batch import BatchShape, Row
from slm_jax.data.order import key_of
from slm_jax.data.plan import Anchor, Plan, Table
from slm_jax.errors import UserError


class StagedPlan:
    """Plans one after the other, each from its step on; the last has no end.

    Args:
      stages: step -> plan of the steps from there on; one begins at step 0. All have the same shape of rows.

    Raises:
      UserError: no stage begins at step 0.
    """

    def __init__(self, stages: Mapping[int, Plan]):
        self.stages = dict(sorted(stages.items()))
        if 0 not in self.stages:
            raise UserError(f"the first stage begins at step {min(stages, default=None)}, expected step 0")
        self._plans = list(self.stages.values())
        self._starts = np.array([step * self.rows_per_step for step in self.stages], np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the order of rows depends on."""
        parts = [(step, plan.fingerprint) for step, plan in self.stages.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def rows_per_step(self) -> int:
        """B, global."""
        return self._plans[0].rows_per_step

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """Shapes of the buckets, ascending."""
        return self._plans[0].shapes

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of all stages, each task once."""
        return tuple({table.task: table for plan in self._plans for table in plan.tables}.values())

    def rows(self, start: int, count: int, wanted: np.ndarray | None = None) -> list[Row]:
        """As of `Plan`, for rows of one stage; a step never has rows of two."""
        plan, first = self._stage(start)
        return plan.rows(start - first, count, wanted)

    def bucket(self, row: int) -> int:
        """As of `Plan`."""
        plan, first = self._stage(row)
        return plan.bucket(row - first)

    def anchor(self, row: int) -> Anchor | None:
        """As of `Plan`; rows count from the stage's first."""
        plan, first = self._stage(row)
        return plan.anchor(row - first)

    def seek(self, anchor: Anchor | None, row: int) -> None:
        """As of `Plan`."""
        plan, first = self._stage(row)
        plan.seek(anchor, row - first)

    def _stage(self, row: int) -> tuple[Plan, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._plans[number], int(self._starts[number])


def seed_of_stage(seed: int, step: int) -> int:
    """Returns the seed of a stage that begins at a step; the first one's is the run's.

    Every stage has an order of its own: with one seed its first epoch would repeat what the stage before it
    began with.
    """
    return int(key_of(seed, f"stage {step}")) if step else seed
