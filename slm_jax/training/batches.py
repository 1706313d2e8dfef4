"""What the loop asks of a source of batches; `data/` provides one."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax


class PlacedBatch(NamedTuple):
    """A batch that lies on the mesh.

    Attributes:
      arrays: global arrays, rows split over the mesh.
      ids: global row -> ids of its examples, of the rows that this host read.
      stats: counts of this host: `audio_seconds`, `target_tokens`, rejected examples by reason.
    """

    arrays: dict[str, jax.Array]
    ids: dict[int, tuple[str, ...]]
    stats: dict[str, float]


class BatchSource(Protocol):
    """An endless, seekable sequence of batches.

    Attributes:
      fingerprint: of the plan that decides the order of rows.
      rows_per_step: rows of a global batch.
      shapes: shape and dtype of every array of the global batch.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def rows_per_step(self) -> int: ...

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    def batches(self, rows_consumed: int) -> Iterator[PlacedBatch]:
        """Yields the batches that follow the first `rows_consumed` rows of the plan."""
        ...
