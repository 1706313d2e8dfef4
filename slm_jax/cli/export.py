"""`slm export`: a run's model as safetensors and as StableHLO, checked against the live model."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from slm_jax.cli.main import add_run_arguments
from slm_jax.errors import UserError, check_whole

if TYPE_CHECKING:
    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.references import Reference
    from slm_jax.export.parity import Question

# Utterances that the parity check asks about.
_QUESTIONS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_run_arguments(parser)
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
    parser.add_argument("--max_tokens", type=int, metavar="N", help="most tokens of an answer")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if bool(args.audio) != bool(args.prompt):
        raise UserError("slm export: --audio and --prompt are given together or not at all")
    if args.max_tokens is not None:
        check_whole("--max_tokens", args.max_tokens)
    import jax

    from slm_jax.checkpoints.foundation import read_foundation
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import load_run
    from slm_jax.cli.wiring import Wiring
    from slm_jax.export.package import Source, check_request, export_run

    if jax.process_count() > 1:
        raise UserError("slm export: one process holds all weights; run it on one host")
    check_request(args.to, args.formats, args.platforms)
    run = load_run(args.run, args.gin_bindings)
    wired = Wiring.to_answer(run)
    tokenizer, eos_id = _tokenizer(wired)
    variables = wired.trained_variables(args.step)
    max_tokens = args.max_tokens or run.answer_tokens
    asked: list[tuple[Question, list[int]]] = []
    if "stablehlo" in args.formats:
        asked = _asked(args, wired, variables, max_tokens)
    source = Source(
        model=wired.run.objective.model,
        variables=jax.device_get(variables),
        step=wired.saved_step(args.step),
        foundations={part: read_foundation(run.path(name)) for part, name in run.foundations.items()},
        provenance=wired.provenance(gin_config.resolved_config()),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        eos_id=eos_id,
    )
    directory = export_run(
        args.to,
        source,
        [question for question, _ in asked],
        [tokens for _, tokens in asked],
        formats=args.formats,
        platforms=args.platforms,
        report=lambda line: print(line, file=sys.stderr),
    )
    for path in sorted(directory.iterdir()):
        print(f"{path} {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _asked(
    args: argparse.Namespace, wired: "Wiring", variables: Any, max_tokens: int
) -> "list[tuple[Question, list[int]]]":
    """Returns questions about real speech with the live model's answers.

    An example of the evaluation that cannot be used is passed over; a recording that the user named is not.
    """
    references = _references(args, wired)
    answers = wired.predict(variables, rows=max(1, len(references)), max_tokens=max_tokens)(references)
    from slm_jax.data.audio_files import load_utterance
    from slm_jax.export.parity import Question

    asked = []
    for reference, answer in zip(references, answers, strict=True):
        if answer.rejected and args.audio:
            raise UserError(f"--audio {reference.audio}: {answer.rejected.reason} ({answer.rejected.detail})")
        if not answer.rejected:
            speech = load_utterance(reference).samples
            asked.append((Question(reference.id, speech, reference.inputs), answer.tokens))
    if not asked:
        raise UserError(
            "the run's evaluation has no example with speech that fits; give --audio and --prompt"
        )
    return asked


def _references(args: argparse.Namespace, wired: "Wiring") -> "list[Reference]":
    if args.audio:
        from slm_jax.cli.infer import references_of_files
        from slm_jax.data.preprocessors import prompt_tokens

        prompt = prompt_tokens(wired.vocabulary("inputs"), args.prompt)
        return references_of_files(args.audio, prompt, wired.speech_room())
    return wired.example_references(_QUESTIONS)


def _tokenizer(wired: "Wiring") -> tuple[bytes | None, int]:
    """Returns the sentencepiece model of prompts and answers, None where there is none, and the id of EOS.

    Raises:
      UserError: prompts and answers have different ones, or a token of a prompt could be taken for padding.
    """
    inputs, targets = wired.vocabulary("inputs"), wired.vocabulary("targets")
    models = [getattr(vocabulary, "sp_model", None) for vocabulary in (inputs, targets)]
    if models[0] != models[1] or inputs.eos_id != targets.eos_id:
        raise UserError("slm export: prompts and answers have different vocabularies, expected one for both")
    if inputs.unk_id == 0:
        raise UserError(
            "slm export: the vocabulary's unknown token is 0, which fills up prompts; expected another"
        )
    return models[0], targets.eos_id
