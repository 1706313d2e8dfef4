"""The tensors of `layers.PreNormTransformer` as published checkpoints name them."""

from collections.abc import Iterator
from dataclasses import dataclass

from slm_jax.checkpoints.families.mapping import Layout, Piece, same, transposed


@dataclass(frozen=True)
class LayerNames:
    """What a published model calls the parts of a layer; attention's projections are `q_proj` and so on."""

    attention: str
    attention_norm: str
    mlp_in: str
    mlp_out: str
    mlp_norm: str


def transformer_pieces(
    names: LayerNames,
    *,
    theirs: str,
    ours: str,
    layers: int,
    dim: int,
    heads: int,
    mlp_dim: int,
    key_bias: bool = True,
) -> Iterator[Piece]:
    """Yields the pieces of all layers and of the norm after the last.

    Args:
      theirs: what stands before `layers.0` and `layer_norm` in the names of their tensors.
      ours: path of our module.
    """
    split = (heads, dim // heads)
    for layer in range(layers):
        their, our = f"{theirs}layers.{layer}.", f"{ours}/layers/"

        def piece(parameter: str, source: str, layout: Layout, layer: int = layer, our: str = our) -> Piece:
            return Piece(our + parameter, source, layout, layer=layer)

        for name in ("query", "key", "value"):
            source = f"{their}{names.attention}.{name[0]}_proj"
            yield piece(f"attention/{name}/kernel", f"{source}.weight", transposed((dim,), split))
            if key_bias or name != "key":
                yield piece(f"attention/{name}/bias", f"{source}.bias", Layout((dim,), split))
        source = f"{their}{names.attention}.out_proj"
        yield piece("attention/out/kernel", f"{source}.weight", transposed(split, (dim,)))
        yield piece("attention/out/bias", f"{source}.bias", same((dim,)))
        for name, source, inputs, outputs in (
            ("wi", their + names.mlp_in, dim, mlp_dim),
            ("wo", their + names.mlp_out, mlp_dim, dim),
        ):
            yield piece(f"mlp/{name}/kernel", f"{source}.weight", transposed((inputs,), (outputs,)))
            yield piece(f"mlp/{name}/bias", f"{source}.bias", same((outputs,)))
        for name, source in (
            ("pre_attention_layer_norm", their + names.attention_norm),
            ("pre_mlp_layer_norm", their + names.mlp_norm),
        ):
            yield piece(f"{name}/scale", f"{source}.weight", same((dim,)))
            yield piece(f"{name}/bias", f"{source}.bias", same((dim,)))
    yield from norm_pieces(f"{ours}/norm", f"{theirs}layer_norm", dim)


def norm_pieces(ours: str, theirs: str, dim: int) -> Iterator[Piece]:
    """Yields scale and bias of a layer norm."""
    yield Piece(f"{ours}/scale", f"{theirs}.weight", same((dim,)))
    yield Piece(f"{ours}/bias", f"{theirs}.bias", same((dim,)))


def conv_pieces(
    ours: str, theirs: str, taps: int, inputs: int, outputs: int, use_bias: bool = True
) -> Iterator[Piece]:
    """Yields the kernel of a convolution, torch's [O, I, W] and ours [W, I, O], and its bias."""
    layout = Layout((outputs, inputs, taps), (taps, inputs, outputs), order=(2, 1, 0))
    yield Piece(f"{ours}/kernel", f"{theirs}.weight", layout)
    if use_bias:
        yield Piece(f"{ours}/bias", f"{theirs}.bias", same((outputs,)))
