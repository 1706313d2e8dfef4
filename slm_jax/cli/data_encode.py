"""`slm data encode`: writes the reduced frames of a run's frozen speech encoder, for training without it."""

import argparse
import dataclasses

from slm_jax.cli.data_plan import add_plan_arguments, planned
from slm_jax.cli.main import add_process_arguments
from slm_jax.errors import UserError, check_whole, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_plan_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="where the frames go, local or remote")
    parser.add_argument("--split", metavar="NAME", help="of the run's mixture; what it trains on by default")
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="NAME",
        help="bfloat16 (the default), or int8 with a scale for each position, in half the bytes",
    )  # fmt: skip
    parser.add_argument("--per_shard", type=int, metavar="N", help="utterances of a shard; 2048 by default")


def main(args: argparse.Namespace) -> int:
    """Runs the command: a line about what is there now. Run again, it goes on where it stopped."""
    import jax

    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.frames import DTYPES

    if args.dtype not in DTYPES:
        raise UserError(f"--dtype: {args.dtype!r}{nearest(args.dtype, DTYPES)}")
    options = {}
    if args.per_shard is not None:
        check_whole("--per_shard", args.per_shard)
        options["per_shard"] = args.per_shard
    run = planned(args).run
    if args.split:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, split=args.split))
    entry = Wiring(run).frames.encode(args.to, dtype=args.dtype, **options)
    if jax.process_index() > 0:
        return 0
    size, hours = sum(shard.bytes for shard in entry.shards), entry.samples / 16_000 / 3600
    rejected = "".join(f"; {reason} {count}" for reason, count in sorted(entry.rejected.items()))
    print(
        f"{entry.records} utterances, {hours:.2f} hours, {size / max(hours, 1e-9) / 1e6:.1f} MB an hour in "
        f"{entry.encoding}{rejected}"
    )
    return 0
