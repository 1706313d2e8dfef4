"""Whisper's speech encoder: 30 s of waveform in, 20 ms frames out, one utterance per slot (arXiv 2212.04356).

Shape suffixes: B rows (slots folded in), K slots, S samples, E segments, T mel frames, M mel bins, F frames,
P positions of the window, D features.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint

from slm_jax.audio.log_mel import frame_segments
from slm_jax.audio.whisper_mel import HOP, SAMPLE_RATE, whisper_mel
from slm_jax.errors import UserError, check_whole, nearest
from slm_jax.models.layers import ACTIVATIONS, Conv, PreNormTransformer
from slm_jax.models.remat import REMAT
from slm_jax.models.shards import by_shard

ACTIVATION_AXES = ("activation_batch", "activation_length", "activation_embed")

# The second convolution has stride 2.
MEL_FRAMES_PER_FRAME = 2


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes and switches of the encoder; the defaults are those of Whisper tiny.

    Attributes:
      mel_bins: 80, or 128 from large-v3 on.
      layers, dim, heads: of the transformer.
      mlp_dim: hidden features of its MLP.
      positions: frames of the window that the encoder always sees; 1500 are 30 s.
      activation: of the MLP, a name of `layers.ACTIVATIONS`.
      dropout: rate where the encoder itself is trained.
      dtype: of computation; norms and softmax stay float32.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
      scan_unroll: layers per iteration of the scan; more compile longer and may run faster.
    """

    mel_bins: int = 80
    layers: int = 4
    dim: int = 384
    heads: int = 6
    mlp_dim: int = 1536
    positions: int = 1500
    activation: str = "gelu_exact"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        for name in ("mel_bins", "layers", "dim", "heads", "mlp_dim", "positions", "scan_unroll"):
            check_whole(f"WhisperConfig.{name}", getattr(self, name))
        if self.dim % self.heads:
            raise UserError(f"WhisperConfig.heads is {self.heads}, which does not divide dim {self.dim}")
        if self.dim % 2 or self.dim < 4:
            raise UserError(
                f"WhisperConfig.dim is {self.dim}; sinusoidal positions need an even one of at least 4"
            )
        for name, choices in (("activation", tuple(ACTIVATIONS)), ("remat", REMAT)):
            if (found := getattr(self, name)) not in choices:
                raise UserError(f"WhisperConfig.{name} is {found!r}{nearest(found, choices)}")

    @property
    def window_samples(self) -> int:
        """Most samples of an utterance."""
        return self.positions * MEL_FRAMES_PER_FRAME * HOP


def _size(layers: int, dim: int, heads: int, mel_bins: int = 80) -> WhisperConfig:
    return WhisperConfig(mel_bins=mel_bins, layers=layers, dim=dim, heads=heads, mlp_dim=4 * dim)


# Distil-Whisper keeps the whole encoder of the model that it was made from, and so does large-v3-turbo.
_PRESETS = {
    "tiny": _size(4, 384, 6),
    "base": _size(6, 512, 8),
    "small": _size(12, 768, 12),
    "medium": _size(24, 1024, 16),
    "large_v2": _size(32, 1280, 20),
    "large_v3": _size(32, 1280, 20, mel_bins=128),
    "large_v3_turbo": _size(32, 1280, 20, mel_bins=128),
}


def preset(name: str, **overrides: Any) -> WhisperConfig:
    """The configuration of a published size, with the fields in `overrides` replaced.

    Raises:
      UserError: there is no such preset.
    """
    if name not in _PRESETS:
        raise UserError(f"there is no Whisper preset {name!r}{nearest(name, _PRESETS)}")
    return dataclasses.replace(_PRESETS[name], **overrides)


class WhisperEncoder(nn.Module):
    """Speech in slots of rows to frames; a slot holds one utterance of at most the window, from sample 0.

    As in the original each frame attends to the whole window, the silence behind the utterance included.
    """

    config: WhisperConfig

    @property
    def samples_per_frame(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        return HOP * MEL_FRAMES_PER_FRAME

    @property
    def dim(self) -> int:
        """Features D of a frame."""
        return self.config.dim

    @property
    def longest_samples(self) -> int:
        """Most samples of a slot: the window that the network always sees."""
        return self.config.window_samples

    @property
    def features_are_mel(self) -> bool:
        """Whether `features` are mel bins over time, which SpecAugment masks."""
        return True

    @property
    def packs(self) -> bool:
        """Whether a slot may hold several utterances."""
        return False

    def __call__(
        self, speech: jax.Array, speech_segments: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms.

        Args:
          speech: int16 [B, K, S]; S is a multiple of `samples_per_frame` and at most the window's samples.
          speech_segments: int32 [B, K, 1, 3], of the utterance: example number (0 = absent), first sample
            (0), samples.
          deterministic: False applies dropout (rng `dropout`).

        Returns:
          [B, K, F, D] frames of the compute dtype, zero behind the utterance, and int32 [B, K, F] segment
          ids, with F = S / `samples_per_frame`. An utterance of n samples has `ceil(n / samples_per_frame)`.

        Raises:
          ValueError: S is no multiple of `samples_per_frame` or longer than the window, or a slot holds more
            than one utterance.
        """
        features, feature_segment_ids = self.features(speech, speech_segments)
        frames, segment_ids = self.encode_features(features, feature_segment_ids, deterministic=deterministic)
        count = speech.shape[-1] // self.samples_per_frame
        return frames[:, :, :count], segment_ids[:, :, :count]

    def features(self, speech: jax.Array, speech_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel float32 [B, K, T, M] and int32 [B, K, T] segment ids of the window; arguments as of call.

        T is two per position of the window whatever S is: what lies behind the utterance is silence, which
        the network hears.
        """
        window = self.config.window_samples
        if speech.shape[-1] % self.samples_per_frame:
            raise ValueError(
                f"speech has {speech.shape[-1]} samples, no multiple of the frame's {self.samples_per_frame}"
            )
        if speech.shape[-1] > window:
            raise ValueError(
                f"speech has {speech.shape[-1]} samples ({speech.shape[-1] / SAMPLE_RATE:g} s); Whisper's "
                f"window holds {window} ({window / SAMPLE_RATE:g} s)"
            )
        if speech_segments.shape[-2] != 1:
            raise ValueError(
                f"a slot holds {speech_segments.shape[-2]} utterances; Whisper takes one, from sample 0"
            )
        frames = self.config.positions * MEL_FRAMES_PER_FRAME
        segment_ids, _ = frame_segments(speech_segments, frames, HOP)
        samples = jnp.where(speech_segments[..., 0, 0] > 0, speech_segments[..., 0, 2], 0)
        front_end = functools.partial(whisper_mel, frames=frames, mel_bins=self.config.mel_bins)
        return by_shard(front_end, ("activation_batch",), speech, samples), segment_ids

    @nn.compact
    def encode_features(
        self, features: jax.Array, feature_segment_ids: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes what `features` gives (masked or augmented at will): all frames of the window.

        Args:
          features: float [B, K, T, M] with T two per position of the window.
          feature_segment_ids: int32 [B, K, T].
          deterministic: as of the call.

        Returns:
          [B, K, P, D] frames, zero behind the utterance, and int32 [B, K, P] segment ids.
        """
        config = self.config
        slots = features.shape[:2]
        x_BTD = features.reshape(-1, *features.shape[2:]).astype(config.dtype)
        x_BTD = self._conv("conv_0", "mel", stride=1)(x_BTD)
        x_BPD = self._conv("conv_1", "conv_in", stride=MEL_FRAMES_PER_FRAME)(
            nn.gelu(x_BTD, approximate=False)
        )
        x_BPD = nn.gelu(x_BPD, approximate=False)
        # Published checkpoints store this table, so it is a parameter though it never was trained.
        table_PD = self.param(
            "position_embedding",
            nn.with_logical_partitioning(_sinusoids, ("positions", "embed")),
            (config.positions, config.dim),
        )
        x_BPD = x_BPD + jnp.asarray(table_PD, config.dtype)
        x_BPD = nn.Dropout(config.dropout)(x_BPD, deterministic=deterministic)
        x_BPD = with_logical_constraint(x_BPD, ACTIVATION_AXES)
        encoder = PreNormTransformer(
            layers=config.layers,
            num_heads=config.heads,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            key_bias=False,
            dropout=config.dropout,
            remat=config.remat,
            scan_unroll=config.scan_unroll,
            dtype=config.dtype,
            name="encoder",
        )
        x_BPD = encoder(x_BPD, None, deterministic)
        segment_ids = feature_segment_ids[:, :, ::MEL_FRAMES_PER_FRAME]
        frames = x_BPD.reshape(*slots, *x_BPD.shape[1:])
        return jnp.where((segment_ids > 0)[..., None], frames, 0), segment_ids

    def _conv(self, name: str, inputs: str, stride: int) -> Conv:
        axes = ("conv_kernel", inputs, "embed")
        return Conv(self.config.dim, 3, axes, stride=stride, padding=1, dtype=self.config.dtype, name=name)


def _sinusoids(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Whisper's encoding of positions: float32 [P, D], sines then cosines of rates from 1 to 1 / 10000."""
    del key
    positions, dim = shape
    rates = np.exp(-math.log(10_000.0) / (dim // 2 - 1) * np.arange(dim // 2))
    angles = np.arange(positions)[:, None] * rates
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
