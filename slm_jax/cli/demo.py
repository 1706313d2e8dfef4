"""`slm demo`: makes the embedded corpus with its vocabularies."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--to", required=True, metavar="DIR", help="folder of the corpus, made if need be")
    parser.add_argument("--preset", default="default", metavar="NAME", help="size: default, adapter or tiny")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    build(args.to, args.preset)
    return 0


def build(directory: str, preset: str) -> None:
    """Builds a corpus with the shipped vocabularies, or finds it built.

    Raises:
      UserError: unknown preset, the folder holds something else, or the extra `demo` is not installed.
    """
    from slm_jax.demo import corpus, vocabulary

    corpus.build_corpus(directory, corpus.preset(preset), report=lambda line: print(line, file=sys.stderr))
    vocabulary.place_vocabularies(directory)
