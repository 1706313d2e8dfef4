"""Any network by its configuration, and the shapes of its parameters before there are any."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_jax.models.encoders import encoder_class
from slm_jax.models.t5 import T5, T5Config


def boxed_params(config: Any) -> dict[str, Any]:
    """Returns the parameters of a T5 or a speech encoder as ShapeDtypeStructs, boxed with logical axes.

    Args:
      config: `T5Config`, or one of `encoders.ENCODERS`.

    Raises:
      UserError: it configures no network.
    """
    key = jax.random.key(0)
    if isinstance(config, T5Config):
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return dict(jax.eval_shape(T5(config).init, key, tokens, tokens, tokens, tokens))["params"]
    encoder = encoder_class(config)(config)
    # As much as any front end wants to see at the least.
    speech = jax.ShapeDtypeStruct((1, 1, 4 * encoder.samples_per_frame), jnp.int16)
    segments = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.int32)
    return dict(jax.eval_shape(encoder.init, key, speech, segments))["params"]


def abstract_params(config: Any) -> dict[str, Any]:
    """Returns `boxed_params` without their boxes."""
    return nn.unbox(boxed_params(config))
