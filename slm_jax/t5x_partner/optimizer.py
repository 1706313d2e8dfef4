"""The optimizers of slm_jax inside T5X."""

from typing import Any

import flax.core
import jax
from t5x import adafactor as t5x_adafactor  # pyright: ignore[reportMissingImports]
from t5x import optimizers as t5x_optimizers  # pyright: ignore[reportMissingImports]

from slm_jax.errors import UserError
from slm_jax.partitioning.rules import LOGICAL_AXES
from slm_jax.training.optimizers import AdamWConfig, OptimizerConfig, make_optimizer


class ConfiguredOptimizer(t5x_optimizers.OptaxWrapper):
    """The Optax transformation that slm_jax makes of a configuration, with its own learning rate.

    Args:
      config: an AdamWConfig; T5X knows the slots of AdamW, and has an Adafactor of its own.

    Raises:
      UserError: it is another one.
    """

    def __init__(self, config: OptimizerConfig):
        if not isinstance(config, AdamWConfig):
            raise UserError(
                f"OPTIMIZER is {type(config).__name__}, expected @optimizers.AdamWConfig(); T5X's own "
                "optimizers, such as @adafactor.Adafactor(), are bound to SLMModel.optimizer_def"
            )
        super().__init__(make_optimizer(config, {}))
        self._config = config

    def set_param_axes(self, param_logical_axes: Any) -> None:
        """Takes the logical axes of the parameters, which say what weight decay spares."""
        axes = jax.tree.map(
            tuple,
            flax.core.unfreeze(param_logical_axes),
            is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec),
        )
        self.optax_optimizer = make_optimizer(self._config, flax.core.freeze(axes))


def logical_factor_rules() -> Any:
    """Which axes T5X's Adafactor factors: its standard rules, with the axes that T5X's models lack."""
    column = t5x_adafactor.FactorDim.COLUMN
    rules = dict.fromkeys(LOGICAL_AXES, t5x_adafactor.FactorDim.NONE)
    known = dict(t5x_adafactor.standard_logical_factor_rules())
    return flax.core.freeze({**rules, **known, "gates": column, "lora_rank": column})
