"""Next-token loss of a T5 on text alone, all of its parameters trained."""

from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError
from slm_jax.models.slm import lay_out
from slm_jax.models.t5 import T5
from slm_jax.training.objectives.base import Batch, Metrics, Part, Variables
from slm_jax.training.objectives.slm import weighted_token_sums


class TextObjective:
    """Cross-entropy of T5's targets on batches without speech: `layout` indexes `inputs`.

    Args:
      model: the T5; its dropout is active.
      embedding_noise: standard deviation of Gaussian noise on the encoder's input embeddings, relative to
        the RMS of each embedding. An LLM that learned with it tolerates the output of a speech adapter.

    Raises:
      UserError: the noise is negative.
    """

    def __init__(self, model: T5, embedding_noise: float = 0.0):
        if embedding_noise < 0:
            raise UserError(f"embedding_noise is {embedding_noise}, expected 0 or more")
        self.model = model
        self.embedding_noise = embedding_noise

    @property
    def parts(self) -> dict[str, Part]:
        """The whole model is the LLM."""
        return {"llm": Part("t5", self.model.config, ())}

    @property
    def samples_per_position(self) -> int:
        """There is no speech."""
        return 1

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Boxed variables in the collection `params`."""
        return dict(self.model.init(rng, batch, method=_score))

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over the batch: weighted token losses, weights, and token accuracy."""
        dropout_rng, noise_rng = jax.random.split(rng)
        scores: Any = self.model.apply(
            {"params": params},
            batch,
            self.embedding_noise,
            noise_rng,
            deterministic=False,
            rngs={"dropout": dropout_rng},
            method=_score,
        )
        losses_BT, correct_BT = scores
        return weighted_token_sums(losses_BT, correct_BT, batch["loss_weights"])


def _score(
    model: T5,
    batch: Batch,
    embedding_noise: float = 0.0,
    noise_rng: jax.Array | None = None,
    deterministic: bool = True,
) -> tuple[jax.Array, jax.Array]:
    embeddings_BND = model.embed(batch["inputs"])
    if embedding_noise:
        assert noise_rng is not None
        embeddings_BND = noisy(embeddings_BND, embedding_noise, noise_rng)
    segment_ids_BL = batch["layout_segment_ids"]
    encoded_BLD = model.encode(lay_out(embeddings_BND, batch["layout"]), segment_ids_BL, deterministic)
    hidden_BTD = model.decode(
        encoded_BLD,
        segment_ids_BL,
        batch["targets"],
        batch["target_segment_ids"],
        batch["target_positions"],
        deterministic,
    )
    return model.score_tokens(hidden_BTD, batch["targets"])


def noisy(embeddings_BND: jax.Array, relative_std: float, rng: jax.Array) -> jax.Array:
    """Adds Gaussian noise whose deviation is `relative_std` times the RMS of each embedding."""
    values = embeddings_BND.astype(jnp.float32)
    rms = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True)))
    noise = jax.random.normal(rng, values.shape) * (relative_std * rms)
    return (values + noise).astype(embeddings_BND.dtype)
