"""`slm data describe`: says what a task, a manifest or speech shards hold; reads no audio."""

import argparse
import json

from slm_jax.cli.data_source import add_source_arguments, find_task, run_feature_lengths, source_of
from slm_jax.data.cache_folder import default_cache_dir

# What rows may hold where the gin file does not say: anything.
_NO_LIMITS = {"speech": 2**31 - 1, "inputs": 2**31 - 1, "targets": 2**31 - 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_source_arguments(parser)
    parser.add_argument("--png", metavar="FILE", help="draw the histograms as well")
    parser.add_argument("--json", action="store_true", help="the same as one object")


def main(args: argparse.Namespace) -> int:
    """Runs the command: text or JSON on standard output, and a picture where one is asked for."""
    # First, so that TensorFlow never sees an accelerator.
    from slm_jax.data import host_tensorflow  # noqa: F401
    from slm_jax.data.describe import describe_source, describe_table
    from slm_jax.data.histograms import draw
    from slm_jax.data.index import build_index

    if args.task:
        task = find_task(args)
        lengths = run_feature_lengths() or _NO_LIMITS
        described = describe_table(build_index(task, args.split, lengths, default_cache_dir()))
    else:
        described = describe_source(source_of(args), args.split)
    if args.png:
        draw(args.png, described.lengths, f"{described.name}, split {described.split}")
    if args.json:
        print(json.dumps(described.to_json(), ensure_ascii=False))
    else:
        print("\n".join(described.lines()))
    return 0
