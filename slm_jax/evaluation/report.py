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


def summary(columns: Mapping[str, TaskMetrics], seconds: Mapping[str, float]) -> dict:
    """Returns the content of `summary.json`.

    Args:
      columns: name, such as `before` and `after` the training -> task -> metric -> value.
      seconds: stage -> wall-clock seconds.

    Returns:
      `{"tasks": {task: {metric: {"before": x, "after": y}}}, "seconds": {stage: s}}`; a value that was
      not measured, or is not finite, is null.
    """
    tasks: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, metric in _rows(columns):
        tasks.setdefault(task, {})[metric] = {
            name: _finite(scores.get(task, {}).get(metric)) for name, scores in columns.items()
        }
    return {"tasks": tasks, "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()}}


def write_summary(path: Path, columns: Mapping[str, TaskMetrics], seconds: Mapping[str, float]) -> None:
    """Writes `summary(...)` as JSON, as a whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(summary(columns, seconds), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        replace_text(path, text + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the summary ({error.strerror}), expected a writable folder"
        ) from error


def table(columns: Mapping[str, TaskMetrics], title: str = "Before and after training") -> Table:
    """Returns the table task, metric, and a column of values for each name of `columns`."""
    drawn = Table(title=title)
    for heading in ("task", "metric"):
        drawn.add_column(heading)
    for heading in columns:
        drawn.add_column(heading, justify="right")
    last = None
    for task, metric in _rows(columns):
        values = [_value(scores.get(task, {}).get(metric)) for scores in columns.values()]
        drawn.add_row(Text("" if task == last else task), Text(metric), *values)
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
        audio = f"  audio     {line.audio}\n" if line.audio else ""
        text.append(
            f"{audio}  prompt    {line.prompt}\n  expected  {line.target}\n  got       {said}",
            style="not bold",
        )
        drawn.append(text)
    return drawn


def print_report(
    columns: Mapping[str, TaskMetrics],
    results: Mapping[str, TaskResult],
    console: Console | None = None,
) -> None:
    """Prints the table and five sample transcripts."""
    console = console or Console()
    console.print(table(columns))
    for text in sample_lines(results):
        console.print(text, soft_wrap=True)


def _rows(columns: Mapping[str, TaskMetrics]) -> list[tuple[str, str]]:
    tasks = dict.fromkeys(task for scores in columns.values() for task in scores)
    return [
        (task, metric)
        for task in tasks
        for metric in dict.fromkeys(name for scores in columns.values() for name in scores.get(task, {}))
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
