"""`slm data prepare`: writes the references of a source with their audio as speech shards, on Apache Beam."""

import argparse
import functools
import sys
from collections import defaultdict
from typing import Any

from slm_jax.cli.data_source import add_source_arguments, source_of
from slm_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_source_arguments(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="directory of the shards, local or remote")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="how many; by default one for each four hours of speech"
    )
    parser.add_argument(
        "--format", default="flac", metavar="FORMAT",
        help="flac (default) or pcm16; both keep every bit of the speech at 16 kHz",
    )  # fmt: skip
    parser.add_argument(
        "--shuffle", action="store_true", help="draw the shard of a reference from its id, not its place"
    )
    parser.add_argument(
        "--max_bad_share", type=float, default=0.05, metavar="SHARE",
        help="most references that may be left out, as a share of all",
    )  # fmt: skip
    parser.add_argument(
        "--runner", default="DirectRunner", metavar="NAME",
        help="of Beam: DirectRunner (by default), FlinkRunner, SparkRunner, DataflowRunner or PortableRunner",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes of DirectRunner; 1 by default")
    parser.add_argument(
        "--beam", action="append", default=[], metavar="NAME=VALUE",
        help="an option of Beam's pipelines, such as project=mine; may be repeated",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the command; what is left out is told last, on standard output."""
    from slm_jax.data.on_beam import check_runner, run_on_beam
    from slm_jax.data.prepare import REJECTS_FILE, prepare
    from slm_jax.data.references import SAMPLE_RATE

    options = _beam_options(args.beam)
    # Before the source is read, which may take long.
    check_runner(args.runner, args.workers, options)
    entry = prepare(
        source_of(args),
        args.split,
        args.to,
        functools.partial(run_on_beam, runner=args.runner, workers=args.workers, options=options),
        count=args.shards,
        codec=args.format,
        shuffle=args.shuffle,
        max_bad_share=args.max_bad_share,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    hours = entry.samples / SAMPLE_RATE / 3600
    size = sum(shard.bytes for shard in entry.shards)
    print(
        f"{args.to}: {entry.records} utterances, {hours:.2f} h, {size / 1e6:.1f} MB "
        f"in {len(entry.shards)} shards of split {args.split}"
    )
    for reason, count in sorted(entry.rejected.items()):
        print(f"rejected: {reason} {count}")
    if entry.rejected:
        print(f"listed in {args.to}/{REJECTS_FILE}")
    return 0


def _beam_options(words: list[str]) -> dict[str, Any]:
    """Returns options as Beam takes them: a repeated one is a list, one without a value is set."""
    values: dict[str, list[Any]] = defaultdict(list)
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if not name:
            raise UserError(f"--beam {word}: expected NAME=VALUE")
        values[name].append(value if given else True)
    return {name: found if len(found) > 1 else found[0] for name, found in values.items()}
