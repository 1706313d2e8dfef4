"""Options of XLA's compiler for one program, by name: flags that no environment needs to carry."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.errors import UserError
from slm_jax.partitioning.topology import without_compilation_cache

# Compilers take options of other platforms and do nothing with them.
_PLATFORMS = {"xla_cpu_": "cpu", "xla_gpu_": "gpu", "xla_jf_": "tpu", "xla_tpu_": "tpu"}


def check_option_types(options: object) -> None:
    """Raises UserError unless `options` maps names to values that an option can have."""
    if not isinstance(options, Mapping):
        raise UserError(
            f"compiler_options is {options!r}, expected a mapping, such as "
            "{'xla_tpu_scoped_vmem_limit_kib': 98304}"
        )
    for name, value in options.items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
            raise UserError(
                f"compiler_options has {name!r}: {value!r}, expected a name and a bool, number or string"
            )


def check_compiler_options(options: Mapping[str, Any], mesh: Mesh) -> None:
    """Compiles next to nothing with these options, so that a mistake is told before anything is loaded.

    Args:
      options: name -> value.
      mesh: of the devices that programs are compiled for; they may be described and not there.

    Raises:
      UserError: an option is of another platform, or the compiler does not know it or its value.
    """
    if not options:
        return
    platform = mesh.devices.flat[0].platform
    for name in options:
        for prefix, other in _PLATFORMS.items():
            if name.startswith(prefix) and other != platform:
                raise UserError(
                    f"compiler_options has {name!r}, an option of {other}, and this run is on {platform}, "
                    "expected the gin file of its own hardware, or none"
                )
    if _refusal(options, mesh) is None:
        return
    for name, value in options.items():
        if (reason := _refusal({name: value}, mesh)) is not None:
            raise UserError(
                f"compiler_options has {name!r}: {value!r}, which the {platform} compiler refuses: {reason}"
            )
    raise UserError(
        f"compiler_options: the compiler for {platform} refuses them together: {_refusal(options, mesh)}"
    )


def _refusal(options: Mapping[str, Any], mesh: Mesh) -> str | None:
    """What the compiler has against options, None where it takes them."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda: jnp.zeros(()), out_shardings=everywhere, compiler_options=dict(options))
    try:
        with without_compilation_cache():
            program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return None
