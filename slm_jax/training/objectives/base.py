"""The interface between an objective and the train step."""

from typing import Any, Protocol

import jax

Batch = dict[str, jax.Array]
Variables = dict[str, Any]
# Metric name -> (numerator, denominator), each a float32 scalar summed over the batch.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    """What a run minimises.

    `init` returns boxed variables in the collections `params` and, where there are any, `frozen`. `loss`
    gets them unboxed. Sums are over the batch at hand; the step divides by the sum of weights of all
    microbatches and hosts.
    """

    def init(self, rng: jax.Array, batch: Batch) -> Variables: ...

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]: ...
