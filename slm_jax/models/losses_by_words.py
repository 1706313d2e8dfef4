"""Cross-entropy over a large vocabulary that is cut: all tokens go through one chunk after the other.

Memory is then the same for any vocabulary.

Shape suffixes: B rows, T decoder tokens, D features, V vocabulary, S shards of it, W words of
a chunk in each.
Parts of the head are [D, S, W], or [S, W, D] where it is tied.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.typing import DTypeLike

from slm_jax.models.losses import with_gradient
from slm_jax.models.shards import shards_of

# Words of a chunk are a multiple of this, which matrix units want, and at least as many.
_WORDS = 128


class HeadMatrix(NamedTuple):
    """The map from states to logits.

    Attributes:
      kernel: floats or int8, [D, V], or [V, D] where `tied`.
      kernel_scale: float32 [V] of an int8 kernel, else None.
      scale: factor of the states.
      dtype: of both products; they add up in float32.
    """

    kernel: jax.Array
    tied: bool
    kernel_scale: jax.Array | None
    scale: float
    dtype: DTypeLike


class _Chunks:
    """A head in parts along its vocabulary, of which all tokens' logits together are few enough.

    A head cut over the mesh is cut in each of its shards, so that all devices work on every chunk.

    Args:
      head: to cut.
      shape: of the targets, (B, T).
      logits_at_once: most logits of a device at a time, but 128 words of each token are taken.
    """

    def __init__(self, head: HeadMatrix, shape: tuple[int, ...], logits_at_once: int):
        self.head, self._shape = head, shape
        tokens = max(math.prod(shape) // shards_of("activation_batch"), 1)
        self.vocab = head.kernel.shape[0 if head.tied else 1]
        self.shards = shards_of("activation_vocab") if self.vocab % shards_of("activation_vocab") == 0 else 1
        self.words = self.vocab // self.shards
        size = max(logits_at_once // tokens // _WORDS, 1) * _WORDS
        self.size = min(size, math.ceil(self.words / 2))
        self.count = math.ceil(self.words / self.size)
        self.dims = "swd" if head.tied else "dsw"
        self._first_S = jnp.arange(self.shards) * self.words

    def split(self, kernel: jax.Array, words: int) -> jax.Array:
        """[D, S * words] as [D, S, words], or [S * words, D] as [S, words, D]."""
        dim = kernel.shape[-1 if self.head.tied else 0]
        shape = (self.shards, words, dim) if self.head.tied else (dim, self.shards, words)
        return kernel.reshape(shape)

    def start(self, number: jax.Array) -> jax.Array:
        """The first word of a chunk in each shard.

        The last chunk is as large as the others: what it has in common with the one before counts once.
        """
        return jnp.minimum(number * self.size, self.words - self.size)

    def part(self, number: jax.Array) -> jax.Array:
        """The kernel of a chunk, [D, S, W], or [S, W, D] where it is tied."""
        kernel, start, axis = self.head.kernel, self.start(number), self.dims.index("w")
        if self.shards == 1:
            # XLA would copy a whole head to give it a dim of size 1.
            part = jax.lax.dynamic_slice_in_dim(kernel, start, self.size, axis=axis - 1)
            part = self.split(part, self.size)
        else:
            part = jax.lax.dynamic_slice_in_dim(self.split(kernel, self.words), start, self.size, axis=axis)
        return part.astype(self.head.dtype)

    def scale(self, number: jax.Array) -> jax.Array | None:
        """Float32 [S, W] of an int8 kernel."""
        if self.head.kernel_scale is None:
            return None
        scale_SV = self.head.kernel_scale.reshape(self.shards, self.words)
        return jax.lax.dynamic_slice_in_dim(scale_SV, self.start(number), self.size, axis=1)

    def states(self, hidden_BTD: jax.Array) -> jax.Array:
        """What is multiplied with the parts."""
        return hidden_BTD.astype(self.head.dtype) * jnp.asarray(self.head.scale, self.head.dtype)

    def logits(self, states_BTD: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
        """Float32 [B, T, S, W]; -inf for words of the chunk before."""
        logits = self.cut(
            jnp.einsum(f"btd,{self.dims}->btsw", states_BTD, part, preferred_element_type=jnp.float32)
        )
        if (scale_SW := self.scale(number)) is not None:
            logits = logits * scale_SW
        return jnp.where(self._is_new(number), logits, -jnp.inf)

    def is_target(self, targets_BT: jax.Array, number: jax.Array) -> jax.Array:
        """Bool [B, T, S, W]."""
        # A comparison instead of a gather: it fuses, and a vocabulary cut over the mesh stays cut.
        words_SW = self.start(number) + self._first_S[:, None] + jnp.arange(self.size)
        return (words_SW == targets_BT[..., None, None]) & self._is_new(number)

    def cut(self, x_BTSX: jax.Array) -> jax.Array:
        """The same array, cut over the mesh by shards of the vocabulary."""
        names = ("activation_batch", "activation_length", "activation_vocab", None)
        return with_logical_constraint(x_BTSX, names[: x_BTSX.ndim])

    def zeros(self, *dims: int) -> jax.Array:
        """Float32 [B, T, S, *dims] to add up in."""
        return self.cut(jnp.zeros((*self._shape, self.shards, *dims), jnp.float32))

    def placed(self, gradient: jax.Array) -> jax.Array:
        """A gradient as `split` has it, cut over the mesh as the head is."""
        vocab = "vocab" if self.shards > 1 else None
        names = (vocab, None, "embed") if self.head.tied else ("embed", vocab, None)
        return with_logical_constraint(gradient, names)

    def _is_new(self, number: jax.Array) -> jax.Array:
        return self.start(number) + jnp.arange(self.size) >= number * self.size


class _Sums(NamedTuple):
    """What is known of the softmax of each token, relative to the largest logit so far, in each shard.

    Attributes:
      largest_BTS: logit.
      total_BTS: of `exp(logit - largest)`.
      target_BTS: the target's logit, 0 until it comes.
    """

    largest_BTS: jax.Array
    total_BTS: jax.Array
    target_BTS: jax.Array

    @classmethod
    def none(cls, chunks: _Chunks) -> "_Sums":
        """Before the first chunk."""
        zeros_BTS = chunks.zeros()
        return cls(jnp.full_like(zeros_BTS, -jnp.inf), zeros_BTS, zeros_BTS)

    def add(self, logits: jax.Array, is_target: jax.Array) -> tuple["_Sums", Any, Any]:
        """Returns the sums with a chunk, its `exp(logit - largest)`, and the factor of what was there before.

        Args:
          logits, is_target: [B, T, S, W].
        """
        target_BTS = self.target_BTS + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        now_BTS = jnp.maximum(self.largest_BTS, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - now_BTS[..., None])
        kept_BTS = jnp.exp(self.largest_BTS - now_BTS)
        total_BTS = self.total_BTS * kept_BTS + jnp.sum(weights, axis=-1)
        return _Sums(now_BTS, total_BTS, target_BTS), weights, kept_BTS

    def over_shards(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns each token's largest logit and total, [B, T], and the factor of each shard's total."""
        largest_BT1 = jnp.max(self.largest_BTS, axis=-1, keepdims=True)
        kept_BTS = jnp.exp(self.largest_BTS - largest_BT1)
        return largest_BT1[..., 0], jnp.sum(self.total_BTS * kept_BTS, axis=-1), kept_BTS

    def scores(self) -> tuple[jax.Array, jax.Array]:
        """Returns each cross-entropy, float32 [B, T], and whether no word is likelier, bool [B, T]."""
        largest_BT, total_BT, _ = self.over_shards()
        target_BT = jnp.sum(self.target_BTS, axis=-1)
        return largest_BT + jnp.log(total_BT) - target_BT, target_BT >= largest_BT


def frozen_head_cross_entropy(
    hidden_BTD: jax.Array, targets_BT: jax.Array, head: HeadMatrix, logits_at_once: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `chunked_cross_entropy` does, from one pass over the vocabulary, gradient included.

    A state's gradient is the mean of the words' vectors by their probabilities, less the target's vector.
    That is attention to the vocabulary, computed as attention is without its scores (arXiv 2112.05682): with
    sums relative to the largest logit so far. All tokens go through each chunk of the head, so memory does
    not depend on the vocabulary, and the head is read twice however long it is. A head cut over the mesh is
    summed where it lies, and joined once at the end.

    Args:
      hidden_BTD: float [B, T, D].
      targets_BT: int32 [B, T].
      head: with V words.
      logits_at_once: most logits of a device that exist at a time, but 128 words of each token are taken.
    """
    chunks, dim = _Chunks(head, targets_BT.shape, logits_at_once), hidden_BTD.shape[-1]
    states_BTD = chunks.states(jax.lax.stop_gradient(hidden_BTD))

    def add(carry: tuple[_Sums, jax.Array], number: jax.Array) -> tuple[tuple[_Sums, jax.Array], None]:
        sums, mixed_BTSD = carry
        part = chunks.part(number)
        logits = chunks.logits(states_BTD, part, number)
        is_target = chunks.is_target(targets_BT, number)
        sums, weights, kept_BTS = sums.add(logits, is_target)
        # The target's share is added at the end, as one number that loses no bits where it is nearly 1.
        weights = jnp.where(is_target, 0.0, weights)
        if (scale_SW := chunks.scale(number)) is not None:
            weights = weights * scale_SW
        new_BTSD = jnp.einsum(
            f"btsw,{chunks.dims}->btsd", weights.astype(head.dtype), part, preferred_element_type=jnp.float32
        )
        return (sums, chunks.cut(mixed_BTSD * kept_BTS[..., None] + new_BTSD)), None

    carry = _Sums.none(chunks), chunks.zeros(dim)
    sums, mixed_BTSD = jax.lax.scan(add, carry, jnp.arange(chunks.count))[0]

    losses_BT, correct_BT = sums.scores()
    _, total_BT, kept_BTS = sums.over_shards()
    target_BTD = jnp.take(head.kernel, targets_BT, axis=0 if head.tied else 1)
    target_BTD = (target_BTD if head.tied else jnp.moveaxis(target_BTD, 0, -1)).astype(jnp.float32)
    if head.kernel_scale is not None:
        target_BTD = target_BTD * jnp.take(head.kernel_scale, targets_BT)[..., None]
    mixed_BTD = jnp.sum(mixed_BTSD * kept_BTS[..., None], axis=2) / total_BT[..., None]
    gradient_BTD = head.scale * (mixed_BTD + jnp.expm1(-losses_BT)[..., None] * target_BTD)
    gradient_BTD = with_logical_constraint(
        gradient_BTD.astype(head.dtype), ("activation_batch", "activation_length", "activation_embed")
    )
    return with_gradient(losses_BT, hidden_BTD, gradient_BTD), correct_BT


def trained_head_cross_entropy(
    hidden_BTD: jax.Array, targets_BT: jax.Array, head: HeadMatrix, logits_at_once: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `frozen_head_cross_entropy` does, with a gradient of the head too.

    The backward pass computes each chunk's logits again. A chunk of the head's gradient is a product over all
    tokens and is written once; besides that gradient memory does not depend on the vocabulary.

    Args:
      hidden_BTD, targets_BT, logits_at_once: see `frozen_head_cross_entropy`.
      head: of floats.
    """
    form = _Form(head.tied, head.scale, jnp.dtype(head.dtype), logits_at_once)
    scores: Any = _scores(hidden_BTD, head.kernel, targets_BT, form)
    return scores


class _Form(NamedTuple):
    """Of a `HeadMatrix` what is no array, and into how large chunks it is cut."""

    tied: bool
    scale: float
    dtype: Any
    logits_at_once: int

    def chunks(self, kernel: jax.Array, targets_BT: jax.Array) -> _Chunks:
        head = HeadMatrix(kernel, self.tied, None, self.scale, self.dtype)
        return _Chunks(head, targets_BT.shape, self.logits_at_once)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(
    hidden_BTD: jax.Array, kernel: jax.Array, targets_BT: jax.Array, form: _Form
) -> tuple[jax.Array, jax.Array]:
    """Returns `_Sums.scores`."""
    return _scores_forward(hidden_BTD, kernel, targets_BT, form)[0]


def _scores_forward(
    hidden_BTD: jax.Array, kernel: jax.Array, targets_BT: jax.Array, form: _Form
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    chunks = form.chunks(kernel, targets_BT)
    states_BTD = chunks.states(hidden_BTD)

    def add(sums: _Sums, number: jax.Array) -> tuple[_Sums, None]:
        logits = chunks.logits(states_BTD, chunks.part(number), number)
        is_target = chunks.is_target(targets_BT, number)
        return sums.add(logits, is_target)[0], None

    sums = jax.lax.scan(add, _Sums.none(chunks), jnp.arange(chunks.count))[0]
    largest_BT, total_BT, _ = sums.over_shards()
    normalizer_BT = largest_BT + jnp.log(total_BT)
    return sums.scores(), (hidden_BTD, kernel, targets_BT, normalizer_BT)


def _scores_backward(
    form: _Form, kept: tuple[jax.Array, ...], cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, kernel, targets_BT, normalizer_BT = kept
    weights_BT = cotangents[0][..., None, None]
    chunks = form.chunks(kernel, targets_BT)
    states_BTD, axis = chunks.states(hidden_BTD), chunks.dims.index("w")

    def add(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
        of_states_BTSD, of_kernel = carry
        part, start = chunks.part(number), chunks.start(number)
        logits = chunks.logits(states_BTD, part, number)
        of_logits = jnp.exp(logits - normalizer_BT[..., None, None]) - chunks.is_target(targets_BT, number)
        of_logits = (of_logits * weights_BT).astype(form.dtype)
        of_states_BTSD += jnp.einsum(
            f"btsw,{chunks.dims}->btsd", of_logits, part, preferred_element_type=jnp.float32
        )
        new = jnp.einsum(
            f"btd,btsw->{chunks.dims}", states_BTD, of_logits, preferred_element_type=jnp.float32
        )
        # Words that are the chunk's before get 0 from this one.
        new += jax.lax.dynamic_slice_in_dim(of_kernel, start, chunks.size, axis=axis)
        of_kernel = jax.lax.dynamic_update_slice_in_dim(of_kernel, new, start, axis=axis)
        return (chunks.cut(of_states_BTSD), chunks.placed(of_kernel)), None

    nothing = chunks.placed(chunks.split(jnp.zeros(kernel.shape, jnp.float32), chunks.words))
    carry = chunks.zeros(hidden_BTD.shape[-1]), nothing
    of_states_BTSD, of_kernel = jax.lax.scan(add, carry, jnp.arange(chunks.count))[0]
    of_hidden_BTD = form.scale * jnp.sum(of_states_BTSD, axis=2)
    return of_hidden_BTD.astype(hidden_BTD.dtype), of_kernel.reshape(kernel.shape).astype(kernel.dtype), None


_scores.defvjp(_scores_forward, _scores_backward)
