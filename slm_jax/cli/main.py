"""The `slm` command: one subcommand per file of this folder."""

import argparse
import faulthandler
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import slm_jax
from slm_jax.data.cache_folder import default_cache_dir
from slm_jax.errors import EXIT_STORAGE, RemoteError, UserError, exit_status, nearest
from slm_jax.multihost.environment import find_processes

# Name -> help; the module of that name has `add_arguments(parser)` and `main(args) -> int`, and is imported
# only when asked for, as TensorFlow and JAX take seconds to load.
_COMMANDS = {
    "train": "Train what the gin files say; run again to resume.",
    "doctor": "Say whether the hosts of a run can work together: devices, versions, network, storage.",
    "plan": "Say whether a run fits devices that are not at hand, and how fast it would be.",
    "evaluate": "Score a run's model on a split of its mixture.",
    "infer": "Answer a prompt about audio files, or a manifest of them.",
    "export": "Write a run's model as safetensors and StableHLO, checked against the live model.",
    "convert": "Bring in a published checkpoint as a frozen foundation model, or write one back.",
    "goodput": "Say what share of a run's time went into steps that count, and where the rest went.",
    "data describe": "Say what a source or task holds: hours, languages, histograms, what is rejected.",
    "data prepare": "Write the references of a source with their audio as speech shards.",
    "data mixture": "Say what a run's plan holds: rates, epochs, packing, first rows; reads no audio.",
    "data rows": "Name the examples of each row that a host reads.",
    "data encode": "Write a frozen encoder's reduced frames as speech shards.",
    "demo": "Make the embedded corpus and its vocabularies.",
    "quickstart": "Corpus, adapter, evaluation: the main job on the embedded default.",
}
# Commands whose settings are all flags.
_WITHOUT_GIN = ("demo", "goodput")
# What meets the other processes in its own way.
_JOINS_ITSELF = ("doctor",)
# Commands of two words.
_GROUPS = ("data",)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; `--gin.NAME=value` flags are gathered in `gin_bindings`."""
    bindings, rest = _split_gin_bindings(argv)
    rest = _joined_command(rest)
    parser = _Parser(prog="slm", description=slm_jax.__doc__)
    parser.add_argument("--version", action="version", version=f"slm_jax {slm_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    chosen = next((word for word in rest if not word.startswith("-")), None)
    for name, text in _COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            _module(name).add_arguments(subparser)
    if chosen is not None and chosen not in _COMMANDS:
        raise UserError(f"slm: no command {chosen!r}{nearest(chosen, _COMMANDS)}")
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [flag for action in commands.choices[args.command]._actions for flag in action.option_strings]
        raise UserError(f"slm {args.command}: unknown flag {unknown[0]!r}{nearest(unknown[0], flags)}")
    if bindings and args.command in _WITHOUT_GIN:
        raise UserError(f"slm {args.command}: reads no gin, so --gin.{bindings[0]} has no meaning here")
    args.gin_bindings = bindings
    return args


def _module(command: str) -> Any:
    return importlib.import_module(f"slm_jax.cli.{command.replace(' ', '_')}")


def _joined_command(words: list[str]) -> list[str]:
    """Returns the words with a command of two, such as `data rows`, as one."""
    if not words or words[0] not in _GROUPS:
        return words
    group, rest = words[0], words[1:]
    if not rest or rest[0].startswith("-"):
        choices = [name for name in _COMMANDS if name.startswith(f"{group} ")]
        if rest and rest[0] in ("-h", "--help"):
            return rest
        raise UserError(f"slm {group}: a command is missing{nearest('', choices)}")
    return [f"{group} {rest[0]}", *rest[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 for a user's mistake, 74 where storage is away."""
    # Programs take longer to compile than to run; JAX reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default_cache_dir() / "compiled"))
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        if hasattr(args, "num_processes"):
            _show_stacks_on_request()
            if args.command not in _JOINS_ITSELF:
                return _among_processes(args)
        return _module(args.command).main(args)
    except UserError as error:
        # gin appends lines that say which of its configurables it was calling.
        print(f"slm: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return exit_status(error)
    except RemoteError as error:
        print(f"slm: error: {error}", file=sys.stderr)
        return EXIT_STORAGE
    except KeyboardInterrupt:
        print("slm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (such as `head`) has gone; point stdout at nothing so that exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _show_stacks_on_request() -> None:
    """Has SIGUSR1 write the stacks of all threads to stderr, where nobody else has that signal."""
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        faulthandler.register(signal.SIGUSR1, 2, all_threads=True)


def _among_processes(args: argparse.Namespace) -> int:
    """Runs a command as one of the processes that the flags or the environment tell of."""
    processes = find_processes(args.coordinator_address, args.num_processes, args.process_id)
    if processes.count == 1:
        return _module(args.command).main(args)
    # JAX loads here, after the flags were found right.
    from slm_jax.multihost.joining import joined

    with joined(processes):
        return _module(args.command).main(args)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which process of how many this is, where the environment does not."""
    group = parser.add_argument_group("processes", "of a run on several hosts, as docs/launch.md tells")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 is found")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes of the run")
    group.add_argument("--process_id", type=int, metavar="I", help="number of this one, from 0")


def add_gin_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the flags that T5X's users type."""
    parser.add_argument(
        "--gin_file", action="append", required=required, default=[], metavar="FILE",
        help="gin file: yours, or a packaged one such as runs/train.gin; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIR[,DIR...]",
        help="folders in which gin files are looked up",
    )
    parser.epilog = "Any gin name can be set by --gin.NAME=value, such as --gin.TRAIN_STEPS=100."


def search_paths(args: argparse.Namespace) -> list[str]:
    """Returns the folders of `--gin_search_paths`."""
    return [folder for folder in args.gin_search_paths.split(",") if folder]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which trained model is meant."""
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of a trained run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use; the newest by default")
    parser.epilog = "The run's configuration can be overridden by --gin.NAME=value."


def _split_gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    bindings, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--gin."):
            rest.append(word)
        elif "=" in word:
            bindings.append(word.removeprefix("--gin."))
        else:
            bindings.append(f"{word.removeprefix('--gin.')}={next(words, '')}")
    return bindings, rest


class _Parser(argparse.ArgumentParser):
    """Argparse whose errors are `UserError`s, and whose flags are never guessed from their beginnings."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        # Who prints it says `slm` before it.
        raise UserError(f"{self.prog}: {message}".removeprefix("slm: "))
