"""`slm goodput`: what share of a run's wall time went into steps that count, and where the rest went."""

import argparse

from slm_jax.errors import UserError
from slm_jax.storage import absolute_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of a run, at work or ended")


def main(args: argparse.Namespace) -> int:
    """Runs the command: a line with the share, and a line for each cause."""
    from slm_jax.training.goodput import goodput, read_attempts

    attempts = read_attempts(absolute_path(args.run))
    if not attempts:
        raise UserError(f"--run: {args.run} holds no record of a training, expected a run's directory")
    found = goodput(attempts)
    print(found.line())
    for cause, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        print(f"{cause:20} {seconds:12.1f} s {100 * seconds / found.wall:6.2f} %")
    return 0
