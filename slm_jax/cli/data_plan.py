"""What the commands share that look at a run's plan: its flags, and the run without its models."""

import argparse
import logging
from typing import TYPE_CHECKING

from slm_jax.cli.main import add_gin_arguments, search_paths
from slm_jax.errors import UserError

if TYPE_CHECKING:
    from slm_jax.cli.wiring import Wiring


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a run: by its directory, or by its gin files."""
    parser.add_argument("--run", metavar="DIR", help="directory of a run")
    add_gin_arguments(parser, required=False)


def planned(args: argparse.Namespace) -> "Wiring":
    """Returns the rooms of the run that is meant.

    Raises:
      UserError: neither or both of `--run` and `--gin_file`, or what building the run raises.
    """
    if bool(args.run) == bool(args.gin_file):
        raise UserError(f"slm {args.command}: give either --run or --gin_file")
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import Run, load_run
    from slm_jax.cli.wiring import Wiring

    logging.getLogger("slm_jax.data.index").setLevel(logging.WARNING)
    if args.run:
        return Wiring(load_run(args.run, args.gin_bindings))
    gin_config.parse(args.gin_file, args.gin_bindings, search_paths(args))
    return Wiring(gin_config.build(Run))
