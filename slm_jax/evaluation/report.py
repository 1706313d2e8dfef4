"""What a run reached, for people and for programs: a table, sample transcripts, and `summary.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_jax.errors import UserError
from slm_jax.evaluation.evaluator import Hypothesis, TaskResult, replace_text

TaskMetrics = Mapping[str, Mapping[str, float]]


def summary(before: TaskMetrics, after: TaskMetrics, seconds: Mapping[str, float]) -> dict:
    """Returns the content of `summary.json`.

    Args:
      before: task -> metric -> value without the trained part.
      after: the same with it.
      seconds: stage -> wall-clock seconds.

    Returns:
      `{"tasks": {task: {metric: {"before": x, "after": y}}}, "seconds": {stage: s}}`; a value that was
      not measured, or is not finite, is null.
    """
    tasks: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, metric in _rows(before, after):
        tasks.setdefault(task, {})[metric] = {
            "before": _finite(before.get(task, {}).get(metric)),
            "after": _finite(after.get(task, {}).get(metric)),
        }
    return {"tasks": tasks, "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()}}


def write_summary(path: Path, before: TaskMetrics, after: TaskMetrics, seconds: Mapping[str, float]) -> None:
    """Writes `summary(...)` as JSON, as a whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(summary(before, after, seconds), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        replace_text(path, text + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the summary ({error.strerror}), expected a writable folder"
        ) from error


def table(before: TaskMetrics, after: TaskMetrics) -> Table:
    """Returns the table task, metric, before, after."""
    drawn = Table(title="Before and after training")
    for heading in ("task", "metric"):
        drawn.add_column(heading)
    for heading in ("before", "after"):
        drawn.add_column(heading, justify="right")
    last = None
    for task, metric in _rows(before, after):
        drawn.add_row(
            Text("" if task == last else task),
            Text(metric),
            _value(before.get(task, {}).get(metric)),
            _value(after.get(task, {}).get(metric)),
        )
        last = task
    return drawn


def sample_lines(results: Mapping[str, TaskResult], count: int = 5, seed: int = 0) -> list[Text]:
    """Returns `count` transcripts for a person to read, drawn evenly from the tasks, no example twice.

    Args:
      results: task -> result.
      count: how many, or fewer where there are fewer.
      seed: of the draw.
    """
    drawn = []
    for task, line in _draw(results, count, np.random.default_rng(seed)):
        said = line.prediction if line.reject_reason is None else f"(rejected: {line.reject_reason})"
        text = Text(f"{task}  {line.id}\n", style="bold")
        text.append(
            f"  prompt    {line.prompt}\n  expected  {line.target}\n  got       {said}", style="not bold"
        )
        drawn.append(text)
    return drawn


def print_report(
    before: TaskMetrics,
    after: TaskMetrics,
    results: Mapping[str, TaskResult],
    console: Console | None = None,
) -> None:
    """Prints the table and five sample transcripts."""
    console = console or Console()
    console.print(table(before, after))
    for text in sample_lines(results):
        console.print(text, soft_wrap=True)


def _rows(before: TaskMetrics, after: TaskMetrics) -> list[tuple[str, str]]:
    return [
        (task, metric)
        for task in dict.fromkeys([*before, *after])
        for metric in dict.fromkeys([*before.get(task, {}), *after.get(task, {})])
    ]


def _draw(
    results: Mapping[str, TaskResult], count: int, rng: np.random.Generator
) -> list[tuple[str, Hypothesis]]:
    orders: dict[str, Sequence[int]] = {
        task: rng.permutation(len(result.hypotheses)).tolist() for task, result in results.items()
    }
    longest = max(map(len, orders.values()), default=0)
    turns = [
        (task, results[task].hypotheses[order[turn]])
        for turn in range(longest)
        for task, order in orders.items()
        if turn < len(order)
    ]
    return turns[:count]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _value(value: float | None) -> Text:
    return Text("-" if value is None else f"{value:.1f}")
