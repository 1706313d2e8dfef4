"""`slm evaluate`: scores a run's model on a split and writes metrics and hypotheses."""

import argparse
import hashlib

from slm_jax.cli.main import add_process_arguments, add_run_arguments
from slm_jax.errors import UserError, nearest

# What the model is asked about: the speech, or a text in its place (see `evaluation.from_text`).
SPEECH_AS = ("audio", "transcript", "hypothesis")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_run_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--mixture", metavar="NAME", help="task or mixture; the run's own by default")
    parser.add_argument("--split", metavar="NAME", help="such as test; the run's own by default")
    parser.add_argument("--output", metavar="DIR", help="for metrics and hypotheses; in the run by default")
    parser.add_argument(
        "--speech_as", metavar="WHAT", default="audio",
        help="audio (the default); transcript: the LLM is given the true transcript in place of the speech, "
        "the text topline; hypothesis: it is given what the model transcribes first, the cascade",
    )  # fmt: skip
    parser.add_argument(
        "--transcribe_prompt", metavar="TEXT",
        help="what the cascade asks for its transcript; by default 'Transcribe the speech: {speech}'",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the command: a line for each task and metric on standard output."""
    if args.transcribe_prompt and args.speech_as != "hypothesis":
        raise UserError("--transcribe_prompt is the cascade's; it goes with --speech_as hypothesis")
    if args.speech_as not in SPEECH_AS:
        raise UserError(f"--speech_as: {args.speech_as!r}{nearest(args.speech_as, SPEECH_AS)}")
    import jax

    from slm_jax import storage
    from slm_jax.checkpoints.broadcast import together
    from slm_jax.cli.run import load_run
    from slm_jax.cli.scoring import TRANSCRIBE_PROMPT
    from slm_jax.cli.wiring import Wiring
    from slm_jax.evaluation.evaluator import write_results

    run = load_run(args.run, args.gin_bindings)
    wired = Wiring.to_answer(run)
    split = args.split or run.evaluated().split
    evaluate = wired.evaluation(args.mixture, split)
    prompt = args.transcribe_prompt or TRANSCRIBE_PROMPT
    results = evaluate(wired.trained_variables(args.step), args.speech_as, prompt)
    # What is scored is in the folder's name, so that no scores take the place of others.
    instead = args.speech_as if args.speech_as != "audio" else None
    asked = args.transcribe_prompt and hashlib.sha256(args.transcribe_prompt.encode()).hexdigest()[:8]
    name = "-".join(filter(None, [split, args.mixture, args.step and f"step{args.step}", instead, asked]))
    beside = run.path(run.model_dir) / "evaluation" / name
    directory = storage.absolute_path(args.output) if args.output else beside
    # Every process has all scores; one writes and tells them.
    first = jax.process_index() == 0
    together(lambda: write_results(results, directory) if first else None)
    for task, result in results.items() if first else ():
        for metric, value in result.metrics.items():
            print(f"{task} {metric} {value:.2f}")
    return 0
