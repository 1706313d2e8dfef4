"""The Conformer speech encoder: waveform in, frames out, aware of packed segments.

One network serves USM's sizes, Gemma 3n's audio tower and w2v-BERT 2.0 by configuration.

References: Conformer, arXiv 2005.08100; USM, arXiv 2303.01037; w2v-BERT 2.0, arXiv 2312.05187; transformers'
`Gemma3nAudioEncoder` and `Wav2Vec2BertModel`.

Shape suffixes: B rows (slots folded in), K slots, S samples, E segments, T mel frames, M mel bins, F frames
(as queries F, as keys G), P relative distances, D features, H heads, W kernel taps.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from slm_jax.audio.kaldi_fbank import KaldiFbankConfig, kaldi_fbank
from slm_jax.audio.log_mel import LogMelConfig, log_mel
from slm_jax.errors import UserError, nearest
from slm_jax.models.conformer_attention import (
    CONFORMER_KERNELS,
    POSITIONS,
    Positions,
    RelativeAttention,
    attention_mask_of,
    position_inputs,
)
from slm_jax.models.layers import ACTIVATIONS, Dense, Mlp
from slm_jax.models.norms import NORM_TYPES, NormType, feature_norm
from slm_jax.models.remat import REMAT, kept_when_frozen, rematted
from slm_jax.models.shards import by_shard
from slm_jax.models.subsampling import ConvSubsampling, FeatureProjection

ACTIVATION_AXES = ("activation_batch", "activation_length", "activation_embed")


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Sizes and switches of the encoder.

    Attributes:
      layers, dim, heads: of the Conformer stack.
      ffn_multiplier: hidden features of each half-step FFN, as a multiple of `dim`.
      ffn_dim: the same as a number; None leaves it to `ffn_multiplier`.
      activation: of the FFNs and the convolution, a name of `layers.ACTIVATIONS`.
      use_bias: in the linear maps of FFNs and attention.
      conv_kernel: taps of the depthwise convolution, an odd number unless it is causal.
      conv_padding: `same` sees as many frames ahead as back, `causal` none ahead.
      conv_gate: the gated linear unit has `separate` kernels, or one `joined`, as in published checkpoints.
      attention: `full` sees the whole segment; `local` sees `left_context` frames back and `right_context`
        ahead; `chunk` sees its own chunk of `chunk_frames`, counted from the segment's start, and
        `left_chunks` chunks before it.
      positions, left_positions, right_positions, query_scale: see `RelativeAttention`.
      norm: `block` ends each layer in a norm, as published; `final` has one after the last layer instead,
        with which a small encoder learns faster.
      norm_type: `rms`, or `layer` with mean and bias; `norm_epsilon` is added to its variance.
      post_norm: FFNs and attention end in a norm, too, before they join the residual.
      residual_weight: factor of an FFN's output.
      clip: bound of the values before and after FFNs and attention, after the depthwise convolution and
        before a layer's last norm; None sets none.
      logit_cap: scores s become cap * tanh(s / cap); None leaves them.
      front_end: which features, `log_mel` or `kaldi_fbank`; the fields so named configure them.
      subsampling: `centred` and `ahead` convolve with stride 2 (see `ConvSubsampling`), `projection` has
        a norm and a linear map and leaves the frames' rate.
      subsampling_channels: output channels of the two stride-2 convolutions.
      subsampling_epsilon: of the norm in `ahead`.
      attention_kernel: which kernel computes attention; see `conformer_attention.RelativeAttention`.
      dropout: rate where the encoder itself is trained.
      dtype: of computation; norms and softmax stay float32.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
      scan_unroll: layers per iteration of the scan; more compile longer and may run faster.
    """

    layers: int = 4
    dim: int = 128
    heads: int = 4
    ffn_multiplier: int = 4
    ffn_dim: int | None = None
    activation: str = "silu"
    use_bias: bool = False
    conv_kernel: int = 5
    conv_padding: Literal["same", "causal"] = "same"
    conv_gate: Literal["separate", "joined"] = "separate"
    attention: Literal["full", "local", "chunk"] = "full"
    left_context: int = 128
    right_context: int = 128
    chunk_frames: int = 200
    left_chunks: int = 0
    positions: Positions = "transformer_xl"
    left_positions: int = 64
    right_positions: int = 8
    query_scale: Literal["constant", "per_dim"] = "constant"
    norm: Literal["block", "final"] = "block"
    norm_type: NormType = "rms"
    norm_epsilon: float = 1e-6
    post_norm: bool = False
    residual_weight: float = 0.5
    clip: float | None = None
    logit_cap: float | None = None
    front_end: Literal["log_mel", "kaldi_fbank"] = "log_mel"
    subsampling: Literal["centred", "ahead", "projection"] = "centred"
    subsampling_epsilon: float = 1e-3
    subsampling_channels: tuple[int, int] = (128, 32)
    log_mel: LogMelConfig = dataclasses.field(default_factory=LogMelConfig)
    kaldi_fbank: KaldiFbankConfig = dataclasses.field(default_factory=KaldiFbankConfig)
    attention_kernel: str = "plain"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        # Lists (from JSON) become tuples, so that configurations stay hashable.
        object.__setattr__(self, "subsampling_channels", tuple(self.subsampling_channels))
        if self.dim % self.heads:
            raise UserError(f"ConformerConfig.heads is {self.heads}, which does not divide dim {self.dim}")
        if self.dim % 2 and self.positions in ("transformer_xl", "usm"):
            raise UserError(f"ConformerConfig.dim is {self.dim}; sinusoidal positions need an even one")
        if self.conv_kernel % 2 == 0 and self.conv_padding == "same":
            raise UserError(f"ConformerConfig.conv_kernel is {self.conv_kernel}; expected an odd number")
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("conv_padding", ("same", "causal")),
            ("conv_gate", ("separate", "joined")),
            ("attention", ("full", "local", "chunk")),
            ("positions", POSITIONS),
            ("query_scale", ("constant", "per_dim")),
            ("norm", ("block", "final")),
            ("norm_type", NORM_TYPES),
            ("front_end", ("log_mel", "kaldi_fbank")),
            ("subsampling", ("centred", "ahead", "projection")),
            ("remat", REMAT),
            ("attention_kernel", CONFORMER_KERNELS),
        ):
            if (found := getattr(self, name)) not in choices:
                raise UserError(f"ConformerConfig.{name} is {found!r}{nearest(found, choices)}")

    @property
    def conv_reach(self) -> tuple[int, int]:
        """How many frames the depthwise convolution sees back and ahead."""
        half = self.conv_kernel // 2
        return (half, half) if self.conv_padding == "same" else (self.conv_kernel - 1, 0)

    @property
    def samples_per_frame(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        if self.front_end == "kaldi_fbank":
            step = self.kaldi_fbank.hop_samples * self.kaldi_fbank.stack
        else:
            step = self.log_mel.hop_samples
        return step if self.subsampling == "projection" else step * 2 ** len(self.subsampling_channels)


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
    "gemma3n": ConformerConfig(
        layers=12,
        dim=1536,
        heads=8,
        conv_padding="causal",
        conv_gate="joined",
        attention="local",
        left_context=12,
        right_context=0,
        # The block in which transformers computes the window; the frames do not depend on it.
        chunk_frames=12,
        positions="usm",
        query_scale="per_dim",
        post_norm=True,
        clip=1e10,
        logit_cap=50.0,
        log_mel=LogMelConfig(padded_to=128),
        subsampling="ahead",
    ),
    "w2v_bert": ConformerConfig(
        layers=24,
        dim=1024,
        heads=16,
        ffn_dim=4096,
        use_bias=True,
        conv_kernel=31,
        conv_padding="causal",
        conv_gate="joined",
        positions="shaw",
        norm_type="layer",
        norm_epsilon=1e-5,
        front_end="kaldi_fbank",
        subsampling="projection",
    ),
}


def preset(name: str, **overrides: Any) -> ConformerConfig:
    """The configuration of a published size, with the fields in `overrides` replaced.

    `600m` and `2b` are USM's, `gemma3n` is the audio tower of google/gemma-3n-E2B and -E4B (whose language
    model takes every fourth frame), `w2v_bert` is facebook/w2v-bert-2.0, `tiny` is for tests and the demo.

    Raises:
      UserError: there is no such preset.
    """
    if name not in _PRESETS:
        raise UserError(f"there is no Conformer preset {name!r}{nearest(name, _PRESETS)}")
    return dataclasses.replace(_PRESETS[name], **overrides)


class ConformerEncoder(nn.Module):
    """Speech in slots of rows to frames; a packed utterance gets the frames that it gets alone.

    An utterance of n samples covers `ceil(n / samples_per_frame)` frames, and in USM's sizes all of them hold
    speech. Where the published front end has no partial windows, the last of them may not exist: their
    segment id is 0, they are zero, and no other frame sees them. Of w2v-BERT 2.0's frames of 320 samples
    there are `(n - 240) // 320`, one or two fewer; of Gemma 3n's of 640 there are `ceil(m / 4)`, none or one
    fewer, with `m = (128 * ceil(n / 128) - 353) // 160`.

    All frames are returned: what a published model drops or stacks afterwards is a reducer's part.
    """

    config: ConformerConfig

    @property
    def samples_per_frame(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        return self.config.samples_per_frame

    @property
    def dim(self) -> int:
        """Features D of a frame."""
        return self.config.dim

    @property
    def longest_samples(self) -> None:
        """Most samples of a slot; None where there is no limit."""
        return None

    @property
    def features_are_mel(self) -> bool:
        """Whether `features` are mel bins over time, which SpecAugment and BEST-RQ mask."""
        return True

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
        """Features float32 [B, K, T, M] and int32 [B, K, T] segment ids; arguments as of the call."""
        if speech.shape[-1] % self.samples_per_frame:
            raise ValueError(
                f"speech has {speech.shape[-1]} samples, no multiple of the frame's {self.samples_per_frame}"
            )
        if self.config.front_end == "kaldi_fbank":
            front_end = functools.partial(kaldi_fbank, config=self.config.kaldi_fbank)
        else:
            front_end = functools.partial(log_mel, config=self.config.log_mel)
        return by_shard(front_end, ("activation_batch",), speech, speech_segments)

    @nn.compact
    def encode_features(
        self, mel: jax.Array, mel_segment_ids: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes what `features` gives (masked or augmented at will); results as of the call."""
        config = self.config
        slots = mel.shape[:2]
        mel_BTM, ids_BT = mel.reshape(-1, *mel.shape[2:]), mel_segment_ids.reshape(-1, mel.shape[2])
        x_BFD, ids_BF = self._subsampled(mel_BTM, ids_BT)
        x_BFD = nn.Dropout(config.dropout)(x_BFD, deterministic=deterministic)
        x_BFD = with_logical_constraint(x_BFD, ACTIVATION_AXES)

        stack = nn.scan(
            rematted(ConformerLayer, config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.layers,
            unroll=config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BFD, _ = stack(config, deterministic, name="layers")(x_BFD, _surroundings(ids_BF, config))
        if config.norm == "final":
            x_BFD = _norm(config, "norm")(x_BFD)
        x_BFD = jnp.where((ids_BF > 0)[..., None], x_BFD, 0)
        return x_BFD.reshape(*slots, *x_BFD.shape[1:]), ids_BF.reshape(*slots, -1)

    def _subsampled(self, mel_BTM: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features to [B, F, D] and their segment ids."""
        config = self.config
        if config.subsampling == "projection":
            projection = FeatureProjection(
                config.dim, config.norm_type, config.norm_epsilon, dtype=config.dtype, name="projection"
            )
            return projection(mel_BTM), ids_BT
        convolutions = ConvSubsampling(
            config.dim,
            config.subsampling_channels,
            taps=config.subsampling,
            epsilon=config.subsampling_epsilon,
            dtype=config.dtype,
            name="subsampling",
        )
        return convolutions(mel_BTM, ids_BT)


class Surroundings(NamedTuple):
    """What each frame may see; the same for all layers.

    mask_BHFG: bool [B, 1, F, G], frames to attend to. near_BFW: bool [B, F, W], taps of the depthwise
    convolution that lie in the frame's segment. positions_PD: distances F-1 to -(F-1), as `RelativeAttention`
    takes them.
    """

    mask_BHFG: jax.Array
    near_BFW: jax.Array
    positions_PD: jax.Array


def _surroundings(ids_BF: jax.Array, config: ConformerConfig) -> Surroundings:
    frames = ids_BF.shape[1]
    padded = jnp.pad(ids_BF, ((0, 0), config.conv_reach))
    near = [(padded[:, w : w + frames] == ids_BF) & (ids_BF > 0) for w in range(config.conv_kernel)]
    positions_PD = position_inputs(frames, config.dim, config.positions, config.dtype)
    return Surroundings(attention_mask(ids_BF, config), jnp.stack(near, axis=-1), positions_PD)


def attention_mask(ids_BF: jax.Array, config: ConformerConfig) -> jax.Array:
    """Which frames G each frame F may attend to: bool [B, 1, F, G], by segment and `config.attention`."""
    return attention_mask_of(
        ids_BF,
        config.attention,
        left_context=config.left_context,
        right_context=config.right_context,
        chunk_frames=config.chunk_frames,
        left_chunks=config.left_chunks,
    )


def _norm(config: ConformerConfig, name: str) -> nn.Module:
    return feature_norm(config.norm_type, config.norm_epsilon, config.dtype, name)


def _clip(x_BFD: jax.Array, config: ConformerConfig) -> jax.Array:
    return x_BFD if config.clip is None else jnp.clip(x_BFD, -config.clip, config.clip)


class ConformerLayer(nn.Module):
    """Half-step FFN, attention, convolution, half-step FFN, norm; [B, F, D] to [B, F, D]."""

    config: ConformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BFD: jax.Array, around: Surroundings) -> tuple[jax.Array, None]:
        config = self.config
        x_BFD = kept_when_frozen(x_BFD + config.residual_weight * self._ffn(x_BFD, "ffn_start"))
        x_BFD = kept_when_frozen(x_BFD + self._attention(x_BFD, around))
        conv = ConvModule(config, name="conv")
        y_BFD = self._drop(conv(_norm(config, "conv_norm")(x_BFD), around.near_BFW))
        x_BFD = kept_when_frozen(x_BFD + y_BFD)
        x_BFD = x_BFD + config.residual_weight * self._ffn(x_BFD, "ffn_end")
        if config.norm == "block":
            x_BFD = _norm(config, "norm")(_clip(kept_when_frozen(x_BFD), config))
        return with_logical_constraint(x_BFD, ACTIVATION_AXES), None

    def _ffn(self, x_BFD: jax.Array, name: str) -> jax.Array:
        config = self.config
        ffn = Mlp(
            config.ffn_dim or config.ffn_multiplier * config.dim,
            activation=config.activation,
            gated=False,
            dropout=config.dropout,
            use_bias=config.use_bias,
            dtype=config.dtype,
            name=name,
        )
        y_BFD = ffn(self._before(x_BFD, name), deterministic=self.deterministic)
        return self._drop(self._after(y_BFD, name))

    def _attention(self, x_BFD: jax.Array, around: Surroundings) -> jax.Array:
        config = self.config
        attention = RelativeAttention(
            config.dim,
            config.heads,
            config.positions,
            left_positions=config.left_positions,
            right_positions=config.right_positions,
            query_scale=config.query_scale,
            logit_cap=config.logit_cap,
            use_bias=config.use_bias,
            dropout=config.dropout,
            deterministic=self.deterministic,
            dtype=config.dtype,
            kernel=config.attention_kernel,
            name="attention",
        )
        y_BFD = attention(self._before(x_BFD, "attention"), around.mask_BHFG, around.positions_PD)
        return self._drop(self._after(y_BFD, "attention"))

    def _before(self, x_BFD: jax.Array, name: str) -> jax.Array:
        return _norm(self.config, f"{name}_norm")(_clip(x_BFD, self.config))

    def _after(self, y_BFD: jax.Array, name: str) -> jax.Array:
        config = self.config
        if config.clip is not None or config.post_norm:
            y_BFD = _clip(kept_when_frozen(y_BFD), config)
        return _norm(config, f"{name}_post_norm")(y_BFD) if config.post_norm else y_BFD

    def _drop(self, y_BFD: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout)(y_BFD, deterministic=self.deterministic)


class ConvModule(nn.Module):
    """Gated linear unit, depthwise convolution inside the segment, norm, activation, linear map.

    Args of the call:
      x_BFD: [B, F, D].
      near_BFW: bool [B, F, W], the taps that count.

    Returns:
      [B, F, D].
    """

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BFD: jax.Array, near_BFW: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        taps = config.conv_kernel
        if config.conv_gate == "joined":
            joined = Dense((2, config.dim), ("embed", "gates", "mlp"), dtype=dtype, name="value_gate")
            both = kept_when_frozen(joined(x_BFD))
            value_BFD, gate_BFD = both[..., 0, :], both[..., 1, :]
        else:
            value_BFD, gate_BFD = (
                kept_when_frozen(Dense(config.dim, ("embed", "mlp"), dtype=dtype, name=name)(x_BFD))
                for name in ("value", "gate")
            )
        y_BFD = value_BFD * nn.sigmoid(gate_BFD)
        init = nn.with_logical_partitioning(nn.initializers.normal(taps**-0.5), ("conv_kernel", "mlp"))
        kernel_WD = jnp.asarray(self.param("depthwise", init, (taps, config.dim)), dtype)
        padded = jnp.pad(y_BFD, ((0, 0), config.conv_reach, (0, 0)))
        y_BFD = sum(
            jnp.where(near_BFW[..., w, None], padded[:, w : w + x_BFD.shape[1]], 0) * kernel_WD[w]
            for w in range(taps)
        )
        y_BFD = kept_when_frozen(jnp.asarray(y_BFD))
        y_BFD = with_logical_constraint(y_BFD, ("activation_batch", "activation_length", "activation_mlp"))
        y_BFD = ACTIVATIONS[config.activation](_norm(config, "norm")(_clip(y_BFD, config)))
        return Dense(config.dim, ("mlp", "embed"), dtype=dtype, name="out")(y_BFD)
