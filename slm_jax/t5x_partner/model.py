"""An SLM as a model of T5X: what `t5x.train`, `t5x.eval` and `t5x.infer` call.

Only `params` is T5X's to train. `frozen` travels in the train state's `flax_mutables`, which T5X hands to
every function of a model, splits over its mesh by logical axes and gives no optimizer state.

Shape suffixes: B rows, T decoder tokens.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax.linen import partitioning as flax_partitioning
from t5x import losses  # pyright: ignore[reportMissingImports]
from t5x import metrics as t5x_metrics  # pyright: ignore[reportMissingImports]
from t5x import models as t5x_models  # pyright: ignore[reportMissingImports]

from slm_jax.decoding.greedy import greedy_decode
from slm_jax.errors import UserError, nearest
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.t5x_partner.batches import SpeechFeatureConverter, array_dtypes
from slm_jax.training.objectives.slm import SLMObjective, weighted_token_sums
from slm_jax.training.planning import held

FROZEN = "frozen"


class SLMModel(t5x_models.BaseModel):
    """Cross-entropy of an SLM's targets, with T5X's names of what it reports.

    Args:
      objective: the SLM, with how its frozen weights are held, and SpecAugment.
      optimizer_def: an optimizer of T5X.
      feature_lengths: sizes of a row: `speech` in samples at 16 kHz, `inputs` and `targets` in tokens.
      foundations: part of the model (`speech_encoder`, `llm`) -> directory of its foundation checkpoint; each
        frozen part has one.
      frozen_dtype: floating parameters of frozen parts are held in it.
      initial_checkpoint: a T5X checkpoint of an SLM, whose parameters a new training begins with; its step
        and optimizer state stay behind. None for fresh ones.
      loss_normalizing_factor: as in T5X's models; the default divides by the learned tokens of a batch.
      max_bad_share: reading stops when more than this share of its examples cannot be used.
      eos_id: ends an answer.

    Raises:
      UserError: the model lacks a part that `foundations` names.
    """

    def __init__(
        self,
        objective: SLMObjective,
        optimizer_def: Any,
        feature_lengths: Mapping[str, int],
        foundations: Mapping[str, str],
        frozen_dtype: str = "bfloat16",
        initial_checkpoint: str | None = None,
        loss_normalizing_factor: Any = "NUM_REAL_TARGET_TOKENS",
        max_bad_share: float = 0.05,
        eos_id: int = 1,
    ):
        super().__init__(optimizer_def=optimizer_def)
        for part in foundations:
            if part not in objective.parts:
                raise UserError(
                    f"SLMModel.foundations has part {part!r}, which the model lacks"
                    f"{nearest(part, objective.parts)}"
                )
        self.objective = objective
        self.module = objective.model
        self.foundations = dict(foundations)
        self.frozen_dtype = frozen_dtype
        self.initial_checkpoint = initial_checkpoint
        self._loss_normalizing_factor = loss_normalizing_factor
        self._eos_id = eos_id
        # T5X makes a converter for every dataset and asks the model for its class.
        self.FEATURE_CONVERTER_CLS = functools.partial(
            SpeechFeatureConverter,
            feature_lengths=feature_lengths,
            samples_per_position=objective.samples_per_position,
            max_bad_share=max_bad_share,
        )

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
    ) -> Any:
        """T5X's plain initialisation, which would draw the foundation models at random.

        Raises:
          UserError: always; `state.SLMTrainStateInitializer` is what loads them.
        """
        raise UserError(
            "SLMModel is initialised by t5x.utils.TrainStateInitializer, which knows no foundation models; "
            "expected train_state_initializer_cls = @state.SLMTrainStateInitializer, from slm_jax.t5x_partner"
        )

    def initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
    ) -> Any:
        """Returns fresh variables with their logical axes, in T5X's collections.

        Args:
          rng: key of the initial values.
          input_shapes: of the global batch.
          input_types: without meaning; a batch has its own, and not all of T5X gives them.
        """
        types = array_dtypes()
        batch = {name: jnp.zeros(shape, types[name]) for name, shape in input_shapes.items()}
        boxed = self.objective.init(rng, batch)
        found: dict[str, Any] = {}
        for collection, tree in boxed.items():
            values = nn.unbox(tree)
            if collection == FROZEN:
                values = self._as_held(values)
            found |= {collection: values, f"{collection}_axes": _axes(tree)}
        return flax.core.freeze(found)

    def loss_fn(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: Any, flax_mutables: Any = None
    ) -> tuple[jax.Array, Any]:
        """Returns the loss, and metrics; with them `flax_mutables`, unchanged, where T5X hands them in."""
        loss, metrics = self._loss(params, batch, dropout_rng, flax_mutables)
        return loss, metrics if flax_mutables is None else (metrics, flax_mutables)

    def eval_fn(
        self, params: Any, batch: Mapping[str, jax.Array], flax_mutables: Any = None
    ) -> tuple[jax.Array, Any]:
        """Returns the loss without dropout, and metrics."""
        return self._loss(params, batch, None, flax_mutables)

    def predict_batch(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        rng: Any = None,
        flax_mutables: Any = None,
    ) -> jax.Array:
        """Returns greedy answers, int32 [B, T], of at most the batch's T tokens; zeros follow the EOS."""
        return greedy_decode(
            self.module,
            _variables(params, flax_mutables),
            batch,
            max_tokens=batch["targets"].shape[1],
            eos_id=self._eos_id,
        )

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        rng: Any = None,
        flax_mutables: Any = None,
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Returns greedy answers, int32 [B, T], and their log-likelihoods `scores`, float32 [B]."""
        answers_BT = self.predict_batch(params, batch, rng, flax_mutables)
        written_BT = (answers_BT > 0).astype(jnp.int32)
        positions_BT = jnp.broadcast_to(jnp.arange(answers_BT.shape[1]), answers_BT.shape) * written_BT
        answered = {
            **batch,
            "targets": answers_BT,
            "target_segment_ids": written_BT,
            "target_positions": positions_BT,
            "loss_weights": written_BT.astype(jnp.float32),
        }
        return answers_BT, {"scores": self.score_batch(params, answered, flax_mutables=flax_mutables)}

    def score_batch(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        return_intermediates: bool = False,
        flax_mutables: Any = None,
    ) -> jax.Array:
        """Returns the log-likelihoods of the targets, float32 [B].

        Raises:
          UserError: intermediates are asked for; the SLM's networks keep none.
        """
        if return_intermediates:
            raise UserError("SLMModel.score_batch: return_intermediates is True, expected False")
        scores: Any = self.module.apply(_variables(params, flax_mutables), batch)
        weights_BT = batch["loss_weights"]
        return -jnp.sum(jnp.where(weights_BT > 0, scores["token_losses"] * weights_BT, 0.0), axis=1)

    def _loss(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: Any, flax_mutables: Any
    ) -> tuple[jax.Array, Any]:
        factor, weights_BT = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor,
            {"decoder_target_tokens": batch["targets"], "decoder_loss_weights": batch["loss_weights"]},
        )
        batch = {**batch, "loss_weights": weights_BT}
        variables = _variables(params, flax_mutables)
        if dropout_rng is None:
            scores: Any = self.module.apply(variables, batch)
            sums = weighted_token_sums(scores["token_losses"], scores["correct"], weights_BT)
        else:
            sums = self.objective.loss(variables["params"], variables[FROZEN], dict(batch), dropout_rng)
        loss_sum, weight_sum, ratios = sums
        # A batch without anything to learn has loss 0, not 0/0.
        loss = loss_sum if factor is None else loss_sum / jnp.where(jnp.asarray(factor) > 0, factor, 1)
        return loss, _metrics(loss, loss_sum, weight_sum, ratios["token_accuracy"], batch["targets"].shape)

    def _as_held(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        shapes = jax.eval_shape(lambda: frozen)
        dtypes = {
            part: held(shapes[part], self.frozen_dtype) if part in self.foundations else shapes[part]
            for part in shapes
        }
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), dict(frozen), dtypes)


def logical_axis_rules(parameter_partitioning_dims: int = 1) -> list[tuple[str, Any]]:
    """The rules of `partitioning.rules.DEFAULT_RULES` for T5X's mesh of `data` and `model`.

    Args:
      parameter_partitioning_dims: 2 splits parameters over `data` too, as in T5X's standard rules.

    Raises:
      UserError: it is neither 1 nor 2.
    """
    if parameter_partitioning_dims not in (1, 2):
        raise UserError(f"parameter_partitioning_dims is {parameter_partitioning_dims!r}, expected 1 or 2")
    split = "data" if parameter_partitioning_dims == 2 else None
    axes = {"tensor": "model", "fsdp": split, ("slice", "data", "fsdp"): "data", None: None}
    # `batch` is what T5X itself asks for.
    return [("batch", "data"), *((name, axes[mesh_axes]) for name, mesh_axes in DEFAULT_RULES)]


def _variables(params: Any, flax_mutables: Any) -> dict[str, Any]:
    return {"params": params, FROZEN: (flax_mutables or {}).get(FROZEN, {})}


def _axes(boxed: Any) -> dict[str, Any]:
    """Returns the logical axes of boxed variables as T5X reads them: `<name>_axes` for each leaf."""
    if not isinstance(boxed, Mapping):
        raise TypeError(f"variables are a {type(boxed).__name__}, expected nested dictionaries")
    axes: dict[str, Any] = {}
    for name, leaf in boxed.items():
        if isinstance(leaf, Mapping):
            axes[name] = _axes(leaf)
        else:
            names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
            axes[f"{name}_axes"] = flax_partitioning.AxisMetadata(names=jax.sharding.PartitionSpec(*names))
    return axes


def _metrics(
    loss: jax.Array, loss_sum: jax.Array, weight_sum: jax.Array, correct: Any, shape: tuple[int, ...]
) -> dict[str, Any]:
    """What T5X's own models report of a batch, by the same names."""
    rows, tokens, devices = shape[0], shape[0] * shape[1], jax.device_count()
    average: Any = clu_metrics.Average
    rate = t5x_metrics.TimeRate.from_model_output
    return {
        "accuracy": average(total=correct[0], count=correct[1]),
        "loss": t5x_metrics.AveragePerStep(total=loss),
        "loss_per_nonpadding_target_token": average(total=loss_sum, count=weight_sum),
        "loss_per_all_target_tokens": average(total=loss_sum, count=jnp.array(tokens)),
        "non_padding_fraction/loss_weights": average(total=weight_sum, count=jnp.array(tokens)),
        "timing/seconds": t5x_metrics.Time(),
        "timing/seqs": t5x_metrics.Sum(jnp.array(rows)),
        "timing/seqs_per_second": rate(numerator=jnp.array(rows)),
        "timing/seqs_per_second_per_core": rate(numerator=jnp.array(rows / devices)),
        "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
        "timing/target_tokens_per_second": rate(numerator=jnp.array(tokens)),
    }
