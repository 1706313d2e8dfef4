"""Next-token loss of a T5 on text alone, all of its parameters trained.

Shape suffixes: B rows, N text tokens, L and M positions of the encoder, T decoder tokens, D features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError
from slm_jax.models.layers import segment_mask
from slm_jax.models.slm import lay_out
from slm_jax.models.t5 import T5
from slm_jax.training.flops import t5_flops
from slm_jax.training.objectives.base import Batch, Metrics, Part, Variables
from slm_jax.training.objectives.slm import weighted_token_sums


class TextObjective:
    """Cross-entropy of T5's targets on batches without speech: `layout` indexes `inputs`.

    Args:
      model: the T5; its dropout is active.
      embedding_noise: Gaussian noise on the encoder's input embeddings, by its standard deviation relative to
        the RMS of each embedding; each row draws its own between 0 and this. An LLM that learned with it
        tolerates the output of a speech adapter, and tells a young adapter far more.
      embedding_blur: half of the rows have their embeddings averaged with those of neighbouring positions,
        by a Gaussian whose standard deviation in positions each row draws between 0 and this. A young
        adapter knows what was said before it knows where: an LLM that reads blurred text tells it.

    Noise and blur touch what stands in place of speech (`inputs_said`); the instruction around it stays
    exact, as it is when an adapter's output takes that place. Tasks in which nothing does so, as those of
    span corruption, are never spoilt.

    Raises:
      UserError: the noise or the blur is negative.
    """

    takes_packed_rows = True

    def __init__(self, model: T5, embedding_noise: float = 0.0, embedding_blur: float = 0.0):
        for name, value in (("embedding_noise", embedding_noise), ("embedding_blur", embedding_blur)):
            if value < 0:
                raise UserError(f"{name} is {value}, expected 0 or more")
        self.model = model
        self.embedding_noise = embedding_noise
        self.embedding_blur = embedding_blur

    @property
    def parts(self) -> dict[str, Part]:
        """The whole model is the LLM."""
        return {"llm": Part("t5", self.model.config, ())}

    @property
    def packs(self) -> bool:
        """Whether a slot of speech may hold several utterances."""
        return True

    @property
    def samples_per_position(self) -> int:
        """There is no speech."""
        return 1

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Boxed variables in the collection `params`; raises UserError where rows have room for speech."""
        if "speech_segments" in batch:
            raise UserError(
                "TASK_FEATURE_LENGTHS has 'speech', which a T5 on text alone cannot take; leave it out"
            )
        return dict(self.model.init(rng, batch, method=_score))

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over the batch: weighted token losses, weights, and token accuracy."""
        dropout_rng, spoil_rng = jax.random.split(rng)
        scores: Any = self.model.apply(
            {"params": params},
            batch,
            self._spoiler(spoil_rng),
            deterministic=False,
            rngs={"dropout": dropout_rng},
            method=_score,
        )
        losses_BT, correct_BT = scores
        return weighted_token_sums(losses_BT, correct_BT, batch["loss_weights"])

    def flops(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Operations of a step by part; noise and blur are no part of the model."""
        return t5_flops(self.model.config, shapes)

    def _spoiler(self, rng: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Returns what blurs and adds noise to embeddings [B, L, D] where segment ids [B, L] are not 0."""
        blur_rng, noise_rng = jax.random.split(rng)

        def spoil(embeddings_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
            spoiled_BLD = embeddings_BLD
            if self.embedding_blur:
                spoiled_BLD = blurred(spoiled_BLD, segment_ids_BL, self.embedding_blur, blur_rng)
            if self.embedding_noise:
                spoiled_BLD = noisy(spoiled_BLD, self.embedding_noise, noise_rng)
            return jnp.where((segment_ids_BL > 0)[..., None], spoiled_BLD, embeddings_BLD)

        return spoil


def _score(
    model: T5,
    batch: Batch,
    spoil: Callable[[jax.Array, jax.Array], jax.Array] = lambda embeddings_BLD, segment_ids_BL: (
        embeddings_BLD
    ),
    deterministic: bool = True,
) -> tuple[jax.Array, jax.Array]:
    segment_ids_BL = batch["layout_segment_ids"]
    embeddings_BLD = lay_out(model.embed(batch["inputs"]), batch["layout"])
    said_BL = lay_out(batch["inputs_said"][..., None], batch["layout"])[..., 0]
    embeddings_BLD = spoil(embeddings_BLD, jnp.where(said_BL, segment_ids_BL, 0))
    encoded_BLD = model.encode(embeddings_BLD, segment_ids_BL, deterministic)
    hidden_BTD = model.decode(
        encoded_BLD,
        segment_ids_BL,
        batch["targets"],
        batch["target_segment_ids"],
        batch["target_positions"],
        deterministic,
    )
    return model.score_tokens(hidden_BTD, batch["targets"])


def noisy(embeddings_BLD: jax.Array, most: float, rng: jax.Array) -> jax.Array:
    """Adds Gaussian noise to embeddings; on average each keeps its RMS.

    Args:
      embeddings_BLD: what to spoil.
      most: largest standard deviation of the noise, relative to the RMS of each embedding; rows draw theirs.
      rng: of the draws.
    """
    level_rng, noise_rng = jax.random.split(rng)
    values = embeddings_BLD.astype(jnp.float32)
    level_B11 = most * jax.random.uniform(level_rng, (values.shape[0], 1, 1))
    noise = jax.random.normal(noise_rng, values.shape) * (level_B11 * _rms(values))
    return ((values + noise) / jnp.sqrt(1 + jnp.square(level_B11))).astype(embeddings_BLD.dtype)


def blurred(embeddings_BLD: jax.Array, segment_ids_BL: jax.Array, most: float, rng: jax.Array) -> jax.Array:
    """Averages embeddings over neighbours in their segment; each keeps its RMS.

    Args:
      embeddings_BLD: what to blur.
      segment_ids_BL: int32, 0 outside segments, where nothing changes.
      most: largest standard deviation of the Gaussian weights, in positions; half of the rows draw 0.
      rng: of the draws.
    """
    rows, length = segment_ids_BL.shape
    width_rng, share_rng = jax.random.split(rng)
    width_B11 = (
        most
        * jax.random.uniform(width_rng, (rows, 1, 1))
        * jax.random.bernoulli(share_rng, 0.5, (rows, 1, 1))
    )
    distance_LM = jnp.arange(length)[:, None] - jnp.arange(length)
    # Narrower than this, a neighbour's weight is below 1e-20.
    weight_BLM = jnp.exp(-0.5 * jnp.square(distance_LM / jnp.maximum(width_B11, 0.1)))
    weight_BLM *= segment_mask(segment_ids_BL, segment_ids_BL)[:, 0]
    values = embeddings_BLD.astype(jnp.float32)
    # The norm makes up for the sum of the weights.
    mixed = jnp.einsum("blm,bmd->bld", weight_BLM, values)
    mixed *= _rms(values) / jnp.maximum(_rms(mixed), 1e-6)
    return jnp.where((segment_ids_BL > 0)[..., None], mixed, values).astype(embeddings_BLD.dtype)


def _rms(values: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True)))
