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

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
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
      kind: of `KINDS`.
      axes: of the mesh, over which devices exchange.
      group: devices that exchange with one another.
      count: in a step.
      bytes: in a step, of the whole arrays, gathered or not yet scattered, on a device.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int


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
    sums: dict[tuple[str, tuple[str, ...], int], tuple[int, int]] = {}
    for computation, instruction, runs in _walk(_parse(hlo)):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # On TPU a reduce-scatter is a fusion of an all-reduce and the choice of a part.
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        axes, group = _axes(instruction.rest, mesh)
        if group == 1:
            continue
        arrays = list(_arrays(instruction.type))
        size = max(arrays) if instruction.opcode.endswith("-start") and kind != "all-reduce" else sum(arrays)
        if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
            size *= group
        count, total = sums.get((kind, axes, group), (0, 0))
        sums[kind, axes, group] = (count + runs, total + runs * size)
    return sorted(
        (Collective(*key, *value) for key, value in sums.items()), key=lambda one: one.bytes, reverse=True
    )


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


def _in_place(computation: list[_Instruction], update: _Instruction) -> int:
    """Bytes of the result of a dynamic-update-slice that stay as they were."""
    operands = re.findall(r"%([\w.\-]+)", update.rest.split(")")[0])
    types = {instruction.name: instruction.type for instruction in computation}
    return _in_memory(update.type) - _in_memory(types.get(operands[1], ""))


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
