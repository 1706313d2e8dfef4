"""What a plan holds, from lengths alone: rates, epochs, how full its rows are, and its first rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from slm_jax.data.index_table import IndexTable
from slm_jax.data.plan import Plan
from slm_jax.data.references import SAMPLE_RATE, SPEECH, Reference

# Rows are looked at until so many references have gone by.
MOST_REFERENCES = 2_000_000


@dataclass(frozen=True)
class TaskShare:
    """A task's part of a plan.

    Attributes:
      task: its name.
      references: in its table.
      hours: of speech in its table.
      rejected: references that are not in its table.
      target: share of the examples that its rate asks for.
      realised: share of the examples in the rows looked at.
      epochs: how often the steps asked for pass it, on average over its references.
    """

    task: str
    references: int
    hours: float
    rejected: int
    target: float
    realised: float
    epochs: float


@dataclass(frozen=True)
class PlanReport:
    """What the rows of a plan hold.

    Attributes:
      steps: that were asked about.
      rows: that were looked at, from the first on; all of the steps', or as many as 2,000,000 references
        fill.
      examples: in these rows.
      examples_per_row: on average.
      tasks: the parts of the tasks.
      useful: `speech`, `encoder`, `decoder` -> share of the rows that is no padding; speech counts samples,
        so that the grid on which utterances start is padding too.
      shapes: how many shapes of batches these rows have.
      audio_hours: of speech in these rows.
    """

    steps: int
    rows: int
    examples: int
    examples_per_row: float
    tasks: list[TaskShare]
    useful: dict[str, float]
    shapes: int
    audio_hours: float

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return dataclasses.asdict(self)


def report(plan: Plan, steps: int) -> PlanReport:
    """Returns what the first steps of a plan hold.

    Args:
      plan: of one stage.
      steps: to be asked about.
    """
    rows = examples = positions = tokens = samples = 0
    room = np.zeros(3)
    of_task = np.zeros(len(plan.tables), np.int64)
    buckets: set[int] = set()
    for block, first, stop in _blocks(plan, steps * plan.rows_per_step):
        members = slice(int(block.starts[first]), int(block.starts[stop]))
        rows += stop - first
        examples += members.stop - members.start
        samples += int(block.samples[members].sum())
        positions += int((block.sizes.positions[members] + block.sizes.inputs[members]).sum())
        tokens += int(block.sizes.targets[members].sum())
        of_task += np.bincount(block.task[members], minlength=len(of_task))
        for bucket, count in zip(*np.unique(block.bucket[first:stop], return_counts=True), strict=True):
            shape = plan.shapes[bucket]
            room += count * np.array([shape.slots * shape.samples, shape.layout, shape.targets])
            buckets.add(int(bucket))
    used = dict(zip(("speech", "encoder", "decoder"), (samples, positions, tokens), strict=True))
    shares = {
        name: float(value / size) for (name, value), size in zip(used.items(), room, strict=True) if size
    }
    planned = examples / max(rows, 1) * steps * plan.rows_per_step
    total = sum(plan.rates)
    tables = cast(Sequence[IndexTable], plan.tables)
    tasks = [
        TaskShare(
            task=table.task,
            references=len(table),
            hours=float(table.lengths[:, 0].sum(dtype=np.int64)) / SAMPLE_RATE / 3600,
            rejected=sum(table.report.rejected.values()),
            target=rate / total,
            realised=float(count) / max(examples, 1),
            epochs=planned * rate / total / len(table),
        )
        for table, rate, count in zip(tables, plan.rates, of_task.tolist(), strict=True)
    ]
    hours = samples / SAMPLE_RATE / 3600
    return PlanReport(
        steps, rows, examples, examples / max(rows, 1), tasks, shares, max(len(buckets), 1), hours
    )


def _blocks(plan: Plan, rows: int) -> Iterator[tuple[Any, int, int]]:
    seen = start = 0
    while start < rows and seen < MOST_REFERENCES:
        # A block at a time: far more rows than asked for may be in the plan.
        found = plan.blocks(start, 1)
        if not found:
            return
        block, first, _ = found[0]
        stop = min(block.rows, first + rows - start)
        yield block, first, stop
        seen += int(block.starts[stop] - block.starts[first])
        start += stop - first


def readable(reference: Reference, inputs: Any, targets: Any) -> tuple[str, str]:
    """Returns the prompt and the target of a reference as text; the speech as its length.

    Args:
      reference: the example.
      inputs, targets: SeqIO vocabularies.
    """
    speech = f"<{reference.samples / SAMPLE_RATE:.2f} s of speech>"
    (places,) = np.nonzero(reference.inputs == SPEECH)
    cut = int(places[0]) if len(places) else len(reference.inputs)
    parts = [inputs.decode(reference.inputs[:cut].tolist())]
    if len(places):
        parts += [speech, inputs.decode(reference.inputs[cut + 1 :].tolist())]
    return " ".join(part for part in parts if part), targets.decode(reference.targets.tolist())
