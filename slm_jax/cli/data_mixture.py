"""`slm data mixture`: says what a run's plan holds, from the index alone."""

import argparse
import json
from typing import Any

from slm_jax.cli.data_plan import add_plan_arguments, planned
from slm_jax.errors import check_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_plan_arguments(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="steps to look at; the run's own by default")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="first rows to print (default 3)")
    parser.add_argument("--json", action="store_true", help="the same as one object")


def main(args: argparse.Namespace) -> int:
    """Runs the command: a table of the tasks, how full rows are, and the first rows."""
    if args.steps is not None:
        check_whole("--steps", args.steps)
    check_whole("--rows", args.rows, 0)
    wired = planned(args)
    plan, steps = wired.plan(), args.steps or wired.run.loop.train_steps

    from slm_jax.data.plan_report import readable, report

    vocabularies = wired.vocabulary("inputs"), wired.vocabulary("targets")
    rows = [
        [
            {"id": f"{reference.task}/{reference.id}", "prompt": prompt, "target": target}
            for reference in (placed.reference for placed in row)
            for prompt, target in [readable(reference, *vocabularies)]
        ]
        for number in range(args.rows)
        for row in plan.rows(number, 1)
    ]
    stages = {}
    for step, stage in getattr(plan, "stages", {0: plan}).items():
        if step < steps:
            later = [other for other in getattr(plan, "stages", {}) if other > step]
            stages[step] = report(stage, min([steps, *later]) - step)
    if args.json:
        found = [{"from_step": step, **stage.to_json()} for step, stage in stages.items()]
        print(json.dumps({"stages": found, "rows": rows}, ensure_ascii=False))
        return 0
    for step, stage in stages.items():
        _print(step, stage, wired.run.data)
    for number, row in enumerate(rows):
        print(f"row {number}:")
        for example in row:
            print(f"  {example['id']}\n    prompt  {example['prompt']}\n    target  {example['target']}")
    return 0


def _print(step: int, found: Any, data: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{data.stages.get(step, data.mixture_or_task)}, {found.steps} steps from step {step}"
    )
    for heading in ("task", "references", "hours", "rejected", "target %", "realised %", "epochs"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in found.tasks:
        table.add_row(
            task.task,
            f"{task.references:,}",
            f"{task.hours:,.2f}",
            f"{task.rejected:,}",
            f"{100 * task.target:.2f}",
            f"{100 * task.realised:.2f}",
            f"{task.epochs:.2f}",
        )
    Console().print(table)
    looked = "all rows" if found.rows >= found.steps * data.batch_size else f"the first {found.rows:,} rows"
    shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in found.useful.items())
    print(
        f"{looked}: {found.examples_per_row:.2f} examples a row, {found.audio_hours:,.2f} hours of speech; "
        f"no padding: {shares}; batch shapes: {found.shapes}"
    )
