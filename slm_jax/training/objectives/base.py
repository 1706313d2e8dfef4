"""The interface between an objective and the train step."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Batch = dict[str, jax.Array]
Variables = dict[str, Any]
# Metric name -> (numerator, denominator), each a float32 scalar summed over the batch.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Part(NamedTuple):
    """A part of a model that can come from, or become, a foundation checkpoint of its own.

    Attributes:
      kind: sort of model, such as `t5`.
      config: its configuration, a dataclass.
      path: where its variables lie in a collection.
    """

    kind: str
    config: Any
    path: tuple[str, ...]


class Objective(Protocol):
    """What a run minimises.

    `init` returns boxed variables in the collections `params` and, where there are any, `frozen`. `loss`
    gets them unboxed. Sums are over the batch at hand; the step divides by the sum of weights of all
    microbatches and hosts.

    Attributes:
      model: the network.
      parts: name -> the part of the model of that name: `speech_encoder`, `llm`.
      samples_per_position: samples behind one position of speech in a row; 1 for text alone.
      takes_packed_rows: whether a row may hold several examples.
      packs: whether a slot of speech may hold several utterances.
    """

    model: Any
    takes_packed_rows: bool

    @property
    def packs(self) -> bool: ...

    @property
    def parts(self) -> dict[str, Part]: ...

    @property
    def samples_per_position(self) -> int: ...

    def init(self, rng: jax.Array, batch: Batch) -> Variables: ...

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]: ...

    def flops(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Operations that a step on a global batch asks for, by part; see `training.flops`."""
        ...
