"""The USM-style Conformer speech encoder: waveform in, 40 ms frames out, aware of packed segments.

References: Conformer, arXiv 2005.08100; USM, arXiv 2303.01037; relative positions, arXiv 1901.02860.

Shape suffixes: B rows (slots folded in), K slots, S samples, E segments, T mel frames, M mel bins, F frames
(as queries F, as keys G), P relative distances, D features, H heads, C features of a head, W kernel taps.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint

from slm_jax.audio.log_mel import LogMelConfig, log_mel
from slm_jax.errors import UserError, nearest
from slm_jax.models.layers import MASKED_SCORE, Dense, Mlp, RMSNorm, segment_mask
from slm_jax.models.subsampling import ConvSubsampling

ACTIVATION_AXES = ("activation_batch", "activation_length", "activation_embed")


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Sizes and switches of the encoder.

    Attributes:
      layers, dim, heads: of the Conformer stack.
      ffn_multiplier: hidden features of each half-step FFN, as a multiple of `dim`.
      conv_kernel: taps of the depthwise convolution, an odd number.
      attention: `full` sees the whole segment; `local` sees `left_context` frames back and `right_context`
        ahead; `chunk` sees its own chunk of `chunk_frames`, counted from the segment's start, and
        `left_chunks` chunks before it.
      norm: `block` ends each layer in a norm, as published; `final` has one after the last layer instead,
        with which a small encoder learns faster.
      logit_cap: scores s become cap * tanh(s / cap); None leaves them.
      subsampling_channels: output channels of the two stride-2 convolutions.
      log_mel: the front end's features.
      dropout: rate where the encoder itself is trained.
      dtype: of computation; norms and softmax stay float32.
      remat: `full` recomputes each layer in the backward pass.
      scan_unroll: layers per iteration of the scan; more compile longer and may run faster.
    """

    layers: int = 4
    dim: int = 128
    heads: int = 4
    ffn_multiplier: int = 4
    conv_kernel: int = 5
    attention: Literal["full", "local", "chunk"] = "full"
    left_context: int = 128
    right_context: int = 128
    chunk_frames: int = 200
    left_chunks: int = 0
    norm: Literal["block", "final"] = "block"
    logit_cap: float | None = None
    subsampling_channels: tuple[int, int] = (128, 32)
    log_mel: LogMelConfig = dataclasses.field(default_factory=LogMelConfig)
    dropout: float = 0.0
    dtype: str = "float32"
    remat: Literal["none", "full"] = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        # Lists (from JSON) become tuples, so that configurations stay hashable.
        object.__setattr__(self, "subsampling_channels", tuple(self.subsampling_channels))
        if self.dim % self.heads:
            raise UserError(f"ConformerConfig.heads is {self.heads}, which does not divide dim {self.dim}")
        if self.dim % 2:
            raise UserError(f"ConformerConfig.dim is {self.dim}; sinusoidal positions need an even one")
        if self.conv_kernel % 2 == 0:
            raise UserError(f"ConformerConfig.conv_kernel is {self.conv_kernel}; expected an odd number")
        for name, choices in (
            ("attention", ("full", "local", "chunk")),
            ("norm", ("block", "final")),
            ("remat", ("none", "full")),
        ):
            if (found := getattr(self, name)) not in choices:
                raise UserError(f"ConformerConfig.{name} is {found!r}{nearest(found, choices)}")


_PRESETS = {
    "tiny": ConformerConfig(
        layers=4,
        dim=128,
        heads=4,
        conv_kernel=15,
        norm="final",
        subsampling_channels=(16, 16),
        # Measured on the embedded corpus, all bins together.
        log_mel=LogMelConfig(mean=-2.2, stddev=1.7),
    ),
    "600m": ConformerConfig(layers=24, dim=1024, heads=8),
    "2b": ConformerConfig(layers=32, dim=1536, heads=16),
}


def preset(name: str, **overrides: Any) -> ConformerConfig:
    """The configuration of a published size, with the fields in `overrides` replaced.

    `600m` and `2b` are USM's, `tiny` is for tests and the demo.

    Raises:
      UserError: there is no such preset.
    """
    if name not in _PRESETS:
        raise UserError(f"there is no Conformer preset {name!r}{nearest(name, _PRESETS)}")
    return dataclasses.replace(_PRESETS[name], **overrides)


class ConformerEncoder(nn.Module):
    """Speech in slots of rows to frames; a packed utterance gets the frames that it gets alone."""

    config: ConformerConfig

    @property
    def samples_per_frame(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        return self.config.log_mel.hop_samples * 2 ** len(self.config.subsampling_channels)

    @property
    def dim(self) -> int:
        """Features D of a frame."""
        return self.config.dim

    @property
    def packs(self) -> bool:
        """Whether a slot may hold several utterances."""
        return True

    def __call__(
        self, speech: jax.Array, speech_segments: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms.

        Args:
          speech: int16 [B, K, S]; S is a multiple of `samples_per_frame`.
          speech_segments: int32 [B, K, E, 3], per utterance: example number (0 = absent), first sample (a
            multiple of `samples_per_frame`), samples.
          deterministic: False applies dropout (rng `dropout`).

        Returns:
          [B, K, F, D] frames of the compute dtype, zero outside segments, and int32 [B, K, F] segment ids.

        Raises:
          ValueError: S is no multiple of `samples_per_frame`.
        """
        mel, mel_segment_ids = self.features(speech, speech_segments)
        return self.encode_features(mel, mel_segment_ids, deterministic=deterministic)

    def features(self, speech: jax.Array, speech_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel float32 [B, K, T, M] and int32 [B, K, T] segment ids; arguments as of the call."""
        if speech.shape[-1] % self.samples_per_frame:
            raise ValueError(
                f"speech has {speech.shape[-1]} samples, no multiple of the frame's {self.samples_per_frame}"
            )
        return log_mel(speech, speech_segments, self.config.log_mel)

    @nn.compact
    def encode_features(
        self, mel: jax.Array, mel_segment_ids: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes what `features` gives (masked or augmented at will); results as of the call."""
        config = self.config
        slots = mel.shape[:2]
        mel_BTM, ids_BT = mel.reshape(-1, *mel.shape[2:]), mel_segment_ids.reshape(-1, mel.shape[2])
        subsampling = ConvSubsampling(
            config.dim, config.subsampling_channels, dtype=config.dtype, name="subsampling"
        )
        x_BFD, ids_BF = subsampling(mel_BTM, ids_BT)
        x_BFD = nn.Dropout(config.dropout)(x_BFD, deterministic=deterministic)
        x_BFD = with_logical_constraint(x_BFD, ACTIVATION_AXES)

        layer = ConformerLayer
        if config.remat == "full":
            # Inside a scan nothing can be merged with its recomputation, so no barrier is needed.
            layer = nn.remat(layer, prevent_cse=False)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.layers,
            unroll=config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BFD, _ = stack(config, deterministic, name="layers")(x_BFD, _surroundings(ids_BF, config))
        if config.norm == "final":
            x_BFD = RMSNorm(dtype=config.dtype, name="norm")(x_BFD)
        x_BFD = jnp.where((ids_BF > 0)[..., None], x_BFD, 0)
        return x_BFD.reshape(*slots, *x_BFD.shape[1:]), ids_BF.reshape(*slots, -1)


class Surroundings(NamedTuple):
    """What each frame may see; the same for all layers.

    mask_BHFG: bool [B, 1, F, G], frames to attend to. near_BFW: bool [B, F, W], taps of the depthwise
    convolution that lie in the frame's segment. positions_PD: sinusoids of distances F-1 to -(F-1).
    """

    mask_BHFG: jax.Array
    near_BFW: jax.Array
    positions_PD: jax.Array


def _surroundings(ids_BF: jax.Array, config: ConformerConfig) -> Surroundings:
    half = config.conv_kernel // 2
    frames = ids_BF.shape[1]
    padded = jnp.pad(ids_BF, ((0, 0), (half, half)))
    near = [(padded[:, w : w + frames] == ids_BF) & (ids_BF > 0) for w in range(config.conv_kernel)]
    # Not NumPy's: an exported model leaves the number of frames open.
    positions_PD = sinusoids(frames - 1 - jnp.arange(2 * frames - 1), config.dim).astype(config.dtype)
    return Surroundings(attention_mask(ids_BF, config), jnp.stack(near, axis=-1), positions_PD)


def attention_mask(ids_BF: jax.Array, config: ConformerConfig) -> jax.Array:
    """Which frames G each frame F may attend to: bool [B, 1, F, G], by segment and `config.attention`."""
    mask_BHFG = segment_mask(ids_BF, ids_BF)
    if config.attention == "local":
        frame = jnp.arange(ids_BF.shape[1])
        ahead_FG = frame[None, :] - frame[:, None]
        return mask_BHFG & ((ahead_FG >= -config.left_context) & (ahead_FG <= config.right_context))
    if config.attention == "chunk":
        first_BF = jnp.argmax(mask_BHFG[:, 0], axis=-1)
        chunk_BF = (jnp.arange(ids_BF.shape[1]) - first_BF) // config.chunk_frames
        back_BFG = chunk_BF[:, :, None] - chunk_BF[:, None, :]
        return mask_BHFG & ((back_BFG >= 0) & (back_BFG <= config.left_chunks))[:, None]
    return mask_BHFG


def sinusoids(distances_P: jax.Array | np.ndarray, dim: int) -> jax.Array:
    """Transformer-XL's encoding of signed distances: float32 [P, dim], sines then cosines."""
    rates = np.exp(-np.log(10_000.0) * np.arange(0, dim, 2) / dim)
    angles = jnp.asarray(distances_P, jnp.float32)[:, None] * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ConformerLayer(nn.Module):
    """Half-step FFN, attention, convolution, half-step FFN, norm; [B, F, D] to [B, F, D]."""

    config: ConformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BFD: jax.Array, around: Surroundings) -> tuple[jax.Array, None]:
        config, dtype = self.config, self.config.dtype

        def drop(y_BFD: jax.Array) -> jax.Array:
            return nn.Dropout(config.dropout)(y_BFD, deterministic=self.deterministic)

        def half_step(name: str) -> jax.Array:
            y_BFD = RMSNorm(dtype=dtype, name=f"{name}_norm")(x_BFD)
            ffn = Mlp(
                config.ffn_multiplier * config.dim,
                activation="silu",
                gated=False,
                dropout=config.dropout,
                dtype=dtype,
                name=name,
            )
            return 0.5 * drop(ffn(y_BFD, deterministic=self.deterministic))

        x_BFD = x_BFD + half_step("ffn_start")
        y_BFD = RMSNorm(dtype=dtype, name="attention_norm")(x_BFD)
        attention = RelativeAttention(config, self.deterministic, name="attention")
        x_BFD = x_BFD + drop(attention(y_BFD, around))
        y_BFD = RMSNorm(dtype=dtype, name="conv_norm")(x_BFD)
        x_BFD = x_BFD + drop(ConvModule(config, name="conv")(y_BFD, around.near_BFW))
        x_BFD = x_BFD + half_step("ffn_end")
        if config.norm == "block":
            x_BFD = RMSNorm(dtype=dtype, name="norm")(x_BFD)
        return with_logical_constraint(x_BFD, ACTIVATION_AXES), None


class RelativeAttention(nn.Module):
    """Multi-head self-attention with Transformer-XL's relative positions; [B, F, D] to [B, F, D]."""

    config: ConformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BFD: jax.Array, around: Surroundings) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        heads, head_dim = config.heads, config.dim // config.heads

        def project(x: jax.Array, name: str) -> jax.Array:
            return Dense((heads, head_dim), ("embed", "heads", "kv"), dtype=dtype, name=name)(x)

        def bias(name: str) -> jax.Array:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "kv"))
            return jnp.asarray(self.param(name, zeros, (heads, head_dim)), dtype)

        axes = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
        query_BFHC, key_BGHC, value_BGHC = (
            with_logical_constraint(project(x_BFD, name), axes) for name in ("query", "key", "value")
        )
        position_PHC = project(around.positions_PD, "position")
        by_content = jnp.einsum(
            "bfhc,bghc->bhfg",
            query_BFHC + bias("content_bias"),
            key_BGHC,
            preferred_element_type=jnp.float32,
        )
        by_position = jnp.einsum(
            "bfhc,phc->bhfp",
            query_BFHC + bias("position_bias"),
            position_PHC,
            preferred_element_type=jnp.float32,
        )
        scores_BHFG = (by_content + relative_shift(by_position)) * head_dim**-0.5
        if config.logit_cap is not None:
            scores_BHFG = config.logit_cap * jnp.tanh(scores_BHFG / config.logit_cap)
        scores_BHFG = jnp.where(around.mask_BHFG, scores_BHFG, MASKED_SCORE)
        weights_BHFG = jax.nn.softmax(scores_BHFG, axis=-1).astype(dtype)
        weights_BHFG = nn.Dropout(config.dropout)(weights_BHFG, deterministic=self.deterministic)
        mixed_BFHC = jnp.einsum("bhfg,bghc->bfhc", weights_BHFG, value_BGHC)
        out = Dense(config.dim, ("heads", "kv", "embed"), contracted=2, dtype=dtype, name="out")
        return out(with_logical_constraint(mixed_BFHC, axes))


def relative_shift(scores_BHFP: jax.Array) -> jax.Array:
    """From scores per distance, [B, H, F, 2F-1] with F-1 first, to scores per key, [B, H, F, G]."""
    frames = scores_BHFP.shape[2]
    # Row f needs the columns from F-1-f on: in rows one longer, read as rows of the old length from
    # F-1 on, each starts one column earlier than the one before. No gather is needed.
    flat = jnp.pad(scores_BHFP, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(*scores_BHFP.shape[:2], -1)
    flat = flat[..., frames - 1 : frames - 1 + frames * (2 * frames - 1)]
    return flat.reshape(scores_BHFP.shape)[..., :frames]


class ConvModule(nn.Module):
    """Gated linear unit, depthwise convolution inside the segment, norm, swish, linear; [B, F, D] to same."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BFD: jax.Array, near_BFW: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        taps, half = config.conv_kernel, config.conv_kernel // 2
        value_BFD = Dense(config.dim, ("embed", "mlp"), dtype=dtype, name="value")(x_BFD)
        gate_BFD = Dense(config.dim, ("embed", "mlp"), dtype=dtype, name="gate")(x_BFD)
        y_BFD = value_BFD * nn.sigmoid(gate_BFD)
        init = nn.with_logical_partitioning(nn.initializers.normal(taps**-0.5), ("conv_kernel", "mlp"))
        kernel_WD = jnp.asarray(self.param("depthwise", init, (taps, config.dim)), dtype)
        padded = jnp.pad(y_BFD, ((0, 0), (half, half), (0, 0)))
        y_BFD = sum(
            jnp.where(near_BFW[..., w, None], padded[:, w : w + x_BFD.shape[1]], 0) * kernel_WD[w]
            for w in range(taps)
        )
        y_BFD = with_logical_constraint(y_BFD, ("activation_batch", "activation_length", "activation_mlp"))
        y_BFD = nn.silu(RMSNorm(dtype=dtype, name="norm")(y_BFD))
        return Dense(config.dim, ("mlp", "embed"), dtype=dtype, name="out")(y_BFD)
