"""`slm quickstart`: the main job on the embedded default, from nothing to a transcript.

Every stage is one of this project's own commands with a packaged recipe; each prints the command that
does the same by hand.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_jax.errors import check_whole

ENCODER_RECIPE = "recipes/demo_encoder.gin"
LLM_RECIPE = "recipes/demo_t5.gin"
ADAPTER_RECIPE = "recipes/quickstart.gin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--run_dir", default="runs/quickstart", metavar="DIR", help="the run goes here")
    parser.add_argument(
        "--demo_dir", default="runs/demo", metavar="DIR",
        help="corpus and foundation models go here, and are used again by the next run",
    )  # fmt: skip
    parser.add_argument("--preset", default="default", metavar="NAME", help="corpus size: default or tiny")
    parser.add_argument(
        "--steps", nargs=3, type=int, metavar=("ENCODER", "T5", "ADAPTER"),
        help="training steps of the three models, in place of the recipes'",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    from slm_jax.cli import demo

    for name, number in zip(("ENCODER", "T5", "ADAPTER"), args.steps or (), strict=False):
        check_whole(f"--steps {name}", number)
    stages = _Stages()
    demo_dir, run_dir = Path(args.demo_dir).absolute(), Path(args.run_dir).absolute()
    corpus = demo_dir / "corpus"
    with stages("corpus", f"slm demo --to {shlex.quote(str(corpus))} --preset {args.preset}"):
        demo.build(str(corpus), args.preset)

    steps = dict(zip(("encoder", "t5", "adapter"), args.steps or (), strict=False))
    common = {"CORPUS_DIR": corpus}
    encoder = common | {
        "MODEL_DIR": demo_dir / "encoder_run",
        "SPEECH_ENCODER_OUTPUT": demo_dir / "speech_encoder",
    }
    _train_stage(stages, "speech encoder", ENCODER_RECIPE, encoder, steps.get("encoder"))
    llm = common | {"MODEL_DIR": demo_dir / "t5_run", "LLM_OUTPUT": demo_dir / "llm"}
    _train_stage(stages, "T5", LLM_RECIPE, llm, steps.get("t5"))

    adapter = common | {
        "MODEL_DIR": run_dir,
        "SPEECH_ENCODER_CHECKPOINT": demo_dir / "speech_encoder",
        "LLM_CHECKPOINT": demo_dir / "llm",
    }
    run = _parse(ADAPTER_RECIPE, adapter, steps.get("adapter"))
    from slm_jax.cli.train import train
    from slm_jax.cli.wiring import Wiring
    from slm_jax.evaluation.evaluator import write_results
    from slm_jax.evaluation.report import print_report, write_summary

    wired = Wiring(run)
    with stages("evaluation before", None):
        score = wired.evaluation(None, "test")
        before = score(wired.fresh_variables())
    with stages("adapter", _command(ADAPTER_RECIPE, adapter, steps.get("adapter"))):
        train(run, wired)
    with stages("evaluation after", f"slm evaluate --run {shlex.quote(str(run_dir))} --split test"):
        after = score(wired.trained_variables())
    write_results(before, run_dir / "evaluation" / "before")
    write_results(after, run_dir / "evaluation" / "test")
    scores_before, scores_after = (
        {name: result.metrics for name, result in results.items()} for results in (before, after)
    )
    write_summary(run_dir / "summary.json", scores_before, scores_after, stages.seconds)
    print_report(scores_before, scores_after, after)
    example = next(iter(after.values())).hypotheses[0]
    print(
        "\nTry it on a recording of your own:\n"
        f"  {sys.argv[0]} infer --run {shlex.quote(args.run_dir)} --audio {shlex.quote(example.audio or '')} "
        f"--prompt {shlex.quote(example.prompt)}"
    )
    return 0


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


def _train_stage(
    stages: Callable[..., Any], name: str, recipe: str, macros: dict[str, Path], steps: int | None
) -> None:
    from slm_jax.cli.train import train

    with stages(name, _command(recipe, macros, steps)):
        train(_parse(recipe, macros, steps))


def _parse(recipe: str, macros: dict[str, Path], steps: int | None):
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import Run

    gin_config.parse([recipe], _bindings(macros, steps))
    return gin_config.build(Run)


def _bindings(macros: dict[str, Path], steps: int | None) -> list[str]:
    bindings = [f"{name}={str(path)!r}" for name, path in macros.items()]
    if steps is not None:
        # A warm-up longer than the training is no schedule.
        bindings += [f"TRAIN_STEPS={steps}", f"WARMUP_STEPS={max(1, steps // 10)}"]
    return bindings


def _command(recipe: str, macros: dict[str, Path], steps: int | None) -> str:
    flags = " ".join(shlex.quote(f"--gin.{binding}") for binding in _bindings(macros, steps))
    return f"slm train --gin_file {recipe} {flags}"
