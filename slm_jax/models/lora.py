"""Rank-stabilised LoRA: a low-rank product beside a frozen kernel (arXiv 2106.09685; its scale, 2312.03732).

A projection x W becomes x W + alpha / sqrt(rank) * (x A) B. A starts normal and B as zeros, so that a model
starts as the one it was. `lora_a` has the kernel's contracted dims and then the rank, `lora_b` the rank and
then the kernel's other dims; both are float32 in the collection `lora`, and stacked layers are stacked.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError, check_whole, is_number, nearest
from slm_jax.models.quantization import SCALE

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which projections get a low-rank product, and of what size.

    Attributes:
      rank: of the product.
      alpha: the product is scaled by alpha / sqrt(rank), so that a higher rank learns as fast (2312.03732).
      projections: names of projections, or the ends of their paths: `query` is that of every attention,
        `self_attention/query` that of the decoder's self-attention, `encoder/mlp/wo` one of the encoder.
      dropout: rate on the input of the low-rank product, in training.
    """

    rank: int = 8
    alpha: float = 8.0
    projections: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0

    def __post_init__(self):
        # Lists (from JSON or gin) become tuples, so that configurations stay hashable.
        names = self.projections
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"LoRAConfig.projections is {names!r}, expected a list, such as ['query', 'value']"
            )
        object.__setattr__(self, "projections", tuple(self.projections))
        check_whole("LoRAConfig.rank", self.rank)
        for name, below, expected in (("alpha", math.inf, "above 0"), ("dropout", 1, "from 0 to below 1")):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < below or (name == "alpha" and value == 0):
                raise UserError(f"LoRAConfig.{name} is {value!r}, expected a number {expected}")
        if not self.projections:
            raise UserError("LoRAConfig.projections is empty, expected names such as 'query' and 'value'")

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / math.sqrt(self.rank)

    def selects(self, path: str) -> bool:
        """Whether the projection at a path, such as `encoder/attention/query`, gets a product."""
        return any(path == name or path.endswith(f"/{name}") for name in self.projections)

    def check(self, paths: Iterable[str]) -> None:
        """Raises UserError where a name is that of no projection.

        Args:
          paths: of all projections of the model.
        """
        paths = list(paths)
        for name in self.projections:
            if not any(path == name or path.endswith(f"/{name}") for path in paths):
                ends = {path.split("/", start)[-1] for path in paths for start in range(3)}
                raise UserError(f"LoRAConfig.projections has {name!r}{nearest(name, sorted(ends))}")


def merged(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Returns parameters whose kernels have their low-rank products in them, added in float32.

    Args:
      params: nested dictionaries of the base, unboxed; a kernel keeps its dtype.
      lora: what the collection `lora` holds beside it.
      config: what the products were trained with.

    Raises:
      UserError: a kernel is int8, which has no room for a small difference.
    """
    found = dict(params)
    for name, branch in lora.items():
        if name in (A, B):
            continue
        found[name] = merged(params[name], branch, config)
    if A in lora:
        if "kernel" + SCALE in params:
            raise UserError(
                "LoRA is merged into floats, and the frozen LLM is held as int8; expected "
                "FROZEN_WEIGHTS = 'float'"
            )
        found["kernel"] = _merged_kernel(params["kernel"], lora[A], lora[B], config.scale)
    return found


def _merged_kernel(kernel: Any, a: Any, b: Any, scale: float) -> jax.Array:
    # Stacked layers have the same first dim in all three.
    stacked = a.ndim + b.ndim - kernel.ndim == 3
    rank = a.shape[-1]
    layers = kernel.shape[0] if stacked else 1
    product = jnp.matmul(
        jnp.asarray(a, jnp.float32).reshape(layers, -1, rank),
        jnp.asarray(b, jnp.float32).reshape(layers, rank, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    kernel = jnp.asarray(kernel)
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
