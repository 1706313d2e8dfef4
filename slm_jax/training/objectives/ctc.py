"""Connectionist temporal classification (Graves et al. 2006) to pretrain a speech encoder.

Shape suffixes: B rows, K slots, F frames of a slot, P frames of all slots, T target tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from slm_jax.audio.spec_augment import SpecAugmentConfig, spec_augment
from slm_jax.errors import UserError
from slm_jax.models.encoders import encoder_kind
from slm_jax.models.layers import Dense
from slm_jax.training.flops import FORWARD, TRAINED, encoder_flops
from slm_jax.training.objectives.base import Batch, Metrics, Part, Variables

BLANK_ID = 0
EOS_ID = 1


class CTCModel(nn.Module):
    """A speech encoder with a linear head over pieces; parameters `encoder` and `head`."""

    encoder: Any
    vocab_size: int
    augment: SpecAugmentConfig | None = None
    frozen_encoder: bool = False

    @property
    def longest_samples(self) -> int | None:
        """Most samples of a slot, of which the encoder takes no more; None where there is no limit."""
        return self.encoder.longest_samples

    def setup(self):
        self.head = Dense(self.vocab_size, ("embed", "vocab"), use_bias=True)

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """Returns logits float32 [B, P, V] and which frames hold speech, bool [B, P].

        Args:
          batch: `speech` and `speech_segments`; a row holds one utterance.
          deterministic: False applies dropout (rng `dropout`) and SpecAugment (rng `augment`).
        """
        mel, mel_segment_ids = self.encoder.features(batch["speech"], batch["speech_segments"])
        if self.augment is not None and not deterministic:
            mel = spec_augment(self.make_rng("augment"), mel, mel_segment_ids, self.augment)
        frames_BKFD, ids_BKF = self.encoder.encode_features(
            mel, mel_segment_ids, deterministic=deterministic or self.frozen_encoder
        )
        rows = ids_BKF.shape[0]
        logits_BPV = self.head(frames_BKFD.reshape(rows, -1, frames_BKFD.shape[-1]))
        return logits_BPV.astype(jnp.float32), ids_BKF.reshape(rows, -1) > 0


class CTCObjective:
    """CTC loss over the pieces of `targets` without EOS, per piece; blank is piece 0.

    An utterance whose labels cannot be aligned to its frames counts nothing and shows in the metric
    `unalignable`.

    Args:
      encoder: the speech encoder, any of `models.encoders`.
      vocab_size: number of pieces, blank included.
      augment: SpecAugment; None leaves the features alone.
      freeze_encoder: only the head trains, a probe of what a pretrained encoder already tells.

    Raises:
      UserError: SpecAugment is asked for, and the encoder's features are no mel bins.
    """

    takes_packed_rows = False

    def __init__(
        self,
        encoder: Any,
        vocab_size: int,
        augment: SpecAugmentConfig | None = None,
        freeze_encoder: bool = False,
    ):
        if augment is not None and not encoder.features_are_mel:
            raise UserError(
                f"CTCObjective.augment is set and its encoder is a {type(encoder).__name__}, which hears the "
                "waveform, expected None: SpecAugment hides mel bins"
            )
        self.model = CTCModel(encoder, vocab_size, augment, freeze_encoder)
        self.freeze_encoder = freeze_encoder

    @property
    def parts(self) -> dict[str, Part]:
        """The encoder, without the head."""
        config = self.model.encoder.config
        return {"speech_encoder": Part(encoder_kind(config), config, ("encoder",))}

    @property
    def packs(self) -> bool:
        """Whether a slot of speech may hold several utterances."""
        return self.model.encoder.packs

    @property
    def samples_per_position(self) -> int:
        """Utterances start on whole frames."""
        return self.model.encoder.samples_per_frame

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Boxed variables `encoder` and `head` in `params`; an encoder that is frozen in `frozen`."""
        params = dict(self.model.init(rng, batch)["params"])
        if not self.freeze_encoder:
            return {"params": params}
        return {"frozen": {"encoder": params.pop("encoder")}, "params": params}

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over the batch: CTC losses, labels, and the share of utterances that cannot be aligned."""
        dropout_rng, augment_rng = jax.random.split(rng)
        scores: Any = self.model.apply(
            self._variables(params, frozen),
            batch,
            deterministic=False,
            rngs={"dropout": dropout_rng, "augment": augment_rng},
        )
        logits_BPV, speech_BP = scores
        targets_BT = batch["targets"]
        label_BT = (batch["target_segment_ids"] > 0) & (targets_BT != EOS_ID) & (targets_BT != BLANK_ID)
        losses_B = optax.ctc_loss(
            logits_BPV,
            1.0 - speech_BP.astype(jnp.float32),
            targets_BT,
            1.0 - label_BT.astype(jnp.float32),
            blank_id=BLANK_ID,
        )
        labels_B = jnp.sum(label_BT, axis=1)
        present_B = labels_B > 0
        aligns_B = frames_needed(targets_BT, label_BT) <= jnp.sum(speech_BP, axis=1)
        learned_B = present_B & aligns_B
        loss_sum = jnp.sum(jnp.where(learned_B, losses_B, 0.0))
        weight_sum = jnp.sum(jnp.where(learned_B, labels_B, 0)).astype(jnp.float32)
        return loss_sum, weight_sum, {"unalignable": (jnp.sum(present_B & ~aligns_B), jnp.sum(present_B))}

    def flops(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Operations of a step by part; the search over alignments is none of a network."""
        rows, slots, samples = shapes["speech"].shape
        encoder, passes = self.model.encoder, FORWARD if self.freeze_encoder else TRAINED
        # An encoder with a window gives all of its frames.
        frames = (encoder.longest_samples or samples) // encoder.samples_per_frame
        head = 2 * rows * slots * frames * encoder.dim * self.model.vocab_size
        return {
            "speech_encoder": encoder_flops(encoder.config, rows * slots, samples, passes),
            # Nothing needs the gradient of a frozen encoder's frames.
            "head": head * (2 if self.freeze_encoder else 3),
        }

    def transcribe(self, params: Any, batch: Batch, frozen: Any = None) -> jax.Array:
        """The pieces of the likeliest path, int32 [B, P], 0 after the last."""
        scores: Any = self.model.apply(self._variables(params, frozen), batch)
        return greedy_labels(*scores)

    def _variables(self, params: Any, frozen: Any) -> Variables:
        return {"params": {**params, **frozen} if self.freeze_encoder else params}


def frames_needed(labels_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Frames that the labels take at least, int32 [B]: one each, and a blank between two that are equal."""
    repeated_BT = (labels_BT[:, 1:] == labels_BT[:, :-1]) & valid_BT[:, 1:] & valid_BT[:, :-1]
    return jnp.sum(valid_BT, axis=1) + jnp.sum(repeated_BT, axis=1)


def greedy_labels(logits_BPV: jax.Array, speech_BP: jax.Array) -> jax.Array:
    """Collapses the likeliest piece of every frame to labels, int32 [B, P], 0 after the last.

    Args:
      logits_BPV: float [B, P, V].
      speech_BP: bool [B, P], which frames hold speech.
    """
    best_BP = jnp.where(speech_BP, jnp.argmax(logits_BPV, axis=-1), BLANK_ID)
    before_BP = jnp.pad(best_BP[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK_ID)
    kept_BP = (best_BP != BLANK_ID) & (best_BP != before_BP)
    # A stable sort brings the kept ones to the front in their order.
    order_BP = jnp.argsort(~kept_BP, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(kept_BP, best_BP, 0), order_BP, axis=1).astype(jnp.int32)
