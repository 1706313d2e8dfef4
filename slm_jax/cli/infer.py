"""`slm infer`: answers a prompt about audio files, or about each line of a manifest."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slm_jax.cli.main import add_process_arguments, add_run_arguments
from slm_jax.errors import BadExample, UserError, check_whole

if TYPE_CHECKING:
    from slm_jax.data.references import Reference
    from slm_jax.evaluation.predictor import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_run_arguments(parser)
    add_process_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", nargs="+", metavar="FILE", help="WAV, FLAC, Ogg or MP3, any rate")
    source.add_argument("--manifest", metavar="FILE", help="JSON lines with `audio`, as for training")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT",
        help="instruction; {speech} marks where the speech goes, by default after the text",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="answers as JSON lines; needed with --manifest")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="most tokens of an answer")


def main(args: argparse.Namespace) -> int:
    """Runs the command: one text for each file alone on standard output, or JSON lines in a file."""
    if args.manifest and not args.output:
        raise UserError("slm infer: --manifest needs --output, the file that the answers go to")
    if args.output and not os.access(Path(args.output).absolute().parent, os.W_OK):
        raise UserError(f"--output {args.output}: its folder does not exist or cannot be written")
    if args.max_tokens is not None:
        check_whole("--max_tokens", args.max_tokens)
    # JAX and TensorFlow load here, after the flags were found right.
    import jax

    from slm_jax.checkpoints.broadcast import together
    from slm_jax.cli.run import load_run
    from slm_jax.cli.wiring import Wiring

    wired = Wiring.to_answer(load_run(args.run, args.gin_bindings))
    vocabulary = wired.vocabulary("targets")
    # After the tasks, which bring TensorFlow in quietly.
    from slm_jax.data.preprocessors import prompt_tokens

    prompt = prompt_tokens(wired.vocabulary("inputs"), args.prompt)
    room = wired.speech_room()
    references = (
        references_of_files(args.audio, prompt, room) if args.audio else _of_manifest(args.manifest, prompt)
    )
    answer = wired.predict(
        wired.trained_variables(args.step), rows=min(len(references), 16), max_tokens=args.max_tokens
    )
    predictions = answer(references)
    texts = [vocabulary.decode(prediction.tokens) for prediction in predictions]
    # Every process has all answers; one writes or prints them.
    first = jax.process_index() == 0
    if args.output:
        together(lambda: _write(Path(args.output), references, predictions, texts) if first else None)
        return 0
    rejected = []
    for reference, prediction, text in zip(references, predictions, texts, strict=True):
        if prediction.rejected:
            rejected.append(f"{reference.audio}: {_why(prediction)}")
        # A file without an answer has an empty line, so that line n belongs to file n.
        if first:
            print("" if prediction.rejected else text)
    if rejected:
        raise UserError("--audio " + "; ".join(rejected))
    return 0


def references_of_files(paths: list[str], prompt, room: int) -> "list[Reference]":
    """Returns references that ask the same about each audio file.

    Args:
      paths: of the files.
      prompt: int32 `inputs` of `preprocessors.prompt_tokens`.
      room: most samples of one.

    Raises:
      UserError: a file that cannot be used; the reason is named.
    """
    from slm_jax.data.audio_files import load_audio
    from slm_jax.data.references import SAMPLE_RATE, Reference

    references = []
    for path in paths:
        try:
            # Decoded, not read from the header, which a pipe leaves empty and a cut file has of the whole.
            samples = len(load_audio(path, room))
        except BadExample as bad:
            if bad.reason == "too_long":
                bad = BadExample(
                    "speech_too_long",
                    f"longer than {room / SAMPLE_RATE:g} s, the run's row of speech when it answers",
                )
            raise UserError(f"--audio {path}: {bad.reason} ({bad.detail})") from None
        references.append(Reference(path, path, samples, prompt, prompt[:0], "infer", ""))
    return references


def _of_manifest(path: str, prompt) -> "list[Reference]":
    from slm_jax.data.references import Reference, audio_path
    from slm_jax.data.sources import ManifestSource

    source = ManifestSource({"infer": path})
    columns = source.columns("infer")
    root = source.audio_root("infer")
    return [
        Reference(
            id_,
            audio_path(root, audio) if audio else None,
            int(samples),
            prompt,
            prompt[:0],
            "infer",
            language,
        )
        for id_, audio, samples, language in zip(
            columns["id"], columns["audio"], columns["samples"], columns["language"], strict=True
        )
    ]


def _write(
    path: Path, references: "list[Reference]", predictions: "list[Prediction]", texts: list[str]
) -> None:
    from slm_jax.evaluation.evaluator import replace_text

    lines = []
    for reference, prediction, text in zip(references, predictions, texts, strict=True):
        line = {"id": reference.id, "audio": reference.audio, "prediction": text}
        if prediction.rejected:
            line |= {"reject_reason": prediction.rejected.reason, "reject_detail": prediction.rejected.detail}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    try:
        replace_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error
    rejected = sum(prediction.rejected is not None for prediction in predictions)
    print(f"{len(lines)} answers in {path}, {rejected} of them rejected", file=sys.stderr)


def _why(prediction: "Prediction") -> str:
    assert prediction.rejected is not None
    return f"{prediction.rejected.reason} ({prediction.rejected.detail})"
