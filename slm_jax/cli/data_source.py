"""Which source of references a command of `slm data` is about: a task's, a manifest, or speech shards."""

import argparse
from typing import TYPE_CHECKING, Any

from slm_jax.cli.main import add_gin_arguments, search_paths
from slm_jax.errors import UserError

if TYPE_CHECKING:
    from slm_jax.data.sources import ReferenceSource


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a source; one of them is needed."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", metavar="NAME", help="a task that the gin file registers")
    source.add_argument("--manifest", metavar="FILE", help="a manifest in JSON lines")
    source.add_argument("--from_shards", metavar="DIR", help="a directory of speech shards")
    add_gin_arguments(parser, required=False)
    parser.add_argument("--split", default="train", help="of the source; train by default")


def source_of(args: argparse.Namespace) -> "ReferenceSource":
    """Returns the source that the flags name, with the split that they name.

    Raises:
      UserError: there is none, or it has no such split.
    """
    if not args.task and (args.gin_file or args.gin_bindings):
        raise UserError("--gin_file and --gin.NAME are for --task; a manifest or shards need neither")
    # First, so that TensorFlow never sees an accelerator.
    from slm_jax.data import host_tensorflow  # noqa: F401, I001
    from slm_jax.data import sources

    if args.manifest:
        source: Any = sources.ManifestSource({args.split: args.manifest})
    elif args.from_shards:
        source = sources.ShardSource(args.from_shards)
    else:
        source = find_task(args).source
        if not isinstance(source, sources.ReferenceSource):
            found = type(source).__name__
            raise UserError(
                f"--task {args.task}: its source is a {found}, expected one of slm_jax.data.sources"
            )
    source.check_split(args.split)
    return source


_TASKS_ALONE = """
from __gin__ import dynamic_registration
from slm_jax.cli import run
run.DataConfig.register = %REGISTER_TASKS
"""


def find_task(args: argparse.Namespace) -> Any:
    """Returns the task of `--task`, having registered what the gin files register.

    Raises:
      UserError: no gin file is given, or it registers no such task.
    """
    if not args.gin_file:
        raise UserError(f"--task {args.task} needs --gin_file, the file that registers it")
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import DataConfig
    from slm_jax.data.index import find_task as find

    gin_config.parse(args.gin_file, args.gin_bindings, search_paths(args))
    # Of a run, so that one file serves both; but nothing else of the run need be known, nor be there at all.
    if gin_config.bound("run.DataConfig.register") is None:
        gin_config.bind(_TASKS_ALONE)
    config = gin_config.build(DataConfig, mixture_or_task=args.task, feature_lengths={}, batch_size=1)
    for register in config.register:
        register()
    return find(args.task)


def run_feature_lengths() -> Any:
    """Returns the feature lengths in the gin files that `find_task` read; None where they say none."""
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import DataConfig

    if gin_config.bound("run.DataConfig.feature_lengths") is None:
        return None
    if "TASK_FEATURE_LENGTHS" in gin_config.missing_required():
        return None
    return gin_config.build(DataConfig, mixture_or_task="", batch_size=1).feature_lengths
