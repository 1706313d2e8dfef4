"""wav2vec 2.0 and HuBERT, the large variety: waveform in, 20 ms frames out, one utterance per slot.

The variety has a layer norm after each convolution of the front end and before each part of a transformer
layer (transformers' `feat_extract_norm="layer"`, `do_stable_layer_norm=True`): HuBERT large and xlarge,
wav2vec 2.0 large lv60, XLS-R, MMS. References: arXiv 2006.11477, 2106.07447, 2111.09296, 2305.13516.

Shape suffixes: B rows (slots folded in), K slots, S samples, E segments, L positions of a convolution, F
frames, D features, W kernel taps, I features of a group, O output features.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from slm_jax.audio.log_mel import frame_segments
from slm_jax.audio.waveform import normalized_utterance, utterance
from slm_jax.errors import UserError, check_whole, nearest
from slm_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    LayerNorm,
    PreNormTransformer,
    convolve,
    segment_mask,
)
from slm_jax.models.remat import REMAT

ACTIVATION_AXES = ("activation_batch", "activation_length", "activation_embed")


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes and switches of the encoder; the defaults are those of HuBERT large and wav2vec 2.0 large.

    Attributes:
      layers, dim, heads: of the transformer.
      mlp_dim: hidden features of its MLP.
      conv_dims, conv_kernels, conv_strides: features, taps and stride of each convolution of the front end.
      conv_bias: whether these have a bias.
      position_kernel, position_groups: taps and groups of the convolution that tells positions.
      activation: of the MLP, a name of `layers.ACTIVATIONS`.
      conv_activation: the same, of all convolutions.
      norm_epsilon: of the layer norms but those of the front end, which have 1e-5.
      normalize: whether each utterance is brought to zero mean and unit variance, `do_normalize` of the
        published `preprocessor_config.json`.
      published_as: which of the two families the weights were published in. The network is the same.
      dropout: rate where the encoder itself is trained.
      dtype: of computation; norms and softmax stay float32.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
      scan_unroll: layers per iteration of the scan; more compile longer and may run faster.
    """

    layers: int = 24
    dim: int = 1024
    heads: int = 16
    mlp_dim: int = 4096
    conv_dims: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = True
    position_kernel: int = 128
    position_groups: int = 16
    activation: str = "gelu_exact"
    conv_activation: str = "gelu_exact"
    norm_epsilon: float = 1e-5
    normalize: bool = True
    published_as: Literal["hubert", "wav2vec2"] = "hubert"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        for name in (
            "layers",
            "dim",
            "heads",
            "mlp_dim",
            "position_kernel",
            "position_groups",
            "scan_unroll",
        ):
            check_whole(f"Wav2Vec2Config.{name}", getattr(self, name))
        for name in ("conv_dims", "conv_kernels", "conv_strides"):
            # Lists (from JSON) become tuples, so that configurations stay hashable.
            object.__setattr__(self, name, values := tuple(getattr(self, name)))
            for value in values:
                check_whole(f"a number of Wav2Vec2Config.{name}", value)
            if len(values) != len(self.conv_dims) or not values:
                raise UserError(
                    f"Wav2Vec2Config.{name} has {len(values)} numbers, expected one per convolution, "
                    f"{len(self.conv_dims)} as conv_dims has"
                )
        for name in ("heads", "position_groups"):
            if self.dim % (found := getattr(self, name)):
                raise UserError(f"Wav2Vec2Config.{name} is {found}, which does not divide dim {self.dim}")
        choices = {
            "activation": tuple(ACTIVATIONS),
            "conv_activation": tuple(ACTIVATIONS),
            "published_as": ("hubert", "wav2vec2"),
            "remat": REMAT,
        }
        for name, allowed in choices.items():
            if (found := getattr(self, name)) not in allowed:
                raise UserError(f"Wav2Vec2Config.{name} is {found!r}{nearest(found, allowed)}")

    @property
    def stride(self) -> int:
        """Samples from the start of a frame to the start of the next; 320 in all published sizes."""
        return math.prod(self.conv_strides)

    @property
    def receptive_field(self) -> int:
        """Samples that a frame of the front end sees; 400 in all published sizes."""
        samples = 1
        for taps, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            samples = (samples - 1) * stride + taps
        return samples


_LARGE = Wav2Vec2Config()
_PRESETS = {
    "hubert_large": _LARGE,
    "hubert_xlarge": dataclasses.replace(_LARGE, layers=48, dim=1280, mlp_dim=5120),
    "wav2vec2_large_lv60": dataclasses.replace(_LARGE, published_as="wav2vec2"),
    "xls_r_300m": dataclasses.replace(_LARGE, published_as="wav2vec2"),
    "xls_r_1b": dataclasses.replace(_LARGE, layers=48, dim=1280, mlp_dim=5120, published_as="wav2vec2"),
    "xls_r_2b": dataclasses.replace(_LARGE, layers=48, dim=1920, mlp_dim=7680, published_as="wav2vec2"),
    "mms_300m": dataclasses.replace(_LARGE, published_as="wav2vec2"),
    "mms_1b": dataclasses.replace(_LARGE, layers=48, dim=1280, mlp_dim=5120, published_as="wav2vec2"),
}


def preset(name: str, **overrides: Any) -> Wav2Vec2Config:
    """The configuration of a published size, with the fields in `overrides` replaced.

    Raises:
      UserError: there is no such preset.
    """
    if name not in _PRESETS:
        raise UserError(f"there is no wav2vec 2.0 preset {name!r}{nearest(name, _PRESETS)}")
    return dataclasses.replace(_PRESETS[name], **overrides)


class Wav2Vec2Encoder(nn.Module):
    """Speech in slots of rows to frames; a slot holds one utterance, from sample 0.

    The front end's convolutions are not padded: an utterance of n samples has floor((n - receptive field) /
    stride) + 1 frames, one or two fewer than the `ceil(n / stride)` that other encoders give. The frames that
    it lacks are zero and of segment 0.
    """

    config: Wav2Vec2Config

    @property
    def samples_per_frame(self) -> int:
        """Samples from the start of a frame to the start of the next."""
        return self.config.stride

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
        """Whether `features` are mel bins over time, which SpecAugment masks; here they are the waveform."""
        return False

    @property
    def packs(self) -> bool:
        """Whether a slot may hold several utterances."""
        return False

    def __call__(
        self, speech: jax.Array, speech_segments: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms.

        Args:
          speech: int16 [B, K, S]; S is a multiple of `samples_per_frame`.
          speech_segments: int32 [B, K, 1, 3], of the utterance: example number (0 = absent), first sample
            (0), samples.
          deterministic: False applies dropout (rng `dropout`).

        Returns:
          [B, K, F, D] frames of the compute dtype, zero where the utterance has none, and int32 [B, K, F]
          segment ids, with F = S / `samples_per_frame`.

        Raises:
          ValueError: S is no multiple of `samples_per_frame`, or a slot holds more than one utterance.
        """
        features, feature_segment_ids = self.features(speech, speech_segments)
        return self.encode_features(features, feature_segment_ids, deterministic=deterministic)

    def features(self, speech: jax.Array, speech_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Waveform float32 [B, K, S], normalised, and int32 [B, K, S] segment ids; arguments as of call."""
        if speech.shape[-1] % self.samples_per_frame:
            raise ValueError(
                f"speech has {speech.shape[-1]} samples, no multiple of the frame's {self.samples_per_frame}"
            )
        if speech_segments.shape[-2] != 1:
            raise ValueError(
                f"a slot holds {speech_segments.shape[-2]} utterances; wav2vec 2.0 takes one, from sample 0"
            )
        segment_ids, _ = frame_segments(speech_segments, speech.shape[-1], 1)
        samples = jnp.where(speech_segments[..., 0, 0] > 0, speech_segments[..., 0, 2], 0)
        prepare = normalized_utterance if self.config.normalize else utterance
        return prepare(speech, samples), segment_ids

    @nn.compact
    def encode_features(
        self, features: jax.Array, feature_segment_ids: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes what `features` gives; results as of the call."""
        config = self.config
        slots, samples = features.shape[:2], features.shape[-1]
        ids_BF = self._frame_ids(feature_segment_ids.reshape(-1, samples))
        x_BFD = FrontEnd(config, name="front_end")(features.reshape(-1, samples))

        def drop(y_BFD: jax.Array) -> jax.Array:
            return nn.Dropout(config.dropout)(y_BFD, deterministic=deterministic)

        x_BFD = drop(Dense(config.dim, ("mlp", "embed"), use_bias=True, dtype=config.dtype, name="in")(x_BFD))
        x_BFD = jnp.where((ids_BF > 0)[..., None], x_BFD, 0)
        x_BFD = drop(x_BFD + PositionConv(config, name="position")(x_BFD))
        x_BFD = with_logical_constraint(x_BFD, ACTIVATION_AXES)
        encoder = PreNormTransformer(
            layers=config.layers,
            num_heads=config.heads,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            dropout=config.dropout,
            remat=config.remat,
            scan_unroll=config.scan_unroll,
            dtype=config.dtype,
            name="encoder",
        )
        x_BFD = encoder(x_BFD, segment_mask(ids_BF, ids_BF), deterministic)
        x_BFD = jnp.where((ids_BF > 0)[..., None], x_BFD, 0)
        return x_BFD.reshape(*slots, *x_BFD.shape[1:]), ids_BF.reshape(*slots, -1)

    def _frame_ids(self, ids_BS: jax.Array) -> jax.Array:
        """The segment id of each frame, int32 [B, F]: 0 where its last sample lies behind the utterance."""
        beyond = self.config.receptive_field - 1
        ids_BS = jnp.pad(ids_BS, ((0, 0), (0, beyond)))
        return ids_BS[:, beyond :: self.config.stride]


class FrontEnd(nn.Module):
    """Strided convolutions over the waveform, each with layer norm and activation, then a layer norm.

    Args of the call:
      wave_BS: float32 [B, S]; S is a multiple of the stride.

    Returns:
      [B, F, D] with F = S / stride; zeros follow the waveform, so that the last frames see them.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, wave_BS: jax.Array) -> jax.Array:
        config = self.config
        samples = wave_BS.shape[1]
        # As many samples as give S / stride frames; fewer than S where kernels leave samples between them.
        beyond = config.receptive_field - config.stride
        x_BLD = jnp.pad(wave_BS, ((0, 0), (0, max(beyond, 0))))[:, : samples + beyond, None]
        for index, (dim, taps, stride) in enumerate(
            zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True)
        ):
            conv = Conv(
                dim,
                taps,
                ("conv_kernel", "conv_in", "conv_out"),
                stride=stride,
                use_bias=config.conv_bias,
                dtype=config.dtype,
                name=f"conv_{index}",
            )
            x_BLD = LayerNorm(dtype=config.dtype, name=f"norm_{index}")(conv(x_BLD))
            x_BLD = ACTIVATIONS[config.conv_activation](x_BLD)
            x_BLD = with_logical_constraint(x_BLD, ("activation_batch", "activation_length", None))
        return LayerNorm(config.norm_epsilon, dtype=config.dtype, name="norm")(x_BLD)


class PositionConv(nn.Module):
    """A wide grouped convolution that tells where a frame is; [B, F, D] to the same.

    Its kernel is weight-normed (https://arxiv.org/abs/1602.07868) per tap: `direction` has the kernel's shape
    and `length` one number per tap. Both are parameters, as in published checkpoints.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BFD: jax.Array) -> jax.Array:
        config = self.config
        taps, inputs = config.position_kernel, config.dim // config.position_groups
        stddev = 2 / math.sqrt(taps * config.dim)
        direction_WIO = self.param(
            "direction",
            nn.with_logical_partitioning(nn.initializers.normal(stddev), ("conv_kernel", "conv_in", "embed")),
            (taps, inputs, config.dim),
            jnp.float32,
        )
        # A fresh kernel is about as large as its direction.
        length = nn.initializers.constant(stddev * math.sqrt(inputs * config.dim))
        length_W = self.param("length", nn.with_logical_partitioning(length, ("conv_kernel",)), (taps,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        bias_D = self.param("bias", zeros, (config.dim,), jnp.float32)
        direction_WIO = jnp.asarray(direction_WIO, jnp.float32)
        norm_W11 = jnp.sqrt(jnp.sum(jnp.square(direction_WIO), axis=(1, 2), keepdims=True))
        kernel_WIO = direction_WIO * (jnp.asarray(length_W, jnp.float32)[:, None, None] / norm_W11)
        y_BFD = convolve(
            x_BFD,
            kernel_WIO.astype(config.dtype),
            # An even kernel reaches one frame further back than ahead.
            padding=(taps // 2, (taps - 1) // 2),
            groups=config.position_groups,
        )
        return ACTIVATIONS[config.conv_activation](y_BFD + jnp.asarray(bias_D, config.dtype))
