"""The device mesh: axes `slice`, `data`, `fsdp` and `tensor`, in this order."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from slm_jax.errors import UserError

# From the slowest network to the fastest: between slices it is the data centre's.
MESH_AXES = ("slice", "data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, slices: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arranges devices as a mesh with axes `slice`, `data`, `fsdp` and `tensor`.

    Args:
      data: number of replicas of the parameters; -1 takes what the other axes leave.
      fsdp: ways in which parameters and batch are both split; -1 takes what is left.
      tensor: ways in which heads, MLP and vocabulary are split; -1 takes what is left.
      slices: size of the axis `slice`, across which the network is slow. On TPU the number of slices; on
        other platforms the processes, in their order, are divided into so many groups.
      devices: the devices to arrange, which may be a topology's; all of the run's by default.

    Raises:
      UserError: the product of the axes is not the number of devices, the devices lie in another number of
        slices, or a TPU's network cannot be split that way.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill(dict(zip(MESH_AXES, (slices, data, fsdp, tensor), strict=True)), len(devices))
    arrange = _on_torus if all(device.platform == "tpu" for device in devices) else _in_order
    return Mesh(arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _on_torus(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    """On TPU the order of devices decides which axis rides which links of the torus."""
    from jax.experimental import mesh_utils

    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["slice"] != slices:
        raise UserError(
            f"mesh {_text(sizes)}: the devices lie in {slices} TPU slice(s); expected slice={slices}"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"mesh {_text(sizes)} does not fit the TPU's network: {reason}") from error


def _in_order(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    slices = sizes["slice"]
    if slices > 1:
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        processes = [device.process_index for device in devices]
        each = len(devices) // slices
        # One process is a stand-in for several, as in tests; more must not lie across two slices.
        if processes[0] != processes[-1] and any(
            processes[start - 1] == processes[start] for start in range(each, len(devices), each)
        ):
            raise UserError(
                f"mesh {_text(sizes)}: {len(set(processes))} processes cannot be divided into {slices} "
                "slices; expected a number of slices that divides them"
            )
    return np.asarray(devices).reshape(tuple(sizes.values()))


def _fill(sizes: dict[str, int], devices: int) -> dict[str, int]:
    text = _text(sizes)
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


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
