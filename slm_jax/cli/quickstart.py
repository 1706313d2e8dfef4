"""`slm quickstart`: the main job on the embedded default, from nothing to a transcript.

Every stage is one of this project's own commands with a packaged recipe; each prints the command that
does the same by hand.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slm_jax.errors import EXIT_STOPPED, UserError, check_whole
from slm_jax.storage import is_remote

if TYPE_CHECKING:
    from slm_jax.evaluation.report import TaskMetrics

RECIPE = "recipes/quickstart.gin"
# Where the hypotheses of each column of the table go; as `slm evaluate --split test` names them.
_FOLDERS = {
    "before": "before", "after": "test", "topline": "test-transcript", "cascade": "test-hypothesis",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--run_dir", default="runs/quickstart", metavar="DIR", help="the run goes here")
    parser.add_argument(
        "--demo_dir", default="runs/demo", metavar="DIR",
        help="the corpus goes here, and is used again by the next run",
    )  # fmt: skip
    parser.add_argument(
        "--foundation", metavar="DIR",
        help="folder with the foundation models speech_encoder and llm; by default those of the package",
    )  # fmt: skip
    parser.add_argument(
        "--preset", default="adapter", metavar="NAME", help="corpus size: adapter, default or tiny"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, in place of the recipe's")
    parser.epilog = "The recipe can be overridden by --gin.NAME=value."


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    from slm_jax.checkpoints.foundation import read_foundation
    from slm_jax.cli import demo
    from slm_jax.demo import foundation

    if args.steps is not None:
        check_whole("--steps", args.steps)
    for part in foundation.PARTS if args.foundation else ():
        read_foundation(Path(args.foundation) / part)
    stages = _Stages()
    for flag, folder in (("--demo_dir", args.demo_dir), ("--run_dir", args.run_dir)):
        if is_remote(folder):
            raise UserError(
                f"{flag} is {folder!r}, expected a local folder; slm train trains in buckets, too"
            )
    demo_dir, run_dir = Path(args.demo_dir).absolute(), Path(args.run_dir).absolute()
    if any(binding.startswith("MODEL_DIR=") for binding in args.gin_bindings):
        raise UserError("slm quickstart: the run goes to --run_dir, so --gin.MODEL_DIR has no meaning here")
    corpus = demo_dir / "corpus"
    with stages("corpus", f"slm demo --to {shlex.quote(str(corpus))} --preset {args.preset}"):
        demo.build(str(corpus), args.preset)

    bindings = [f"CORPUS_DIR={str(corpus)!r}", f"MODEL_DIR={str(run_dir)!r}"]
    if args.foundation:
        folder = Path(args.foundation).absolute()
        bindings += [
            f"SPEECH_ENCODER_CHECKPOINT={str(folder / 'speech_encoder')!r}",
            f"LLM_CHECKPOINT={str(folder / 'llm')!r}",
        ]
    if args.steps is not None:
        # A warm-up longer than the training is no schedule, and the last step is evaluated in any case.
        bindings += [f"TRAIN_STEPS={args.steps}", f"WARMUP_STEPS={max(1, args.steps // 10)}"]
    bindings += args.gin_bindings

    from slm_jax.cli import gin_config
    from slm_jax.cli.run import Run
    from slm_jax.cli.train import train
    from slm_jax.cli.wiring import Wiring
    from slm_jax.evaluation.evaluator import write_results
    from slm_jax.evaluation.report import print_report, write_summary

    with stages("loading", None):
        gin_config.parse([RECIPE], bindings)
        run = gin_config.build(Run)
        wired = Wiring(run)
        score = wired.evaluation(split="test")
    evaluate = f"slm evaluate --run {shlex.quote(str(run_dir))} --split test"
    results = {}
    with stages("evaluation before", None):
        results["before"] = score(wired.fresh_variables())
    flags = " ".join(shlex.quote(f"--gin.{binding}") for binding in bindings)
    with stages("adapter", f"slm train --gin_file {RECIPE} {flags}"):
        if not train(run, wired).finished:
            print("Stopped before its last step; the same command goes on with it.")
            return EXIT_STOPPED
    variables = wired.trained_variables()
    with stages("evaluation after", evaluate):
        results["after"] = score(variables)
    with stages("text topline", f"{evaluate} --speech_as transcript"):
        results["topline"] = score(variables, "transcript")
    with stages("cascade", f"{evaluate} --speech_as hypothesis"):
        results["cascade"] = score(variables, "hypothesis")
    columns = {name: {task: r.metrics for task, r in scored.items()} for name, scored in results.items()}
    for name, scored in results.items():
        write_results(scored, run_dir / "evaluation" / _FOLDERS[name])
    write_summary(run_dir / "summary.json", columns, stages.seconds)
    picture = run_dir / "curves.png"
    draw_curves(run_dir, picture, columns["topline"], run.evaluated().num_examples)
    print()
    print_report(columns, results["after"])
    example = next(iter(results["after"].values())).hypotheses[0]
    print(
        f"\nThe curves are in {picture}, all hypotheses in {run_dir / 'evaluation'}.\n"
        "Try it on a recording of your own:\n"
        f"  {sys.argv[0]} infer --run {shlex.quote(args.run_dir)} --audio {shlex.quote(example.audio or '')} "
        f"--prompt {shlex.quote(example.prompt)}"
    )
    return 0


def draw_curves(
    run_dir: Path, picture: Path, topline: "TaskMetrics", num_examples: int | None = None
) -> None:
    """Draws loss, error rate and what was never trained with speech over the steps of a quickstart.

    Args:
      run_dir: of the run.
      picture: the file.
      topline: scores of the text topline, on test.
      num_examples: of each task that were scored in training; None for all.
    """
    from slm_jax.evaluation.picture import Panel, draw, losses, scores

    unseen = {
        "en-es BLEU": ("demo_ast_es", "bleu"),
        "slot questions, % right": ("demo_slots", "exact_match"),
        "listed names, % right": ("demo_names", "rare_word_recall"),
    }
    trained = {"en-de BLEU": ("demo_ast_de", "bleu")}
    panels = [
        Panel("word error rate, %", {"demo_asr": "demo_asr/wer"}),
        *(
            Panel(
                title,
                {legend: "/".join(name) for legend, name in shown.items()},
                {
                    legend: topline[task][metric]
                    for legend, (task, metric) in shown.items()
                    if metric in topline.get(task, {})
                },
                ceiling=105,
            )
            for title, shown in (
                ("trained with speech (dotted: topline on test)", trained),
                ("never trained with speech (dotted: topline on test)", unseen),
            )
        ),
    ]
    examples = "dev" if num_examples is None else f"{num_examples} dev examples of each task"
    draw(picture, losses(run_dir), scores(run_dir), panels, f"Training the adapter; scores on {examples}")


class _Stages:
    """Names the stages, tells the command behind each, and keeps their times."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, command: str | None) -> Iterator[None]:
        print(f"\n== {name}" + (f"\n   {command}" if command else ""), flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"== {name}: {self.seconds[name]:.0f} s", flush=True)
