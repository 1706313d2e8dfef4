"""From references to hypotheses: one compiled greedy decoder per batch shape, weights as arguments."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slm_jax.decoding.greedy import greedy_decode
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules
from slm_jax.partitioning.sharding import batch_sharding, check_batch_rows, replicated

if TYPE_CHECKING:
    from slm_jax.data.references import Reference


class Rejected(NamedTuple):
    """Why a reference got no hypothesis: a reason code as of `BadExample`, and what was found."""

    reason: str
    detail: str


class Prediction(NamedTuple):
    """What the model answered to one reference.

    Attributes:
      tokens: token ids before the end of sequence; empty where the example was rejected.
      rejected: why the model was not asked, or None.
    """

    tokens: list[int]
    rejected: Rejected | None = None


class BatchMaker(Protocol):
    """Makes global batches out of references, one reference per row.

    Attributes:
      rows: rows of every batch.
    """

    rows: int

    def __call__(
        self, references: Sequence["Reference"]
    ) -> tuple[Mapping[str, jax.Array], Mapping[int, Rejected]]:
        """Returns arrays sharded over the mesh, and the rejects by position in `references`.

        Args:
          references: at most `rows` of them; the rows that are left over stay empty.
        """
        ...


class Predictor:
    """Answers references greedily, in their order.

    Args:
      model: has `encode(batch)` and `decode_step`, as `models.slm.SLM` does.
      variables: its collections; leaves that lie on the mesh keep their sharding, others are replicated.
      make_batch: makes the batches; `evaluation.batches.ReferenceBatches` is the usual one.
      mesh: the device mesh.
      rules: logical axis -> mesh axis.
      max_tokens: most tokens of a hypothesis.
      eos_id: token that ends a hypothesis.
      on_batch: called before every batch.

    Raises:
      UserError: the batch shards of the mesh do not divide the rows of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        make_batch: BatchMaker,
        *,
        mesh: Mesh,
        rules: LogicalRules = DEFAULT_RULES,
        max_tokens: int,
        eos_id: int = 1,
        on_batch: Callable[[], None] = lambda: None,
    ):
        check_batch_rows(make_batch.rows, mesh, rules)
        self._make_batch, self._on_batch = make_batch, on_batch
        self._mesh, self._rules, self._eos_id = mesh, rules, eos_id
        self._variables = jax.tree.map(functools.partial(_on_mesh, mesh=mesh), variables)
        decode: Callable[..., jax.Array] = functools.partial(
            greedy_decode, model, max_tokens=max_tokens, eos_id=eos_id
        )
        self._decode = jax.jit(
            decode,
            in_shardings=(
                jax.tree.map(lambda leaf: leaf.sharding, self._variables),
                batch_sharding(mesh, rules),
            ),
            # Every host scores the same hypotheses, so every host gets them all.
            out_shardings=replicated(mesh),
        )

    def __call__(
        self, references: Sequence["Reference"], variables: Mapping[str, Any] | None = None
    ) -> list[Prediction]:
        """Returns one prediction for each reference, in the same order.

        Args:
          references: what to answer.
          variables: take the place of those given before, with the same shapes and shardings; nothing is
            compiled again.
        """
        if variables is not None:
            self._variables = jax.tree.map(functools.partial(_on_mesh, mesh=self._mesh), variables)
        predictions: list[Prediction] = []
        for start in range(0, len(references), self._make_batch.rows):
            self._on_batch()
            predictions += self._predict_batch(references[start : start + self._make_batch.rows])
        return predictions

    def _predict_batch(self, references: Sequence["Reference"]) -> list[Prediction]:
        arrays, rejects = self._make_batch(references)
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._rules):
            tokens_BT = np.asarray(self._decode(self._variables, dict(arrays)))
        return [
            Prediction([], rejects[row]) if row in rejects else Prediction(self._spoken(tokens_BT[row]))
            for row in range(len(references))
        ]

    def _spoken(self, tokens_T: np.ndarray) -> list[int]:
        ends = np.flatnonzero(tokens_T == self._eos_id)
        return tokens_T[: ends[0] if len(ends) else len(tokens_T)].tolist()


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.Array:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return leaf
    return jax.device_put(leaf, replicated(mesh))
