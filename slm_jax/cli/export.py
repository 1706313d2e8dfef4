"""`slm export`: a run's model as safetensors and as StableHLO, checked against the live model."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from slm_jax.errors import UserError, check_whole

if TYPE_CHECKING:
    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.references import Reference

# Utterances that the parity check asks about.
_QUESTIONS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of a trained run")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder of the artifacts")
    parser.add_argument(
        "--formats", nargs="+", default=["adapter", "merged", "stablehlo"], metavar="NAME",
        help="adapter, merged, stablehlo; all by default",
    )  # fmt: skip
    parser.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="NAME",
        help="that the StableHLO is lowered for: cpu, cuda, tpu; all by default",
    )  # fmt: skip
    parser.add_argument(
        "--audio", nargs="+", metavar="FILE",
        help="recordings that artifact and model must answer alike; by default examples of the evaluation",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="what they are asked; needed with --audio")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to export; the newest by default")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.epilog = "The run's configuration can be overridden by --gin.NAME=value."


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if bool(args.audio) != bool(args.prompt):
        raise UserError("slm export: --audio and --prompt are given together or not at all")
    if args.max_tokens is not None:
        check_whole("--max_tokens", args.max_tokens)
    import jax

    from slm_jax.checkpoints.foundation import read_foundation
    from slm_jax.cli.run import CONFIG_FILE, load_run
    from slm_jax.cli.wiring import Wiring

    if jax.process_count() > 1:
        raise UserError("slm export: one process holds all weights; run it on one host")
    run = load_run(args.run, args.gin_bindings)
    wired = Wiring(run)
    vocabulary = wired.vocabulary("targets")
    from slm_jax.data.audio_files import load_utterance
    from slm_jax.export.package import Source, export_run
    from slm_jax.export.parity import Question

    variables = wired.trained_variables(args.step)
    evaluation = run.evaluation
    max_tokens = (
        args.max_tokens or (evaluation and evaluation.max_tokens) or run.data.feature_lengths["targets"]
    )
    references = _references(args, wired)
    answers = wired.predict(variables, rows=len(references), max_tokens=max_tokens)(references)
    for reference, answer in zip(references, answers, strict=True):
        if answer.rejected:
            raise UserError(f"--audio {reference.audio}: {answer.rejected.reason} ({answer.rejected.detail})")
    questions = [
        Question(reference.id, load_utterance(reference).samples, reference.inputs)
        for reference in references
    ]
    source = Source(
        model=run.objective.model,
        variables=jax.device_get(variables),
        foundations={part: read_foundation(run.path(name)) for part, name in run.foundations.items()},
        provenance=wired.provenance((run.path(run.model_dir) / CONFIG_FILE).read_text(encoding="utf-8")),
        tokenizer=_tokenizer(vocabulary),
        max_tokens=max_tokens,
        eos_id=vocabulary.eos_id,
    )
    directory = export_run(
        args.to,
        source,
        questions,
        [answer.tokens for answer in answers],
        formats=args.formats,
        platforms=args.platforms,
        report=lambda line: print(line, file=sys.stderr),
    )
    for path in sorted(directory.iterdir()):
        print(f"{path} {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _references(args: argparse.Namespace, wired: "Wiring") -> "list[Reference]":
    if args.audio:
        from slm_jax.cli.infer import references_of_files
        from slm_jax.data.preprocessors import prompt_tokens

        prompt = prompt_tokens(wired.vocabulary("inputs"), args.prompt)
        return references_of_files(args.audio, prompt, wired.speech_room())
    return wired.example_references(_QUESTIONS)


def _tokenizer(vocabulary: Any) -> bytes | None:
    return getattr(vocabulary, "sp_model", None)
