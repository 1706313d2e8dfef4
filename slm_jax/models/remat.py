"""Rematerialisation: what a layer keeps for the backward pass, and what it computes again."""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

REMAT = ("none", "dots", "frozen", "full")

# What the backward pass of a frozen layer needs. Its products with weights are linear and have no weight
# gradient, so they need no input; norms, activations and attention do.
_OF_FROZEN = "input of what is not linear"


def kept_when_frozen(x: jax.Array) -> jax.Array:
    """Marks the input of a norm, an activation or attention, which is all that the policy `frozen` keeps."""
    return checkpoint_name(x, _OF_FROZEN)


def rematted(layer: type[nn.Module], remat: str, *, prevent_cse: bool = False) -> Any:
    """Lifts a layer to one that keeps less of its forward pass.

    Args:
      layer: the module.
      remat: `none` keeps all that the backward pass uses; `dots` keeps the results of products with weights;
        `frozen` keeps what a frozen layer's backward pass needs, so that no product with weights runs twice;
        `full` keeps the layer's input alone, and runs it again.
      prevent_cse: whether the compiler may take the second run for the first; inside a scan it cannot.
    """
    if remat == "none":
        return layer
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "frozen": jax.checkpoint_policies.save_only_these_names(_OF_FROZEN),
        "full": None,
    }
    return nn.remat(layer, prevent_cse=prevent_cse, policy=policies[remat])
