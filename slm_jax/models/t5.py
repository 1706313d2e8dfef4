"""T5 (arXiv 1910.10683) as published since, with embeddings as input and masks from segments.

By configuration it is T5 v1.0, T5 v1.1 and its LM-adapted and Flan forms (2210.11416), mT5 (2010.11934), mT0
(2211.01786), ByT5 (2105.13626) and umT5 (2304.09151). Parameter names and kernel shapes follow T5X's scalable
T5; the axis of the stacked layers is axis 0.

Shape suffixes: B rows, L positions of the encoder, T decoder tokens, D features, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen.spmd import with_logical_constraint

from slm_jax.errors import UserError, check_whole, nearest
from slm_jax.models import layers
from slm_jax.models.lora import LoRAConfig
from slm_jax.models.losses import chunked_cross_entropy
from slm_jax.models.losses_by_words import HeadMatrix, frozen_head_cross_entropy, trained_head_cross_entropy
from slm_jax.models.remat import REMAT, kept_when_frozen, rematted
from slm_jax.models.shards import shards_of

RELATIVE_BIAS = ("shared", "layer")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5.

    Attributes:
      vocab_size: rows of the embedding table and columns of the logits.
      emb_dim: features of a position.
      num_heads, head_dim: of attention; their product need not be `emb_dim`.
      mlp_dim: hidden features of the MLP.
      activation: a name of `layers.ACTIVATIONS`; "gelu" is the tanh form, "gelu_exact" the one with erf.
      gated: gated MLP (v1.1, mT5) or plain (v1.0).
      tied_logits: the logits use the embedding table (v1.0).
      scale_tied_logits: tied logits are scaled by emb_dim ** -0.5.
      scale_untied_logits: so are logits that have a table of their own. No published T5 was trained so;
        transformers 5 computes umT5 that way, and so was what it fine-tuned.
      relative_bias: "shared" has one table of relative position biases per stack, that of its first layer
        (T5, mT5, ByT5); "layer" has one per layer (umT5, and T5X's scalable T5).
      relative_bias_init_std: standard deviation of a fresh relative position bias. Larger helps a small model
        trained from scratch to find positions early.
      dropout: rate of a trained T5; a frozen one runs without.
      dtype: name of the dtype of computation; parameters keep their own.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
      scan: layers run as a loop (compiles fast); False unrolls it. The parameters are the same.
      attention_kernel: which kernel computes attention; see `layers.dot_product_attention`.
      loss_chunk: most tokens of all rows whose logits exist at one time in `token_losses`.
      loss_logits: most logits of a device that do, in float32 and twice; the head is cut along its
        vocabulary where all logits are more. Memory then depends on this alone, not on `vocab_size`, but for
        the gradient of a head that trains.
    """

    vocab_size: int = 250112
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    encoder_layers: int = 8
    decoder_layers: int = 8
    activation: str = "gelu"
    gated: bool = True
    tied_logits: bool = False
    scale_tied_logits: bool = True
    scale_untied_logits: bool = False
    relative_bias: str = "shared"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_bias_init_std: float = 0.25
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention_kernel: str = "plain"
    loss_chunk: int = 1024
    loss_logits: int = 2**23

    def __post_init__(self):
        for name, choices in (
            ("activation", layers.ACTIVATIONS),
            ("relative_bias", RELATIVE_BIAS),
            ("remat", REMAT),
            ("attention_kernel", layers.ATTENTION_KERNELS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"T5Config.{name} is {value!r}{nearest(value, choices)}")
        for name in ("loss_chunk", "loss_logits"):
            check_whole(f"T5Config.{name}", getattr(self, name))


def _size(emb_dim: int, mlp_dim: int, encoder: int, decoder: int, heads: int) -> dict[str, int]:
    return {
        "emb_dim": emb_dim,
        "mlp_dim": mlp_dim,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "num_heads": heads,
    }


_V1_1 = {
    "small": _size(512, 1024, 8, 8, 6),
    "base": _size(768, 2048, 12, 12, 12),
    "large": _size(1024, 2816, 24, 24, 16),
    "xl": _size(2048, 5120, 24, 24, 32),
    "xxl": _size(4096, 10240, 24, 24, 64),
}
_V1_0 = {
    "small": _size(512, 2048, 6, 6, 8),
    "base": _size(768, 3072, 12, 12, 12),
    "large": _size(1024, 4096, 24, 24, 16),
    # Of more features in all heads together than a position has: 32 and 128 heads of 128.
    "3b": _size(1024, 16384, 24, 24, 32) | {"head_dim": 128},
    "11b": _size(1024, 65536, 24, 24, 128) | {"head_dim": 128},
}
_BYT5 = {
    "small": _size(1472, 3584, 12, 4, 6),
    "base": _size(1536, 3968, 18, 6, 12),
    "large": _size(1536, 3840, 36, 12, 16),
    "xl": _size(2560, 6720, 36, 12, 32),
    "xxl": _size(4672, 12352, 36, 12, 64),
}
_TINY = {**_size(128, 256, 3, 3, 4), "vocab_size": 1024, "head_dim": 32, "relative_bias_init_std": 0.5}
_OF_V1_0 = {"vocab_size": 32128, "gated": False, "activation": "relu", "tied_logits": True}
_OF_UMT5 = {"vocab_size": 256384, "relative_bias": "layer"}

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    **_V1_1,  # with the defaults of `T5Config`: mT5 and mT0
    **{f"t5_{name}": size | _OF_V1_0 for name, size in _V1_0.items()},
    **{f"t5_v1_1_{name}": size | {"vocab_size": 32128} for name, size in _V1_1.items()},
    **{f"flan_t5_{name}": size | {"vocab_size": 32128} for name, size in _V1_1.items()},
    **{f"umt5_{name}": _V1_1[name] | _OF_UMT5 for name in ("small", "base", "xl", "xxl")},
    **{f"byt5_{name}": size | {"vocab_size": 384} for name, size in _BYT5.items()},
}


def preset(name: str, **overrides: Any) -> T5Config:
    """Returns a published size by name, or "tiny", with the fields in `overrides` replaced.

    Args:
      name: `small` to `xxl` are mT5's and mT0's; the others say their family, such as `t5_small` (v1.0),
        `t5_v1_1_base`, `flan_t5_base` (the same shape), `umt5_xl`, `byt5_large`.

    Raises:
      UserError: no preset has that name.
    """
    if name not in _PRESETS:
        raise UserError(f"no T5 preset is called {name!r}{nearest(name, _PRESETS)}")
    return T5Config(**{**_PRESETS[name], **overrides})


def projections(config: T5Config) -> dict[str, tuple[int, int]]:
    """Returns path -> (inputs, outputs) of the maps of one layer of each stack that may get LoRA.

    A path is `encoder/attention/query`: stack, part of the layer, projection.
    """
    features, inner = config.emb_dim, config.num_heads * config.head_dim
    inward = dict.fromkeys(("query", "key", "value"), (features, inner))
    attention = inward | {"out": (inner, features)}
    hidden = ("wi_0", "wi_1") if config.gated else ("wi",)
    mlp = dict.fromkeys(hidden, (features, config.mlp_dim)) | {"wo": (config.mlp_dim, features)}
    parts = {
        "encoder/attention": attention,
        "encoder/mlp": mlp,
        "decoder/self_attention": attention,
        "decoder/encoder_decoder_attention": attention,
        "decoder/mlp": mlp,
    }
    return {f"{part}/{name}": size for part, names in parts.items() for name, size in names.items()}


def shift_within_segments(
    targets_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array | None = None
) -> jax.Array:
    """Returns the decoder's input, int32 [B, T]: the token before, or 0 where a segment starts.

    A segment starts where its id changes and, if positions are given, where the position is 0.
    """
    before_BT = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))
    segment_before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    inside_BT = (segment_ids_BT == segment_before_BT) & (segment_ids_BT != 0)
    if positions_BT is not None:
        inside_BT &= positions_BT != 0
    return jnp.where(inside_BT, before_BT, 0)


def _constrain(x_BLD: jax.Array) -> jax.Array:
    return with_logical_constraint(x_BLD, ("activation_batch", "activation_length", "activation_embed"))


_Positions = tuple[jax.Array, jax.Array]  # int32 [Q] of the queries, [K] of the keys


class _Layer(nn.Module):
    """What the layers of both stacks share: their parts, from the configuration."""

    stack: ClassVar[str]
    config: T5Config
    deterministic: bool
    lora: LoRAConfig | None

    def bias(self, shared: jax.Array | None, positions: _Positions, bidirectional: bool) -> jax.Array:
        """The bias of self-attention: that of all layers, or where there is none, this layer's own."""
        if shared is None:
            return _relative_bias(self.config, bidirectional)(*positions)
        return shared

    def norm(self, name: str) -> layers.RMSNorm:
        return layers.RMSNorm(self.config.norm_epsilon, dtype=jnp.dtype(self.config.dtype), name=name)

    def attention(self, name: str, cache: str = "none", cache_length: int = 0) -> layers.MultiHeadAttention:
        return layers.MultiHeadAttention(
            num_heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            dropout=self.config.dropout,
            dtype=jnp.dtype(self.config.dtype),
            cache=cache,
            cache_length=cache_length,
            kernel=self.config.attention_kernel,
            lora=self.products_of(name),
            name=name,
        )

    def mlp(self) -> layers.Mlp:
        return layers.Mlp(
            hidden_dim=self.config.mlp_dim,
            activation=self.config.activation,
            gated=self.config.gated,
            dropout=self.config.dropout,
            dtype=jnp.dtype(self.config.dtype),
            lora=self.products_of("mlp"),
            name="mlp",
        )

    def products_of(self, module: str) -> FrozenDict[str, LoRAConfig]:
        """The low-rank products of a part of this layer, by the projection's name."""
        lora, start = self.lora, f"{self.stack}/{module}/"
        paths = [path for path in projections(self.config) if path.startswith(start)]
        return FrozenDict(
            {path.removeprefix(start): lora for path in paths if lora is not None and lora.selects(path)}
        )

    def drop(self, x_BLD: jax.Array) -> jax.Array:
        return _dropout(self.config, x_BLD, self.deterministic)


def _dropout(config: T5Config, x_BLD: jax.Array, deterministic: bool) -> jax.Array:
    # One mask for all positions of a row, as T5X does.
    return nn.Dropout(config.dropout, broadcast_dims=(-2,))(x_BLD, deterministic=deterministic)


class EncoderLayer(_Layer):
    """Self-attention and MLP, each with a norm before and a residual around it."""

    stack = "encoder"

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, mask: jax.Array, bias: jax.Array | None, positions: _Positions
    ) -> tuple[jax.Array, None]:
        bias = self.bias(bias, positions, bidirectional=True)
        y = self.norm("pre_attention_layer_norm")(x_BLD)
        y = self.attention("attention")(y, y, mask, bias, self.deterministic)
        x_BLD = _constrain(kept_when_frozen(x_BLD + self.drop(y)))
        y = self.norm("pre_mlp_layer_norm")(x_BLD)
        return _constrain(x_BLD + self.drop(self.mlp()(y, self.deterministic))), None


class DecoderLayer(_Layer):
    """Self-attention, attention to the encoder, and MLP, each with a norm before and a residual around it.

    With `position`, the call computes one token per row: it writes that token's key and value into the
    collection `cache` (of `cache_length` tokens), and takes the keys and values of the encoder's output from
    there if an earlier step left them.
    """

    stack = "decoder"
    cache_length: int = 0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BLD: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        bias: jax.Array | None,
        positions: _Positions,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        stepping = position is not None
        bias = self.bias(bias, positions, bidirectional=False)
        y = self.norm("pre_self_attention_layer_norm")(x_BTD)
        attention = self.attention("self_attention", "append" if stepping else "none", self.cache_length)
        y = attention(y, y, self_mask, bias, self.deterministic, position)
        x_BTD = _constrain(kept_when_frozen(x_BTD + self.drop(y)))
        y = self.norm("pre_cross_attention_layer_norm")(x_BTD)
        attention = self.attention("encoder_decoder_attention", "keep" if stepping else "none")
        y = attention(y, encoded_BLD, cross_mask, None, self.deterministic)
        x_BTD = _constrain(kept_when_frozen(x_BTD + self.drop(y)))
        y = self.norm("pre_mlp_layer_norm")(x_BTD)
        return _constrain(x_BTD + self.drop(self.mlp()(y, self.deterministic))), None


def _stack(layer: type[nn.Module], config: T5Config, count: int, broadcast: int) -> Any:
    """Lifts a layer to `count` of them; `broadcast` arguments after the first are the same for all."""
    return nn.scan(
        rematted(layer, config.remat, prevent_cse=not config.scan),
        variable_axes={"params": 0, "lora": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * broadcast,  # pyright: ignore[reportArgumentType]
        length=count,
        unroll=1 if config.scan else count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _relative_bias(config: T5Config, bidirectional: bool) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        num_heads=config.num_heads,
        bidirectional=bidirectional,
        num_buckets=config.relative_buckets,
        max_distance=config.relative_max_distance,
        init_std=config.relative_bias_init_std,
        name="relpos_bias",
    )


class Encoder(nn.Module):
    """The encoder's stack: [B, L, D] embeddings to [B, L, D] states; see `T5.encode`."""

    config: T5Config
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(
        self, embeddings_BLD: jax.Array, segment_ids_BL: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        indices = jnp.arange(segment_ids_BL.shape[1])
        positions = (indices, indices)
        shared = config.relative_bias == "shared"
        bias = _relative_bias(config, bidirectional=True)(*positions) if shared else None
        mask = layers.segment_mask(segment_ids_BL, segment_ids_BL)
        x = _dropout(config, _constrain(embeddings_BLD.astype(dtype)), deterministic)
        stack = _stack(EncoderLayer, config, config.encoder_layers, broadcast=3)
        x, _ = stack(config, deterministic, self.lora, name="encoder")(x, mask, bias, positions)
        x = layers.RMSNorm(config.norm_epsilon, dtype=dtype, name="encoder_norm")(x)
        return _dropout(config, x, deterministic)


class LogitsDense(nn.Module):
    """Holds the kernel [D, V] that maps states to logits."""

    config: T5Config

    def setup(self):
        init = nn.initializers.normal(self.config.emb_dim**-0.5)
        self.kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, ("embed", "vocab")),
            (self.config.emb_dim, self.config.vocab_size),
            jnp.float32,
        )

    @property
    def scale(self) -> jax.Array | None:
        """The columns' scales, float32 [1, V], of a kernel that is int8; else None."""
        return layers.scale_of(self, "kernel")


class Decoder(nn.Module):
    """The decoder's stack, for all tokens at once or, with `cache_length`, one token per call."""

    config: T5Config
    lora: LoRAConfig | None = None

    def setup(self):
        if not self.config.tied_logits:
            self.logits_dense = LogitsDense(self.config)

    @nn.compact
    def __call__(
        self,
        embeddings_BTD: jax.Array,
        encoded_BLD: jax.Array,
        cross_mask: jax.Array,
        target_segment_ids_BT: jax.Array | None = None,
        deterministic: bool = True,
        cache_length: int = 0,
    ) -> jax.Array:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        if cache_length:
            index = self.variable("cache", "position", lambda: jnp.zeros((), jnp.int32))
            position, keys = index.value, jnp.arange(cache_length)
            index.value = position + 1
            self_mask = (keys <= position)[None, None, None, :]
            positions = (position[None], keys)
        else:
            assert target_segment_ids_BT is not None
            position, keys = None, jnp.arange(embeddings_BTD.shape[1])
            causal = keys[None, :] <= keys[:, None]
            self_mask = layers.segment_mask(target_segment_ids_BT, target_segment_ids_BT) & causal
            positions = (keys, keys)
        shared = config.relative_bias == "shared"
        bias = _relative_bias(config, bidirectional=False)(*positions) if shared else None
        x = _dropout(config, _constrain(embeddings_BTD.astype(dtype)), deterministic)
        stack = _stack(DecoderLayer, config, config.decoder_layers, broadcast=6)
        x, _ = stack(config, deterministic, self.lora, cache_length, name="decoder")(
            x, encoded_BLD.astype(dtype), self_mask, cross_mask, bias, positions, position
        )
        x = layers.RMSNorm(config.norm_epsilon, dtype=dtype, name="decoder_norm")(x)
        return _dropout(config, x, deterministic)


class _Head(NamedTuple):
    """The map from states [B, T, D] to logits float32 [B, T, V], and the map of gradients back."""

    logits: Callable[[jax.Array], jax.Array]
    states_gradient: Callable[[jax.Array], jax.Array]


class T5(nn.Module):
    """An encoder-decoder language model that also takes embeddings in place of tokens.

    Args:
      config: its shape, and how it runs.
      lora: low-rank products beside some projections, in the collection `lora`.
    """

    config: T5Config
    lora: LoRAConfig | None = None

    def setup(self):
        config = self.config
        if self.lora is not None:
            self.lora.check(projections(config))
        self.token_embedder = layers.Embed(config.vocab_size, config.emb_dim, dtype=jnp.dtype(config.dtype))
        self.encoder = Encoder(config, self.lora)
        self.decoder = Decoder(config, self.lora)

    def __call__(
        self,
        inputs_BL: jax.Array,
        segment_ids_BL: jax.Array,
        targets_BT: jax.Array,
        target_segment_ids_BT: jax.Array,
        target_positions_BT: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what `score_tokens` does, for text tokens int32 [B, L]; initialises everything."""
        encoded_BLD = self.encode(self.embed(inputs_BL), segment_ids_BL, deterministic)
        hidden_BTD = self.decode(
            encoded_BLD,
            segment_ids_BL,
            targets_BT,
            target_segment_ids_BT,
            target_positions_BT,
            deterministic,
        )
        return self.score_tokens(hidden_BTD, targets_BT)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings [..., D] of tokens int32 [...]."""
        return self.token_embedder(tokens)

    def encode(
        self, embeddings_BLD: jax.Array, segment_ids_BL: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns the encoder's states [B, L, D].

        Args:
          embeddings_BLD: float [B, L, D].
          segment_ids_BL: int32 [B, L]; positions attend within their segment, 0 is padding.
          deterministic: False applies dropout (rng `dropout`).
        """
        return self.encoder(embeddings_BLD, segment_ids_BL, deterministic)

    def decode(
        self,
        encoded_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        targets_BT: jax.Array,
        target_segment_ids_BT: jax.Array,
        target_positions_BT: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns the decoder's states [B, T, D], from which each target token is predicted.

        Args:
          encoded_BLD: what `encode` returned, with its segment ids.
          targets_BT, target_segment_ids_BT: int32 [B, T]; a target attends to the encoder positions of its
            own segment and to the targets before it there. The decoder's input is derived by shifting.
          target_positions_BT: int32 [B, T]; a segment also starts where it is 0.
          deterministic: False applies dropout (rng `dropout`).
        """
        tokens_BT = shift_within_segments(targets_BT, target_segment_ids_BT, target_positions_BT)
        return self.decoder(
            self.embed(tokens_BT),
            encoded_BLD,
            layers.segment_mask(target_segment_ids_BT, segment_ids_BL),
            target_segment_ids_BT,
            deterministic,
        )

    def decode_step(
        self, encoded_BLD: jax.Array, segment_ids_BL: jax.Array, tokens_B1: jax.Array, max_tokens: int = 256
    ) -> jax.Array:
        """Returns the logits float32 [B, 1, V] of the token after `tokens_B1`; rows hold one example.

        Call it with `mutable=["cache"]`. The first call, without a cache, starts one for `max_tokens` tokens
        and expects the start token 0; later calls get the cache and do not read `encoded_BLD` again.
        """
        hidden_B1D = self.decoder(
            self.embed(tokens_B1),
            encoded_BLD,
            (segment_ids_BL != 0)[:, None, None, :],
            cache_length=max_tokens,
        )
        return self.logits(hidden_B1D)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the logits, float32 [B, T, V], of decoder states [B, T, D]."""
        return self._head().logits(hidden_BTD)

    def _head(self) -> "_Head":
        """Returns `logits` as a function of arrays alone, for scan and checkpoint, and its transpose."""
        kernel, tied, kernel_scale, scale, dtype = self._head_matrix()
        dims = "vd" if tied else "dv"
        if kernel_scale is None:
            kernel = kernel.astype(dtype)

        def logits(hidden_BTD: jax.Array) -> jax.Array:
            hidden_BTD = hidden_BTD.astype(dtype) * jnp.asarray(scale, dtype)
            # An int8 head is cast chunk by chunk: as floats it would be the largest array of all.
            logits_BTV = jnp.einsum(
                f"btd,{dims}->btv", hidden_BTD, kernel.astype(dtype), preferred_element_type=jnp.float32
            )
            if kernel_scale is not None:
                logits_BTV = logits_BTV * kernel_scale
            return with_logical_constraint(
                logits_BTV, ("activation_batch", "activation_length", "activation_vocab")
            )

        def states_gradient(gradient_BTV: jax.Array) -> jax.Array:
            if kernel_scale is not None:
                gradient_BTV = gradient_BTV * kernel_scale
            gradient_BTV = with_logical_constraint(
                gradient_BTV.astype(dtype), ("activation_batch", "activation_length", "activation_vocab")
            )
            gradient_BTD = jnp.einsum(
                f"btv,{dims}->btd", gradient_BTV, kernel.astype(dtype), preferred_element_type=jnp.float32
            )
            return _constrain((gradient_BTD * scale).astype(dtype))

        return _Head(logits, states_gradient)

    def token_losses(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Returns the cross-entropy of each target, float32 [B, T]; never builds [B, T, V]."""
        return self.score_tokens(hidden_BTD, targets_BT)[0]

    def score_tokens(
        self, hidden_BTD: jax.Array, targets_BT: jax.Array, *, frozen_head: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `token_losses`, and whether each target is the likeliest token, bool [B, T].

        With `frozen_head` the head gets no gradient, and that of the states needs no second pass over logits.
        """
        config = self.config
        words = config.vocab_size // shards_of("activation_vocab")
        at_once = config.loss_logits * shards_of("activation_batch")
        if targets_BT.size * words > at_once:
            matrix = self._head_matrix()
            trains = not frozen_head and matrix.kernel_scale is None
            score = trained_head_cross_entropy if trains else frozen_head_cross_entropy
            return score(hidden_BTD, targets_BT, matrix, config.loss_logits)
        head = self._head()
        return chunked_cross_entropy(
            hidden_BTD,
            targets_BT,
            head.logits,
            config.loss_chunk,
            frozen_head=head.states_gradient if frozen_head else None,
        )

    def _head_matrix(self) -> HeadMatrix:
        config = self.config
        tied = config.tied_logits
        matrix = self.token_embedder if tied else self.decoder.logits_dense
        scaled = config.scale_tied_logits if tied else config.scale_untied_logits
        return HeadMatrix(
            kernel=jnp.asarray(self.token_embedder.embedding if tied else self.decoder.logits_dense.kernel),
            tied=tied,
            kernel_scale=None if matrix.scale is None else matrix.scale.reshape(-1),
            scale=config.emb_dim**-0.5 if scaled else 1.0,
            dtype=jnp.dtype(config.dtype),
        )
