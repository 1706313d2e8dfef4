"""Batches of one reference per row, from `data/`'s own collation, for prediction instead of training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from slm_jax.data.batch import BatchShape, Placed, Reject, Row, collate
from slm_jax.data.placement import place, rows_of_process
from slm_jax.data.references import Reference
from slm_jax.evaluation.predictor import Rejected
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules
from slm_jax.partitioning.sharding import batch_sharding

# Bytes of a reject as hosts tell it to one another.
_TOLD_BYTES = 512


class ReferenceBatches:
    """A `BatchMaker`: each host loads the audio of exactly the rows that its devices hold.

    What does not fit the row or cannot be loaded is rejected, never cut. Targets are left out: they are
    not the model's business, and however long they are the example can be scored.

    Args:
      shape: static sizes; `rows` is the global batch, `targets` is not used.
      load: returns the samples of a reference, int16 [n] at 16 kHz, or raises BadExample.
      mesh: the device mesh.
      rules: logical axis -> mesh axis.
    """

    def __init__(
        self,
        shape: BatchShape,
        load: Callable[[Reference], np.ndarray],
        mesh: Mesh,
        rules: LogicalRules = DEFAULT_RULES,
    ):
        self.rows = shape.rows
        self._shape = dataclasses.replace(shape, targets=1)
        self._load = load
        self._sharding = batch_sharding(mesh, rules)

    def __call__(
        self, references: Sequence[Reference]
    ) -> tuple[Mapping[str, jax.Array], Mapping[int, Rejected]]:
        """Returns the arrays on the mesh and the rejects by position in `references`."""
        local_rows = rows_of_process(self._sharding, self.rows)
        rejects: dict[int, Rejected] = {}
        arrays = {
            name: np.empty((len(local_rows), *size[1:]), dtype)
            for name, (size, dtype) in self._shape.arrays().items()
        }
        for local, row in enumerate(local_rows):
            failed: list[Reject] = []
            example = references[row] if row < len(references) else None
            for name, array in collate([self._row(example, failed)], self._shape, self._load, failed).items():
                arrays[name][local] = array[0]
            if failed:
                rejects[int(row)] = Rejected(failed[0].reason, failed[0].detail)
        return place(arrays, local_rows, self._sharding, self.rows), _told_to_all(rejects, self.rows)

    def _row(self, example: Reference | None, failed: list[Reject]) -> Row:
        if example is None:
            return []
        question = dataclasses.replace(example, targets=np.zeros(0, np.int32))
        misfit = self._shape.misfit(question)
        if misfit is None:
            return [Placed(question)]
        failed.append(Reject(example, misfit.reason, misfit.detail))
        return []


def _told_to_all(rejects: dict[int, Rejected], rows: int) -> dict[int, Rejected]:
    if jax.process_count() == 1:
        return rejects
    return told_rejects(multihost_utils.process_allgather(rejects_as_bytes(rejects, rows)))


def rejects_as_bytes(rejects: Mapping[int, Rejected], rows: int) -> np.ndarray:
    """Writes rejects as uint8 [rows, 512]: text up to the first zero, empty where a row is good."""
    told = np.zeros((rows, _TOLD_BYTES), np.uint8)
    for row, rejected in rejects.items():
        text = f"{rejected.reason}\n{rejected.detail}".encode()[:_TOLD_BYTES]
        told[row, : len(text)] = np.frombuffer(text, np.uint8)
    return told


def told_rejects(told_PRC: np.ndarray) -> dict[int, Rejected]:
    """Reads what all processes told, uint8 [processes, rows, 512]; the first that rejects a row is heard."""
    rejects: dict[int, Rejected] = {}
    for told_RC in told_PRC:
        for row in np.flatnonzero(told_RC.any(axis=1)).tolist():
            text = told_RC[row].tobytes().rstrip(b"\0").decode(errors="ignore")
            rejects.setdefault(row, Rejected(*text.split("\n", 1)))
    return dict(sorted(rejects.items()))
