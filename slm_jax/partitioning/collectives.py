"""What a compiled program sends between devices and moves in memory, counted in its HLO text.

XLA's own analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Over the whole of a closed 3D torus the TPU compiler gathers so: each device puts its part into zeros.
GATHER_BY_SUM = "all-gather by all-reduce"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
# Between TPU slices hosts exchange what devices hand to them.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
# They move nothing, or what they call is counted by itself; of a pair of start and done, the end counts.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "iota", "async-update", "async-done",
}  # fmt: skip


class Collective(NamedTuple):
    """Collectives of one kind over the same axes.

    Attributes:
      kind: of `KINDS`, or `GATHER_BY_SUM`.
      axes: of the mesh, over which devices exchange.
      group: devices that exchange with one another.
      count: in a step.
      bytes: in a step, of the whole arrays, gathered or not yet scattered, on a device.
      rings: dims of a TPU's torus round which it goes at a time, where the compiler says so of its gathers.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int
    rings: int | None = None


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str


def count_collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Counts the collectives of a compiled program, by kind and axes.

    Args:
      hlo: of `compiled.as_text()`.
      mesh: that it was compiled for.
    """
    sums: dict[tuple[str, tuple[str, ...], int, int | None], tuple[int, int]] = {}
    computations = _parse(hlo)
    for computation, instruction, runs in _walk(computations):
        axes, group = (), 1
        if instruction.opcode.removesuffix("-start") in KINDS:
            axes, group = _axes(instruction.rest, mesh)
        elif instruction.opcode == "send" and _BETWEEN_SLICES.search(instruction.rest):
            axes, group = ("slice",), mesh.shape["slice"]
        if group == 1:
            continue
        found = re.search(r'"emitter":"(\d)DAllGather', instruction.rest)
        rings = int(found.group(1)) if found else None
        for kind, size in _sent(computations, computation, instruction, group).items():
            count, total = sums.get((kind, axes, group, rings), (0, 0))
            sums[kind, axes, group, rings] = (count + runs, total + runs * size)
    return sorted(
        (Collective(*key[:3], *value, key[3]) for key, value in sums.items()),
        key=lambda one: one.bytes,
        reverse=True,
    )


def _sent(
    computations: dict[str, list[_Instruction]], computation: str, instruction: _Instruction, group: int
) -> dict[str, int]:
    """Bytes of the whole arrays of one collective, by kind."""
    kind, arrays = instruction.opcode.removesuffix("-start"), list(_arrays(instruction.type))
    if found := _BETWEEN_SLICES.search(instruction.rest):
        kind = found.group(1).lower().replace("_", "-")
        return {kind: arrays[0] * (group if kind == "all-gather" else 1)}
    if kind != "all-reduce":
        if instruction.opcode.endswith("-start"):
            # Operands, as many results, and what belongs to the device.
            count = len(_operands(instruction))
            arrays = arrays[count : 2 * count]
        size = sum(arrays)
        return {kind: size * group if kind == "reduce-scatter" else size}
    # On TPU a reduce-scatter is a fusion of an all-reduce and the choice of a part.
    if "all-reduce-scatter" in computation:
        return {"reduce-scatter": sum(arrays)}
    # One instruction sums several arrays, some of which may be gathered.
    sizes: dict[str, int] = {}
    for size, operand in zip(arrays, _operands(instruction), strict=True):
        one = GATHER_BY_SUM if _is_part_in_zeros(computations, computation, operand) else kind
        sizes[one] = sizes.get(one, 0) + size
    return sizes


def _is_part_in_zeros(computations: dict[str, list[_Instruction]], computation: str, name: str) -> bool:
    """Whether a value is an array of which one part was put in its place just before."""
    by_name = {instruction.name: instruction for instruction in computations[computation]}
    index = 0
    while (instruction := by_name.get(name)) and instruction.opcode != "dynamic-update-slice":
        operands = _operands(instruction)
        if instruction.opcode == "fusion":
            inside = computations[_CALLED.findall(instruction.rest)[0]]
            by_name, name = {inner.name: inner for inner in inside}, inside[-1].name
        elif instruction.opcode == "get-tuple-element":
            index = int(re.findall(r"index=(\d+)", instruction.rest)[0])
            name = operands[0]
        elif instruction.opcode == "tuple":
            name = operands[index]
        elif instruction.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
            name = operands[0]
        else:
            return False
    return instruction is not None


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def memory_traffic(hlo: str) -> int:
    """Estimates bytes that a device moves to and from its memory: each result is written and read once.

    What is inside a fusion stays on the chip, and of an array that is written in place only the part counts.
    """
    computations, total = _parse(hlo), 0
    for computation, instruction, runs in _walk(computations, into_fusions=False):
        if instruction.opcode in _FREE or instruction.opcode.endswith("-start"):
            continue
        if "AllocateBuffer" in instruction.rest:
            continue
        size = _in_memory(instruction.type)
        if instruction.opcode == "dynamic-update-slice":
            size -= _in_place(computations[computation], instruction)
        elif instruction.opcode == "fusion":
            for called in _CALLED.findall(instruction.rest):
                inside = computations.get(called, [])
                updates = [inner for inner in inside if inner.opcode == "dynamic-update-slice"]
                size -= sum(_in_place(inside, update) for update in updates)
        total += 2 * runs * max(size, 0)
    return total


def instructions(hlo: str) -> Iterator[tuple[_Instruction, int]]:
    """Yields each instruction of a compiled program that runs, and how often it does."""
    for _, instruction, runs in _walk(_parse(hlo)):
        yield instruction, runs


def _in_place(computation: list[_Instruction], update: _Instruction) -> int:
    """Bytes of the result of a dynamic-update-slice that stay as they were."""
    types = {instruction.name: instruction.type for instruction in computation}
    return _in_memory(update.type) - _in_memory(types.get(_operands(update)[1], ""))


def _parse(hlo: str) -> dict[str, list[_Instruction]]:
    """Instructions by computation; the entry's name is ''."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    for line in hlo.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations.setdefault("" if found.group(1) else found.group(2), [])
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()))
    return computations


def _walk(
    computations: dict[str, list[_Instruction]], into_fusions: bool = True
) -> Iterator[tuple[str, _Instruction, int]]:
    """Yields every instruction that runs, with its computation and how often it does."""

    def of(name: str, runs: int) -> Iterator[tuple[str, _Instruction, int]]:
        for instruction in computations.get(name, ()):
            yield name, instruction, runs
            called, rest = [], instruction.rest
            times = _rounds(computations, rest) if instruction.opcode == "while" else 1
            if instruction.opcode in ("call", "async-start", "while") or (
                instruction.opcode == "fusion" and into_fusions
            ):
                called = _CALLED.findall(rest)
            elif instruction.opcode == "conditional":
                for several, one in _BRANCHES.findall(rest):
                    called += [branch.strip().lstrip("%") for branch in (several or one).split(",")]
            for inner in called:
                yield from of(inner, runs * times)

    yield from of("", 1)


def _rounds(computations: dict[str, list[_Instruction]], rest: str) -> int:
    """How often a loop runs: what XLA notes, or the bound that its counter is compared with, from 0."""
    if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest):
        return int(found.group(1))
    condition = re.search(r"\bcondition=%?([\w.\-]+)", rest)
    instructions = computations.get(condition.group(1), []) if condition else []
    bounds = [
        int(found.group(1))
        for instruction in instructions
        if instruction.opcode == "constant" and (found := re.match(r"(\d+)\)", instruction.rest))
    ]
    # A loop of unknown length, such as one until nothing changes, counts once.
    return max(bounds, default=1)


def _arrays(text: str) -> Iterator[int]:
    """Yields bytes of the arrays of a type."""
    for dtype, sizes, _ in _ARRAY.findall(text):
        yield _bytes(dtype, sizes)


def _in_memory(text: str) -> int:
    """Bytes of those arrays of a type that lie in the device's main memory, which is space 0 in layouts."""
    return sum(_bytes(dtype, sizes) for dtype, sizes, layout in _ARRAY.findall(text) if "S(" not in layout)


def _bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype.replace("bf", "")))
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _axes(rest: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The axes along which devices exchange, and how many of them do with one another."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        pairs = np.array([int(number) for number in re.findall(r"\d+", found.group(1))]).reshape(-1, 2)
        moved = pairs[pairs[:, 0] != pairs[:, 1]]
        groups = moved if len(moved) else pairs[:, :1]
    else:
        groups = _groups(rest, mesh.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), -1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, other in zip(mesh.axis_names, differ, strict=True) if other), groups.shape[1]


def _groups(rest: str, devices: int) -> np.ndarray:
    """Device numbers [groups, devices of a group] of an instruction's `replica_groups`."""
    if found := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", rest):
        rows = re.findall(r"\{([\d,\s]*)\}", found.group(1))
        return np.array([[int(number) for number in row.split(",")] for row in rows])
    if found := re.search(r"replica_groups=\[([\d,]+)\](?:<=(\[[\d,]+\](?:T\([\d,]+\))?))", rest):
        return _order(found.group(2)).reshape([int(size) for size in found.group(1).split(",")])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", rest):
        return _mesh_groups(*found.groups())
    return np.arange(devices)[None]


def _mesh_groups(axes: str, order: str | None, chosen: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = (_order(order) if order else np.arange(math.prod(sizes.values()))).reshape(list(sizes.values()))
    # An axis may be taken in part, as 'axis':(size before)size.
    shape: list[int] = []
    inside: list[int] = []
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", chosen)
    }
    whole = set(re.findall(r"'([^']+)'(?!:)", chosen))
    for name, size in sizes.items():
        before, middle = parts.get(name, (1, size))
        if name in parts or name in whole:
            inside.append(len(shape) + 1)
        shape += [before, middle, size // before // middle]
    ids = ids.reshape(shape)
    outside = [dim for dim in range(ids.ndim) if dim not in inside]
    return ids.transpose(outside + inside).reshape(-1, math.prod(shape[dim] for dim in inside))


def _order(text: str) -> np.ndarray:
    """Numbers in the order that `[dims]T(permutation)` gives them."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found, text
    dims = [int(size) for size in found.group(1).split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose([int(dim) for dim in found.group(2).split(",")]) if found.group(2) else ids).ravel()
