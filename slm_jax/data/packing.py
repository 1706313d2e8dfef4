"""Several examples in a row: best-fit decreasing over three capacities at once.

A row holds speech (positions of a slot, or slots of one utterance each), text-input tokens, positions of the
LLM's encoder and decoder tokens. References are taken largest first, by the share of the capacity that they
use most of; each goes to the row that its speech fills up best, of those where everything else fits too.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from slm_jax.data.batch import BatchShape
from slm_jax.errors import UserError


class Sizes(NamedTuple):
    """What references take, int64 [n] each: speech positions, text-input tokens, target tokens."""

    positions: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray

    def at(self, indices: np.ndarray) -> Sizes:
        """Returns those of some references."""
        return Sizes(*(values[indices] for values in self))


class Packed(NamedTuple):
    """Where references lie.

    Attributes:
      row: int64 [n].
      slot: of its speech, int64 [n].
      first: speech position where it starts in the slot, int64 [n].
      rows: how many rows there are.
    """

    row: np.ndarray
    slot: np.ndarray
    first: np.ndarray
    rows: int


def one_each(sizes: Sizes) -> Packed:
    """Gives each reference a row of its own."""
    count = len(sizes.positions)
    nothing = np.zeros(count, np.int64)
    return Packed(np.arange(count), nothing, nothing, count)


def pack(sizes: Sizes, shape: BatchShape) -> Packed:
    """Packs references, none of which is too long for a row.

    Args:
      sizes: of the references, in an order that decides between equals.
      shape: capacities of a row. With one slot, up to `segments` utterances share its positions; with
        several, each utterance has a slot of its own.
    """
    spoken = sizes.positions > 0
    in_slots = shape.slots > 1
    # What speech takes of a row, in slots or in positions, and how much there is of it.
    need = spoken.astype(np.int64) if in_slots else sizes.positions
    room = shape.slots if in_slots else shape.positions
    utterances = shape.slots if in_slots else shape.segments
    layout = sizes.positions + sizes.inputs
    shares = [
        need / max(room, 1),
        layout / shape.layout,
        sizes.inputs / shape.inputs,
        sizes.targets / shape.targets,
        spoken / max(utterances, 1),
    ]
    order = np.argsort(-np.max(shares, axis=0), kind="stable")
    # A row that has not even this left is full.
    least = [int(np.min(values)) if len(order) else 0 for values in (layout, sizes.inputs, sizes.targets)]
    row = np.zeros(len(order), np.int64)
    used = np.zeros(len(order), np.int64)
    # Rows that may still take something, by what speech they have room for: (room, number of the row).
    open_rows: list[tuple[int, int]] = []
    left: list[_Left] = []
    for item, n, a, b, c, u in zip(
        order.tolist(),
        need[order].tolist(),
        layout[order].tolist(),
        sizes.inputs[order].tolist(),
        sizes.targets[order].tolist(),
        spoken[order].tolist(),
        strict=True,
    ):
        at = bisect_left(open_rows, (n, -1))
        while at < len(open_rows):
            free, number = open_rows[at]
            rest = left[number]
            if rest[0] >= a and rest[1] >= b and rest[2] >= c and rest[3] >= u:
                del open_rows[at]
                break
            at += 1
        else:
            number, free = len(left), room
            rest = _Left(shape.layout, shape.inputs, shape.targets, utterances)
            left.append(rest)
        row[item], used[item] = number, room - free
        rest = left[number] = _Left(rest[0] - a, rest[1] - b, rest[2] - c, rest[3] - u)
        if rest[0] >= least[0] and rest[1] >= least[1] and rest[2] >= least[2]:
            insort(open_rows, (free - n, number))
    used[~spoken] = 0
    nothing = np.zeros(len(order), np.int64)
    return Packed(row, used if in_slots else nothing, nothing if in_slots else used, len(left))


class _Left(NamedTuple):
    """What a row has left."""

    layout: int
    inputs: int
    targets: int
    utterances: int


def bucket_shapes(shape: BatchShape, buckets: tuple[int, ...]) -> tuple[BatchShape, ...]:
    """Returns the shapes of rows whose slots are as long as the utterances of a bucket.

    Args:
      shape: of the longest.
      buckets: samples of a slot, ascending; rounded up to whole positions. The longest is the shape's own.

    Raises:
      UserError: a bucket is longer than that.
    """
    if buckets and max(buckets) > shape.samples:
        raise UserError(
            f"DataConfig.buckets has {max(buckets)} samples, expected at most the {shape.samples} of a slot: "
            "lengthen TASK_FEATURE_LENGTHS['speech'] or leave the bucket out"
        )
    lengths = dict.fromkeys(
        min(-(-samples // shape.samples_per_position) * shape.samples_per_position, shape.samples)
        for samples in (*buckets, shape.samples)
    )
    return tuple(_with_slots_of(shape, samples) for samples in sorted(lengths))


def _with_slots_of(shape: BatchShape, samples: int) -> BatchShape:
    positions = samples // shape.samples_per_position
    layout = min(shape.layout, shape.slots * positions + shape.inputs)
    return dataclasses.replace(shape, samples=samples, layout=layout)


def pack_in_buckets(sizes: Sizes, shapes: tuple[BatchShape, ...]) -> tuple[Packed, np.ndarray]:
    """Packs references into rows of several shapes, whole steps of each.

    What does not fill a step of its bucket goes to the next longer one; the last step of the longest is
    filled up with empty rows.

    Args:
      sizes: of the references.
      shapes: of the buckets, ascending; their `rows` are those of a step.

    Returns:
      Where the references lie, and the bucket of each row, int64 [rows].
    """
    limits = np.array([shape.positions for shape in shapes])
    own = np.searchsorted(limits, sizes.positions)
    row, slot, first = (np.zeros(len(own), np.int64) for _ in range(3))
    bucket_of_row: list[int] = []
    carried = np.zeros(0, np.int64)
    for bucket, shape in enumerate(shapes):
        members = np.sort(np.concatenate([carried, np.flatnonzero(own == bucket)]))
        found = pack(sizes.at(members), shape)
        last = bucket == len(shapes) - 1
        rows = -(-found.rows // shape.rows) * shape.rows if last else found.rows // shape.rows * shape.rows
        # Rows are made fullest first, so that those carried on are the emptiest.
        stays = found.row < rows
        at = members[stays]
        row[at] = found.row[stays] + len(bucket_of_row)
        slot[at], first[at] = found.slot[stays], found.first[stays]
        bucket_of_row += [bucket] * rows
        carried = members[~stays]
    return Packed(row, slot, first, len(bucket_of_row)), np.array(bucket_of_row, np.int64)
