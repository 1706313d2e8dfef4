"""The device mesh: axes `data`, `fsdp` and `tensor`, in this order."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from slm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices as a mesh with axes `data`, `fsdp` and `tensor`.

    Args:
      data: number of replicas of the parameters; -1 takes what the other axes leave.
      fsdp: ways in which parameters and batch are both split; -1 takes what is left.
      tensor: ways in which heads, MLP and vocabulary are split; -1 takes what is left.
      devices: the devices to arrange; all of the run's by default.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill(dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True)), len(devices))
    shape = tuple(sizes.values())
    if len({device.platform for device in devices}) == 1 and devices[0].platform == "tpu":
        # On TPU the order of devices decides which axis rides which links of the torus.
        from jax.experimental import mesh_utils

        arranged = mesh_utils.create_device_mesh(shape, devices=devices)
    else:
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _fill(sizes: dict[str, int], devices: int) -> dict[str, int]:
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {text}: an axis is a number from 1, and at most one may be -1")
    product = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if devices % product:
            raise UserError(
                f"mesh {text}: {devices} devices are not divisible by {product}, the product of fixed axes"
            )
        return {**sizes, open_axes[0]: devices // product}
    if product != devices:
        raise UserError(f"mesh {text} needs {product} devices, found {devices}")
    return sizes
