"""BEST-RQ: self-supervised pretraining with a random-projection quantizer (arXiv 2202.01855, 2303.01037).

Shape suffixes: B rows, K slots, E segments, T mel frames, F encoder frames, M mel bins, S stacked features,
C codebooks, Z features of a code, V codes, D encoder features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_jax.errors import UserError
from slm_jax.models.encoders import encoder_kind
from slm_jax.training.flops import TRAINED, encoder_flops
from slm_jax.training.objectives.base import Batch, Metrics, Part, Variables


@dataclass(frozen=True)
class BestRQConfig:
    """The quantizer and the masks; defaults as published for USM and BEST-RQ.

    Attributes:
      codebooks, codes, code_dim: of the frozen random quantizer.
      quantizer_seed: of projections and codebooks; the run's own seed does not touch them.
      mask_start: probability that a mask starts at a mel frame.
      mask_frames: length of a mask in mel frames (40 of 10 ms).
      noise_std: masked features become this noise, in units of the utterance's deviation per bin.
    """

    codebooks: int = 16
    codes: int = 8192
    code_dim: int = 16
    quantizer_seed: int = 0
    mask_start: float = 0.01
    mask_frames: int = 40
    noise_std: float = 0.1


class BestRQModel(nn.Module):
    """A speech encoder that names the codes of masked frames; `params` hold `encoder` and `heads`."""

    encoder: Any
    config: BestRQConfig

    @property
    def longest_samples(self) -> int | None:
        """Most samples of a slot, of which the encoder takes no more; None where there is no limit."""
        return self.encoder.longest_samples

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns losses and correctness, float32 [B, K, F] (means over codebooks), masked, speech: bool.

        Draws masks and noise from the rng `mask` and dropout from `dropout`.
        """
        speech, segments = batch["speech"], batch["speech_segments"]
        mel, ids_BKT = self.encoder.features(speech, segments)
        hop = speech.shape[-1] // mel.shape[2]
        stack = stack_size(self.encoder, speech.shape[-1], mel.shape[2])
        mean, std = segment_statistics(mel, segments, hop)
        normal = jnp.where((ids_BKT > 0)[..., None], (mel - mean) / std, 0.0)
        codes_BKFC = self._codes(stacked(normal, stack))

        start_rng, noise_rng = jax.random.split(self.make_rng("mask"))
        masked_BKT = span_mask(start_rng, ids_BKT, self.config.mask_start, self.config.mask_frames)
        noise = mean + std * self.config.noise_std * jax.random.normal(noise_rng, mel.shape)
        hidden_mel = jnp.where(masked_BKT[..., None], noise, mel)
        frames_BKFD, ids_BKF = self.encoder.encode_features(hidden_mel, ids_BKT, deterministic=False)

        speech_BKF = ids_BKF > 0
        # A frame is learned where all that it covers of its utterance is hidden.
        hidden_BKT = masked_BKT | (ids_BKT == 0)
        masked_BKF = jnp.all(stacked(hidden_BKT[..., None], stack), axis=-1) & speech_BKF
        losses_BKF, correct_BKF = self._score(frames_BKFD, codes_BKFC)
        return losses_BKF, correct_BKF, masked_BKF, speech_BKF

    def _codes(self, stacked_BKFS: jax.Array) -> jax.Array:
        """The nearest code by cosine in every codebook, int32 [B, K, F, C]."""
        config = self.config
        features = stacked_BKFS.shape[-1]
        key, codebook_key = jax.random.split(jax.random.key(config.quantizer_seed))
        xavier = nn.initializers.xavier_uniform(in_axis=1, out_axis=2, batch_axis=(0,))
        normal = nn.initializers.normal(1.0)
        projection_CSZ: Any = self.variable(
            "frozen",
            "projection",
            nn.with_logical_partitioning(xavier, ("codebooks", "mel", None)),
            key,
            (config.codebooks, features, config.code_dim),
        ).value
        codebook_CVZ: Any = self.variable(
            "frozen",
            "codebook",
            nn.with_logical_partitioning(normal, ("codebooks", None, None)),
            codebook_key,
            (config.codebooks, config.codes, config.code_dim),
        ).value
        return nearest_codes(stacked_BKFS, projection_CSZ, codebook_CVZ)

    def _score(self, frames_BKFD: jax.Array, codes_BKFC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy and correctness, means over the codebooks, float32 [B, K, F]."""
        config, dim = self.config, frames_BKFD.shape[-1]
        init = nn.initializers.normal(dim**-0.5)
        heads_CDV: Any = self.param(
            "heads",
            nn.with_logical_partitioning(init, ("codebooks", "embed", "vocab")),
            (config.codebooks, dim, config.codes),
        )

        @jax.checkpoint
        def of_book(head_DV: jax.Array, codes_BKF: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = jnp.einsum("bkfd,dv->bkfv", frames_BKFD, head_DV.astype(frames_BKFD.dtype))
            logits = logits.astype(jnp.float32)
            target = jnp.take_along_axis(logits, codes_BKF[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - target, jnp.argmax(logits, axis=-1) == codes_BKF

        def add(sums: Any, book: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            losses, correct = of_book(*book)
            return (sums[0] + losses, sums[1] + correct), None

        zeros = jnp.zeros(codes_BKFC.shape[:-1], jnp.float32)
        (losses, correct), _ = jax.lax.scan(add, (zeros, zeros), (heads_CDV, jnp.moveaxis(codes_BKFC, -1, 0)))
        return losses / config.codebooks, correct / config.codebooks


class BestRQObjective:
    """Cross-entropy of the quantizer's codes at masked frames, the mean over codebooks.

    Args:
      encoder: the speech encoder; its features are mel bins of the speech alone, as a Conformer's are.
      config: quantizer and masks.

    Raises:
      UserError: the encoder has other features.
    """

    takes_packed_rows = True

    def __init__(self, encoder: Any, config: BestRQConfig | None = None):
        # Where a slot has a limit, features are of the whole window, whatever the speech in it.
        if not encoder.features_are_mel or encoder.longest_samples is not None:
            raise UserError(
                f"BestRQObjective.encoder is a {type(encoder).__name__}, expected a ConformerEncoder: "
                "what is masked are mel bins of the speech alone"
            )
        self.model = BestRQModel(encoder, config or BestRQConfig())

    @property
    def parts(self) -> dict[str, Part]:
        """The encoder, without heads and quantizer."""
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
        """Boxed variables: `params` (`encoder`, `heads`) and `frozen` (`projection`, `codebook`)."""
        params_rng, mask_rng, dropout_rng = jax.random.split(rng, 3)
        return dict(self.model.init({"params": params_rng, "mask": mask_rng, "dropout": dropout_rng}, batch))

    def loss(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over the batch: losses of masked frames, their number, code accuracy, share masked."""
        mask_rng, dropout_rng = jax.random.split(rng)
        scores: Any = self.model.apply(
            {"params": params, "frozen": frozen}, batch, rngs={"mask": mask_rng, "dropout": dropout_rng}
        )
        losses_BKF, correct_BKF, masked_BKF, speech_BKF = scores
        masked_sum = jnp.sum(masked_BKF).astype(jnp.float32)
        correct_sum = jnp.sum(jnp.where(masked_BKF, correct_BKF, 0.0))
        metrics: Metrics = {
            "code_accuracy": (correct_sum, masked_sum),
            "masked_share": (masked_sum, jnp.sum(speech_BKF)),
        }
        return jnp.sum(jnp.where(masked_BKF, losses_BKF, 0.0)), masked_sum, metrics

    def flops(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Operations of a step by part."""
        rows, slots, samples = shapes["speech"].shape
        encoder, config = self.model.encoder, self.model.config
        frames = rows * slots * (samples // encoder.samples_per_frame)
        mel, _ = jax.eval_shape(encoder.features, shapes["speech"], shapes["speech_segments"])
        features = stack_size(encoder, samples, mel.shape[2]) * mel.shape[3]
        code = features * config.code_dim + config.code_dim * config.codes
        return {
            "speech_encoder": encoder_flops(encoder.config, rows * slots, samples, TRAINED),
            "heads": 2 * frames * config.codebooks * encoder.dim * config.codes * TRAINED,
            "quantizer": 2 * frames * config.codebooks * code,
        }


def stack_size(encoder: Any, samples: int, mel_frames: int) -> int:
    """Mel frames of one frame of the encoder, where so many samples have so many mel frames."""
    return encoder.samples_per_frame // (samples // mel_frames)


def nearest_codes(stacked_BKFS: jax.Array, projection_CSZ: jax.Array, codebook_CVZ: jax.Array) -> jax.Array:
    """The code nearest by cosine to the projected features in every codebook, int32 [B, K, F, C]."""

    def of_book(_: None, book: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        projection_SZ, codebook_VZ = book
        # The projected vector's own length does not change which code is nearest by cosine.
        vectors = jnp.einsum("bkfs,sz->bkfz", stacked_BKFS, projection_SZ)
        scores = jnp.einsum("bkfz,vz->bkfv", vectors, _unit(codebook_VZ))
        return None, jnp.argmax(scores, axis=-1).astype(jnp.int32)

    # One codebook after the other: scores for all of them at once would not fit.
    _, codes_CBKF = jax.lax.scan(of_book, None, (projection_CSZ, codebook_CVZ))
    return jnp.moveaxis(codes_CBKF, 0, -1)


def span_mask(rng: jax.Array, segment_ids_BKT: jax.Array, start: float, length: int) -> jax.Array:
    """Random spans inside segments, bool [B, K, T].

    Args:
      rng: key.
      segment_ids_BKT: int32, 0 outside segments; a span ends with the segment that it starts in.
      start: probability that a span starts at a frame.
      length: frames of a span; spans may overlap.
    """
    time = jnp.broadcast_to(jnp.arange(segment_ids_BKT.shape[-1]), segment_ids_BKT.shape)
    before = jnp.pad(segment_ids_BKT[..., :-1], [(0, 0)] * (segment_ids_BKT.ndim - 1) + [(1, 0)])
    axis = segment_ids_BKT.ndim - 1
    segment_start = jax.lax.cummax(jnp.where(segment_ids_BKT != before, time, 0), axis=axis)
    starts = jax.random.uniform(rng, segment_ids_BKT.shape) < start
    last_start = jax.lax.cummax(jnp.where(starts, time, -length), axis=axis)
    return (time - last_start < length) & (last_start >= segment_start) & (segment_ids_BKT > 0)


def segment_statistics(
    mel_BKTM: jax.Array, segments_BKE3: jax.Array, hop: int, epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation per utterance and bin, laid out per frame: float32 [B, K, T, M] each.

    Without this normalisation most frames fall onto few codes and nothing is learned.

    Args:
      mel_BKTM: features; frame t starts at sample t * hop.
      segments_BKE3: int32, `speech_segments` of the batch.
      hop: samples from frame to frame.
      epsilon: added to the variance.
    """
    first_T = jnp.arange(mel_BKTM.shape[2]) * hop
    number, start, samples = (segments_BKE3[..., index, None] for index in range(3))
    inside = (number > 0) & (first_T >= start) & (first_T < start + samples)
    inside_BKET = inside.astype(jnp.float32)
    count_BKE1 = jnp.maximum(jnp.sum(inside_BKET, axis=-1, keepdims=True), 1.0)
    precise = jax.lax.Precision.HIGHEST

    def per_utterance(values_BKTM: jax.Array) -> jax.Array:
        return jnp.einsum("bket,bktm->bkem", inside_BKET, values_BKTM, precision=precise) / count_BKE1

    def per_frame(values_BKEM: jax.Array) -> jax.Array:
        return jnp.einsum("bket,bkem->bktm", inside_BKET, values_BKEM, precision=precise)

    mean_BKTM = per_frame(per_utterance(mel_BKTM))
    variance_BKTM = per_frame(per_utterance(jnp.square(mel_BKTM - mean_BKTM)))
    return mean_BKTM, jnp.sqrt(variance_BKTM + epsilon)


def stacked(values_BKTM: jax.Array, stack: int) -> jax.Array:
    """Lays `stack` consecutive frames side by side: [B, K, T, M] to [B, K, ceil(T / stack), stack * M]."""
    time = values_BKTM.shape[2]
    frames = -(-time // stack)
    padded = jnp.pad(values_BKTM, [(0, 0), (0, 0), (0, frames * stack - time), (0, 0)])
    return padded.reshape(*values_BKTM.shape[:2], frames, stack * values_BKTM.shape[3])


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
