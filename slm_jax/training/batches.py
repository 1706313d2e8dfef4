"""What the loop asks of a source of batches; `data/` provides one."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import numpy as np

from slm_jax.errors import UserError


class PlacedBatch(NamedTuple):
    """A batch that lies on the mesh.

    Attributes:
      arrays: global arrays, rows split over the mesh.
      ids: global row -> ids of its examples, of the rows that this host read.
      stats: counts of this host: `audio_seconds`, `target_tokens`, rejected examples by reason, and what
        of the rows is used: `speech_used` of `speech_room`, and so for `encoder` and `decoder`.
    """

    arrays: dict[str, jax.Array]
    ids: dict[int, tuple[str, ...]]
    stats: dict[str, float]


class BatchSource(Protocol):
    """An endless, seekable sequence of batches.

    Attributes:
      fingerprint: of the plan that decides the order of rows.
      rows_per_step: rows of a global batch.
      shapes: shape and dtype of every array of the global batch, the largest where batches differ.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def rows_per_step(self) -> int: ...

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    def anchor(self, rows_consumed: int) -> tuple[int, int] | None:
        """Returns what makes a later seek to a row short, or None where nothing is needed."""
        ...

    def batches(self, rows_consumed: int, anchor: tuple[int, int] | None = None) -> Iterator[PlacedBatch]:
        """Yields the batches that follow the first `rows_consumed` rows of the plan.

        Args:
          rows_consumed: rows that were trained on.
          anchor: what `anchor` said of that row when it was saved, if it was.
        """
        ...


def check_same_plan(fingerprint: str) -> None:
    """Raises UserError on every process where one plans other rows: examples would be lost."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(jax.process_count(), -1)
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"process {others[0]} plans other rows than process 0, expected the same of all "
            f"{len(digests)}: their corpora, configurations or versions of slm_jax differ"
        )
