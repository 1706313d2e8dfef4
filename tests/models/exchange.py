"""A published model's tensors as our parameters and back, with nothing left over on either side."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from slm_jax.checkpoints.families.base import Family
from slm_jax.checkpoints.families.mapping import Piece
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.models.networks import abstract_params


def perturb(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draws every parameter anew, so that norms and biases matter too; matrices keep activations' scale."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            noise = rng.normal(size=shape)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * noise
            elif "original0" in name:
                value = 1 + 0.3 * np.abs(noise)
            elif len(shape) < 2:
                value = 0.2 * noise
            else:
                value = noise / np.sqrt(np.prod(shape[1:]))
            parameter.copy_(torch.from_numpy(np.asarray(value, np.float32)))


def named(model: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The model's tensors by name."""
    return {prefix + name: tensor.numpy() for name, tensor in model.state_dict().items()}


def infos(tensors: Mapping[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def to_ours(family: Family, config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters; asserts that every tensor is used once or unused, and every parameter filled."""
    pieces = family.pieces(config, infos(tensors))
    sources = [piece.source for piece in pieces]
    left = set(tensors) - set(sources)
    assert len(set(sources)) == len(sources) and all(family.unused(name) for name in left), left
    assert not any(family.unused(name) for name in sources)
    abstract = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    ours = {name: np.full(leaf.shape, np.nan, leaf.dtype) for name, leaf in abstract.items()}
    assert {piece.parameter for piece in pieces} == set(ours)
    for piece in pieces:
        assert tensors[piece.source].shape == piece.layout.theirs, piece
        place = ours[piece.parameter] if piece.layer is None else ours[piece.parameter][piece.layer]
        assert place.shape == piece.layout.ours and np.isnan(place).all(), piece
        place[...] = piece.layout.to_ours(tensors[piece.source])
    assert not any(np.isnan(value).any() for value in ours.values())
    return nested(ours)


def to_theirs(pieces: list[Piece], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors by name."""
    found = {}
    for piece in pieces:
        value: Any = params
        for key in piece.parameter.split("/"):
            value = value[key]
        found[piece.source] = piece.layout.to_theirs(value if piece.layer is None else value[piece.layer])
    return found


def check_shapes(family: Family, config: Any, theirs: torch.nn.Module) -> None:
    """Asserts that a model, which may lie on the meta device, has just the tensors that would be written."""
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {piece.source: piece.layout.theirs for piece in family.hf_pieces(config)} == shapes


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
