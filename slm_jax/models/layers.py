"""Layers shared by the networks: norms, dense, convolution, embedding, MLP, attention, T5's relative position
bias, and the pre-norm transformer of Whisper and wav2vec 2.0.

Parameter names, kernel shapes and logical axes follow T5X's scalable T5. Parameters are float32 unless
given otherwise; `dtype` is the dtype of computation. Norms and softmax compute in float32.

Shape suffixes: B rows, Q queries, K keys, L positions, D features, H heads, C features of a head, W taps of a
kernel, I its inputs, O its outputs.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.errors import UserError
from slm_jax.models.lora import A as LORA_A
from slm_jax.models.lora import B as LORA_B
from slm_jax.models.lora import LoRAConfig
from slm_jax.models.remat import kept_when_frozen, rematted
from slm_jax.models.shards import platform

Initializer = Callable[..., jax.Array]

ATTENTION_KERNELS = ("plain", "xla", "cudnn")
# Those that not every platform has.
KERNEL_PLATFORMS = {"cudnn": ("gpu", "cuda"), "pallas": ("tpu",)}

# Far below any score, yet finite: a query that may attend to nothing gets an even mean and never NaN.
MASKED_SCORE = -1e30

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,  # the tanh form, as in T5 v1.1, mT5 and mT0
    "gelu_exact": functools.partial(nn.gelu, approximate=False),  # by erf, as in Whisper
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}


class RMSNorm(nn.Module):
    """T5's layer norm: scale only, no mean, no bias (https://arxiv.org/abs/1910.07467).

    Args of the call:
      x: [..., D] of any float dtype. The result has dtype `dtype`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(self.scale_init, ("norm",)), (x.shape[-1],), jnp.float32
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.asarray(scale)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias (https://arxiv.org/abs/1607.06450).

    Args of the call:
      x: [..., D] of any float dtype. The result has dtype `dtype`.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def parameter(name: str, init: Initializer) -> jax.Array:
            boxed = nn.with_logical_partitioning(init, ("norm",))
            return jnp.asarray(self.param(name, boxed, (x.shape[-1],), jnp.float32))

        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * parameter("scale", nn.initializers.ones) + parameter("bias", nn.initializers.zeros)
        return x.astype(self.dtype)


class Dense(nn.Module):
    """A linear map of the last dims to new dims, without bias unless asked.

    The kernel's shape is the contracted dims followed by `features`; it starts normal with standard deviation
    `init_scale / sqrt(product of the contracted dims)`.

    Args:
      features: size of the new dim, or sizes of several (heads, features of a head).
      axes: logical axis name of each kernel dim.
      contracted: how many trailing dims of the input are contracted.
      lora: adds a low-rank product of this size; see `models.lora`.

    Args of the call:
      x: [..., contracted dims].
      deterministic: False applies dropout to what goes into the low-rank product (rng `dropout`).
    """

    features: int | Sequence[int]
    axes: Sequence[str]
    contracted: int = 1
    use_bias: bool = False
    init_scale: float = 1.0
    dtype: DTypeLike = jnp.float32
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        inputs = x.shape[x.ndim - self.contracted :]
        init = nn.initializers.normal(self.init_scale / math.sqrt(math.prod(inputs)))
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, tuple(self.axes)),
            (*inputs, *features),
            jnp.float32,
        )
        # As one matrix product: with several contracted or batch dims XLA's CPU backend leaves its fast
        # kernels in the backward pass, which then takes three times as long.
        flat = x.astype(self.dtype).reshape(-1, math.prod(inputs))
        kernel = jnp.asarray(kernel).reshape(math.prod(inputs), -1)
        scale = scale_of(self, "kernel")
        y = (
            flat @ kernel.astype(self.dtype)
            if scale is None
            else int8_product(flat, kernel, scale.reshape(-1))
        )
        if self.lora is not None:
            y = y + self._low_rank_product(self.lora, flat, inputs, features, deterministic)
        y = y.reshape(*x.shape[: x.ndim - self.contracted], *features)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.axes[self.contracted :]))
            y = y + jnp.asarray(self.param("bias", zeros, features, jnp.float32), self.dtype)
        return y

    def _low_rank_product(
        self,
        lora: LoRAConfig,
        flat: jax.Array,
        inputs: tuple[int, ...],
        features: tuple[int, ...],
        deterministic: bool,
    ) -> jax.Array:
        """Returns the scaled product of rows [N, I] with two small matrices, [N, O]."""
        axes = tuple(self.axes)
        size = math.prod(inputs)
        a = self._lora(LORA_A, nn.initializers.normal(size**-0.5), (*inputs, lora.rank),
                       (*axes[: self.contracted], "lora_rank"))  # fmt: skip
        b = self._lora(LORA_B, nn.initializers.zeros, (lora.rank, *features),
                       ("lora_rank", *axes[self.contracted :]))  # fmt: skip
        flat = nn.Dropout(lora.dropout, name="lora_dropout")(flat, deterministic=deterministic)
        # Small, and all that the gradient of `lora_b` needs.
        inner = kept_when_frozen(flat @ a.astype(self.dtype).reshape(size, lora.rank))
        return (inner @ b.astype(self.dtype).reshape(lora.rank, -1)) * jnp.asarray(lora.scale, self.dtype)

    def _lora(self, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        # A collection of its own, so that it can train beside a kernel that does not.
        boxed = nn.with_logical_partitioning(init, axes)
        variable = self.variable("lora", name, lambda: boxed(self.make_rng("params"), shape, jnp.float32))
        return jnp.asarray(variable.value)


class Conv(nn.Module):
    """A convolution over positions with a kernel [W, I, O].

    Args:
      features: O, features of the result.
      taps: W, size of the kernel.
      axes: logical axis name of each kernel dim.
      stride: positions from one output to the next.
      padding: zeros put before the first position, and after the last.

    Args of the call:
      x_BLD: [B, L, D].
    """

    features: int
    taps: int
    axes: Sequence[str]
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        inputs = x_BLD.shape[-1]
        # The variance that a ReLU or GELU after it keeps.
        init = nn.initializers.normal(math.sqrt(2 / (self.taps * inputs)))
        kernel_WIO = self.param(
            "kernel",
            nn.with_logical_partitioning(init, tuple(self.axes)),
            (self.taps, inputs, self.features),
            jnp.float32,
        )
        y_BLD = convolve(
            x_BLD.astype(self.dtype),
            jnp.asarray(kernel_WIO, self.dtype),
            stride=self.stride,
            padding=(self.padding, self.padding),
        )
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[-1],))
            y_BLD = y_BLD + jnp.asarray(self.param("bias", zeros, (self.features,), jnp.float32), self.dtype)
        return y_BLD


def convolve(
    x_BLD: jax.Array,
    kernel_WIO: jax.Array,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> jax.Array:
    """Returns the convolution over positions, [B, L', O], of x [B, L, groups * I] with kernel [W, I, O]."""
    return jax.lax.conv_general_dilated(
        x_BLD,
        kernel_WIO,
        window_strides=(stride,),
        padding=(padding,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


class Embed(nn.Module):
    """A table of token embeddings.

    Args of the call:
      tokens: int32 [...], each below `num_embeddings`. The result is [..., features] of dtype `dtype`.
    """

    num_embeddings: int
    features: int
    init_std: float = 1.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("vocab", "embed")),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Taken first and cast after: a cast of the whole table would cost its size again.
        rows = jnp.take(jnp.asarray(self.embedding), tokens, axis=0)
        if (scale := self.scale) is not None:
            rows = rows * jnp.take(scale, tokens, axis=0)
        return rows.astype(self.dtype)

    @property
    def scale(self) -> jax.Array | None:
        """The rows' scales, float32 [num_embeddings, 1], of a table that is int8; else None."""
        return scale_of(self, "embedding")


def scale_of(module: nn.Module, name: str) -> jax.Array | None:
    """Returns the scales of a module's int8 matrix (see models/quantization.py); None of a floating one."""
    return nn.unbox(module.get_variable("params", name + "_scale"))


@jax.checkpoint
def int8_product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns `x @ (kernel * scale)`, of x's dtype; the backward pass keeps the kernel as int8, no floats.

    Args:
      x: float [N, D]; kernel: int8 [D, F]; scale: float32 [F].
    """
    product = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (product * scale).astype(x.dtype)


class Mlp(nn.Module):
    """The position-wise MLP of a transformer, gated (`wi_0`, `wi_1`, `wo`) or not (`wi`, `wo`).

    Args:
      hidden_dim: features between the two maps.
      activation: a name of ACTIVATIONS.
      gated: multiply the activated map by a second, linear one (https://arxiv.org/abs/2002.05202).
      out_dim: features of the result; those of the input where None.
      lora: low-rank products of some of its maps, by their names.

    Args of the call:
      x: [B, L, D].
      deterministic: False applies dropout to the hidden features (rng `dropout`).
    """

    hidden_dim: int
    activation: str = "gelu"
    gated: bool = True
    dropout: float = 0.0
    out_dim: int | None = None
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    lora: Mapping[str, LoRAConfig] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        def dense(features: int, axes: Sequence[str], name: str) -> Dense:
            return Dense(
                features, axes, use_bias=self.use_bias, dtype=self.dtype, lora=self.lora.get(name), name=name
            )

        def inner(name: str) -> jax.Array:
            return kept_when_frozen(dense(self.hidden_dim, ("embed", "mlp"), name)(x, deterministic))

        activate = ACTIVATIONS[self.activation]
        hidden = activate(inner("wi_0")) * inner("wi_1") if self.gated else activate(inner("wi"))
        hidden = nn.Dropout(self.dropout, broadcast_dims=(-2,))(hidden, deterministic=deterministic)
        hidden = with_logical_constraint(hidden, ("activation_batch", "activation_length", "activation_mlp"))
        out_dim = self.out_dim or x.shape[-1]
        return dense(out_dim, ("mlp", "embed"), "wo")(hidden, deterministic)


class MultiHeadAttention(nn.Module):
    """Multi-head dot-product attention with an explicit mask and an additive bias.

    Args:
      out_dim: features of the result; those of the queries where None.
      scale: factor of the scores. T5 has 1.0 (its query kernel starts smaller by sqrt(head_dim) instead),
        most others have head_dim ** -0.5. Either way the scores start with the same variance.
      key_bias: with `use_bias`, whether the keys get one too; Whisper's have none.
      cache: what a decoding step keeps in the collection `cache`. "none"; "append" writes the key and value
        of its one position and attends to those of all `cache_length` positions (self-attention); "keep"
        projects the keys in the first step and takes them from the cache afterwards (cross-attention).
      kernel: of `dot_product_attention`; decoding steps and dropout take the plain one.
      lora: low-rank products of some of its projections, by their names.

    Args of the call:
      queries_BQD: [B, Q, D]; keys_BKD: [B, K, D'], from which keys and values are projected.
      mask: bool, broadcastable to [B, H, Q, K], True where a query may attend; None lets all attend.
      bias: float, broadcastable to [B, H, Q, K], added to the scores.
      deterministic: False applies dropout to the attention weights (rng `dropout`).
      position: int32 scalar, where "append" writes.
    """

    num_heads: int
    head_dim: int
    out_dim: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    cache: str = "none"
    cache_length: int = 0
    key_bias: bool = True
    kernel: str = "plain"
    lora: Mapping[str, LoRAConfig] = FrozenDict()

    @nn.compact
    def __call__(
        self,
        queries_BQD: jax.Array,
        keys_BKD: jax.Array,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        deterministic: bool = True,
        position: jax.Array | None = None,
    ) -> jax.Array:
        def project(x: jax.Array, name: str, init_scale: float = 1.0) -> jax.Array:
            y = Dense(
                (self.num_heads, self.head_dim),
                ("embed", "heads", "kv"),
                use_bias=self.use_bias and (self.key_bias or name != "key"),
                init_scale=init_scale,
                dtype=self.dtype,
                lora=self.lora.get(name),
                name=name,
            )(x, deterministic)
            return with_logical_constraint(
                kept_when_frozen(y),
                ("activation_batch", "activation_length", "activation_heads", "activation_kv"),
            )

        query_BQHC = project(queries_BQD, "query", init_scale=1.0 / (self.scale * math.sqrt(self.head_dim)))
        if self.scale != 1.0:
            query_BQHC = query_BQHC * jnp.asarray(self.scale, self.dtype)

        if self.cache == "keep" and self.has_variable("cache", "cached_key"):
            key_BKHC, value_BKHC = (
                self.get_variable("cache", "cached_key"),
                self.get_variable("cache", "cached_value"),
            )
        else:
            key_BKHC, value_BKHC = project(keys_BKD, "key"), project(keys_BKD, "value")
            if self.cache == "keep":
                self.put_variable("cache", "cached_key", key_BKHC)
                self.put_variable("cache", "cached_value", value_BKHC)
            elif self.cache == "append":
                assert position is not None
                key_BKHC = self._append("cached_key", key_BKHC, position)
                value_BKHC = self._append("cached_value", value_BKHC, position)
        drops = self.dropout > 0 and not deterministic
        mixed_BQHC = dot_product_attention(
            query_BQHC,
            key_BKHC,
            value_BKHC,
            mask,
            bias,
            drop=nn.Dropout(self.dropout, broadcast_dims=(-2,), deterministic=False) if drops else None,
            kernel="plain" if drops or self.cache != "none" else self.kernel,
        )
        return Dense(
            self.out_dim or queries_BQD.shape[-1],
            ("heads", "kv", "embed"),
            contracted=2,
            use_bias=self.use_bias,
            dtype=self.dtype,
            lora=self.lora.get("out"),
            name="out",
        )(mixed_BQHC, deterministic)

    def _append(self, name: str, new_B1HC: jax.Array, position: jax.Array) -> jax.Array:
        """Writes `new_B1HC` into the cache at `position`; returns all positions, [B, cache_length, H, C]."""
        rows, _, heads, dim = new_B1HC.shape
        shape = (rows, self.cache_length, heads, dim)
        cached = self.variable("cache", name, jnp.zeros, shape, new_B1HC.dtype)
        cached.value = jax.lax.dynamic_update_slice_in_dim(cached.value, new_B1HC, position, axis=1)
        return cached.value


def dot_product_attention(
    query_BQHC: jax.Array,
    key_BKHC: jax.Array,
    value_BKHC: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    *,
    scale: float = 1.0,
    kernel: str = "plain",
) -> jax.Array:
    """Returns attention's mix of the values, [B, Q, H, C]; scores and softmax are float32.

    Args:
      mask, bias: broadcastable to [B, H, Q, K]. A query whose mask is empty gets the even mean of all values.
      drop: applied to the weights, [B, H, Q, K].
      scale: factor of the scores, before the bias.
      kernel: `plain` writes out scores and weights. `cudnn`, for NVIDIA GPUs and 16-bit floats, never does,
        and rounds the bias to 16 bits; `xla` is what JAX has in its place elsewhere. Neither of them drops.

    Raises:
      UserError: `cudnn` cannot compute this here.
    """
    if kernel != "plain":
        assert drop is None
        shape = (query_BQHC.shape[0], query_BQHC.shape[2], query_BQHC.shape[1], key_BKHC.shape[1])
        if kernel == "cudnn":
            _check_cudnn(query_BQHC.dtype, shape)
        if bias is not None:
            # Of the full shape: a gradient of a smaller bias is not what every version returns.
            bias = jnp.broadcast_to(bias.astype(query_BQHC.dtype), shape)
        return jax.nn.dot_product_attention(
            query_BQHC, key_BKHC, value_BKHC, bias, mask, scale=scale,
            implementation=cast(Literal["xla", "cudnn"], kernel),
        )  # fmt: skip
    if scale != 1.0:
        query_BQHC = query_BQHC * jnp.asarray(scale, query_BQHC.dtype)
    scores_BHQK = jnp.einsum("bqhc,bkhc->bhqk", query_BQHC, key_BKHC, preferred_element_type=jnp.float32)
    if bias is not None:
        scores_BHQK = scores_BHQK + bias.astype(jnp.float32)
    if mask is not None:
        scores_BHQK = jnp.where(mask, scores_BHQK, MASKED_SCORE)
    weights_BHQK = jax.nn.softmax(scores_BHQK, axis=-1).astype(value_BKHC.dtype)
    if drop is not None:
        weights_BHQK = drop(weights_BHQK)
    return jnp.einsum("bhqk,bkhc->bqhc", weights_BHQK, value_BKHC)


def _check_cudnn(dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    if (found := platform()) not in KERNEL_PLATFORMS["cudnn"]:
        raise UserError(f"attention_kernel is 'cudnn' on a {found}, expected 'plain' or 'xla' there")
    if jnp.dtype(dtype).itemsize != 2:
        raise UserError(f"attention_kernel is 'cudnn' and dtype {jnp.dtype(dtype).name}, expected 'bfloat16'")
    if shape[2] % 2 or shape[3] % 2:
        raise UserError(
            "attention_kernel is 'cudnn', which takes even numbers of positions, found "
            f"{shape[2]} queries and {shape[3]} keys"
        )


def relative_position_bucket(
    relative_position: jax.Array, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """Returns T5's bucket of each relative position, int32 of the same shape (arXiv 1910.10683, section 2.1).

    Args:
      relative_position: int32, key position minus query position.
      bidirectional: half of the buckets are for keys to the right; otherwise all of those share bucket 0.
      num_buckets: half of (each side's) buckets are exact, the others logarithmic up to `max_distance`.
    """
    distance = -relative_position
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (distance < 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = num_buckets // 2
    # The comparison below takes the exact branch for distance 0, where the logarithm would be -inf.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, logarithmic)


class RelativePositionBias(nn.Module):
    """T5's learned bias of attention scores per head and bucket of relative position.

    Args of the call:
      query_positions: int32 [Q]; key_positions: int32 [K]. The result is float32 [1, H, Q, K].
    """

    num_heads: int
    bidirectional: bool
    num_buckets: int = 32
    max_distance: int = 128
    init_std: float = 0.25

    @nn.compact
    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        rel_embedding = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("heads", "relpos_buckets")),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        bucket_QK = relative_position_bucket(
            key_positions[None, :] - query_positions[:, None],
            self.bidirectional,
            self.num_buckets,
            self.max_distance,
        )
        return jnp.take(jnp.asarray(rel_embedding), bucket_QK, axis=1)[None].astype(jnp.float32)


def segment_mask(query_segments_BQ: jax.Array, key_segments_BK: jax.Array) -> jax.Array:
    """Returns bool [B, 1, Q, K]: True where query and key belong to the same segment; 0 is padding."""
    same = query_segments_BQ[:, :, None] == key_segments_BK[:, None, :]
    return (same & (key_segments_BK != 0)[:, None, :])[:, None]


class PreNormLayer(nn.Module):
    """Self-attention and MLP with biases, each with a layer norm before and a residual around it.

    Args of the call:
      x_BLD: [B, L, D].
      mask: bool, broadcastable to [B, H, L, L], as of `MultiHeadAttention`.

    Returns:
      [B, L, D], and None as a scan wants it.
    """

    num_heads: int
    mlp_dim: int
    activation: str = "gelu_exact"
    key_bias: bool = True
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        def drop(y_BLD: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(y_BLD, deterministic=self.deterministic)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(self.norm_epsilon, dtype=self.dtype, name=name)

        head_dim = x_BLD.shape[-1] // self.num_heads
        attention = MultiHeadAttention(
            self.num_heads,
            head_dim,
            scale=head_dim**-0.5,
            dropout=self.dropout,
            use_bias=True,
            key_bias=self.key_bias,
            dtype=self.dtype,
            name="attention",
        )
        mlp = Mlp(
            self.mlp_dim,
            activation=self.activation,
            gated=False,
            dropout=self.dropout,
            use_bias=True,
            dtype=self.dtype,
            name="mlp",
        )
        y_BLD = norm("pre_attention_layer_norm")(x_BLD)
        x_BLD = kept_when_frozen(
            x_BLD + drop(attention(y_BLD, y_BLD, mask, deterministic=self.deterministic))
        )
        y_BLD = norm("pre_mlp_layer_norm")(x_BLD)
        x_BLD = x_BLD + drop(mlp(y_BLD, deterministic=self.deterministic))
        axes = ("activation_batch", "activation_length", "activation_embed")
        return with_logical_constraint(x_BLD, axes), None


class PreNormTransformer(nn.Module):
    """A stack of `PreNormLayer` along axis 0 of its parameters, and a layer norm after the last.

    Args:
      layers: number of layers.
      remat: what each layer keeps for the backward pass; see `remat.rematted`.
      scan_unroll: layers per iteration of the scan.

    The others, and the call, are those of `PreNormLayer`; the result is [B, L, D].
    """

    layers: int
    num_heads: int
    mlp_dim: int
    activation: str = "gelu_exact"
    key_bias: bool = True
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    remat: str = "none"
    scan_unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: jax.Array | None, deterministic: bool = True) -> jax.Array:
        stack = nn.scan(
            rematted(PreNormLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.layers,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            key_bias=self.key_bias,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            deterministic=deterministic,
            name="layers",
        )
        x_BLD, _ = stack(x_BLD, mask)
        return LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(x_BLD)
