"""Next-token loss of an SLM on speech and text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.audio.spec_augment import SpecAugmentConfig
from slm_jax.errors import UserError, nearest
from slm_jax.models.encoders import encoder_class, encoder_kind
from slm_jax.models.quantization import quantized
from slm_jax.models.slm import SLM
from slm_jax.training.flops import slm_flops
from slm_jax.training.objectives.base import Batch, Metrics, Part, Variables

FROZEN_WEIGHTS = ("float", "int8")


class SLMObjective:
    """Cross-entropy of the targets; the parts named in `SLMConfig.trainable` train, with dropout.

    Args:
      model: the SLM.
      frozen_weights: "float", or "int8": frozen matrices are held as int8 with a scale per channel. Trained
        parts are floats either way.
      augment: SpecAugment of the speech encoder's features, in training alone; None leaves them alone.

    Raises:
      UserError: `frozen_weights` is neither, or the encoder's features are no mel bins.
    """

    takes_packed_rows = True

    def __init__(self, model: SLM, frozen_weights: str = "float", augment: SpecAugmentConfig | None = None):
        if frozen_weights not in FROZEN_WEIGHTS:
            found = f"SLMObjective.frozen_weights is {frozen_weights!r}"
            raise UserError(f"{found}{nearest(frozen_weights, FROZEN_WEIGHTS)}")
        if augment is not None and not model.features_are_mel:
            raise UserError(
                f"SLMObjective.augment is set and its encoder is a "
                f"{encoder_class(model.config.speech_encoder).__name__}, which hears the waveform, expected "
                "None: SpecAugment hides mel bins"
            )
        self.model = model
        self.frozen_weights = frozen_weights
        self.augment = augment

    @property
    def parts(self) -> dict[str, Part]:
        """Encoder and LLM, in whichever collection they are."""
        config = self.model.config
        return {
            "speech_encoder": Part(
                encoder_kind(config.speech_encoder), config.speech_encoder, ("speech_encoder",)
            ),
            "llm": Part("t5", config.llm, ("llm",)),
        }

    @property
    def packs(self) -> bool:
        """Whether a slot of speech may hold several utterances."""
        return self.model.packs

    @property
    def samples_per_position(self) -> int:
        """Samples per speech position of the LLM's encoder."""
        return self.model.samples_per_position

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Boxed variables in the collections `params` and `frozen`."""
        variables = dict(self.model.init(rng, batch))
        if self.frozen_weights == "int8" and "frozen" in variables:
            variables["frozen"] = quantized(variables["frozen"])
        return variables

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over the batch: weighted token losses, weights, and token accuracy."""
        # Dropout has the step's own key, so that it draws the same with and without SpecAugment.
        rngs = {"dropout": rng, "augment": jax.random.fold_in(rng, 1)}
        scores: Any = self.model.apply(
            {"params": params, "frozen": frozen},
            batch,
            deterministic=False,
            augment=self.augment,
            rngs=rngs,
        )
        return weighted_token_sums(scores["token_losses"], scores["correct"], batch["loss_weights"])

    def flops(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Operations of a step by part."""
        return slm_flops(self.model.config, shapes)


def weighted_token_sums(
    token_losses_BT: jax.Array, correct_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Loss sum, weight sum and accuracy of tokens; a token of weight 0 counts nothing, whatever its loss."""
    learned_BT = weights_BT > 0
    loss_sum = jnp.sum(jnp.where(learned_BT, token_losses_BT * weights_BT, 0.0))
    weight_sum = jnp.sum(weights_BT)
    correct_sum = jnp.sum(jnp.where(learned_BT & correct_BT, weights_BT, 0.0))
    return loss_sum, weight_sum, {"token_accuracy": (correct_sum, weight_sum)}
