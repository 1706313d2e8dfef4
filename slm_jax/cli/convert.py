"""`slm convert`: a published checkpoint becomes a frozen foundation model, or the other way round.

What a run has trained goes to T5X and back, by `t5x_checkpoints`.
"""

import argparse
import contextlib
import json
import math
import resource
import sys
import time
from pathlib import Path

from slm_jax.cli.main import add_gin_arguments
from slm_jax.errors import UserError, nearest

_LAYOUTS = ("scan",)
_TARGETS = ("to", "to_hf", "to_t5x", "to_run")
# What a task can take its vocabulary from; ByT5 needs none.
_VOCABULARIES = {"spiece.model", "sentencepiece.model", "tokenizer.model"}
_BYT5_ROWS = 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR",
        help="a checkpoint of transformers or T5X; with --to_hf a foundation model of this project",
    )  # fmt: skip
    parser.add_argument("--to", metavar="DIR", help="new directory of the foundation model")
    parser.add_argument(
        "--to_hf",
        "--to-hf",
        metavar="DIR",
        help="new directory that transformers loads: safetensors and config.json",
    )
    parser.add_argument(
        "--to_t5x", metavar="DIR",
        help="--from is a run: folder for checkpoint_<step> with what it has trained, for T5X to begin with",
    )  # fmt: skip
    parser.add_argument(
        "--to_run", metavar="DIR",
        help="--from is T5X's checkpoint of an SLM: new run with its parameters, configured by --gin_file",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --to_t5x: checkpoint of the run; the newest by default"
    )
    add_gin_arguments(parser, required=False)
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or int8; by default that of the checkpoint"
    )
    parser.add_argument(
        "--layout",
        default="scan",
        metavar="NAME",
        help="of the layers: scan stacks them along axis 0, as the models want",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.layout not in _LAYOUTS:
        raise UserError(f"slm convert: --layout is {args.layout!r}{nearest(args.layout, _LAYOUTS)}")
    if args.source == "":
        raise UserError("slm convert: --from is empty, expected a directory")
    targets = {name: getattr(args, name) for name in _TARGETS if getattr(args, name) is not None}
    if len(targets) != 1:
        raise UserError(f"slm convert: expected one of {', '.join(f'--{name}' for name in _TARGETS)}")
    (target, directory) = next(iter(targets.items()))
    _check_flags(args, target)
    from slm_jax.checkpoints.directories import new_directory

    if target in ("to_t5x", "to_run"):
        from slm_jax.cli import t5x_checkpoints

        return getattr(t5x_checkpoints, target)(args)
    new_directory(directory)
    return _to_foundation(args) if target == "to" else _to_huggingface(args)


def _check_flags(args: argparse.Namespace, target: str) -> None:
    """Raises UserError where a flag is given that has no meaning beside the target."""
    if args.gin_bindings and target != "to_run":
        raise UserError(f"slm convert: reads no gin, so --gin.{args.gin_bindings[0]} has no meaning here")
    if args.gin_file and target != "to_run":
        raise UserError(f"slm convert: --gin_file has no meaning with --{target}")
    if not args.gin_file and target == "to_run":
        raise UserError("slm convert: --to_run needs --gin_file, the configuration of the run")
    if args.step is not None and target != "to_t5x":
        raise UserError(f"slm convert: --step has no meaning with --{target}")
    if args.dtype is not None and target in ("to_t5x", "to_run"):
        raise UserError(f"slm convert: --dtype has no meaning with --{target}, which keeps every bit")


def _to_foundation(args: argparse.Namespace) -> int:
    from slm_jax.checkpoints.conversion import companions, convert, open_source, plan_conversion

    source = open_source(args.source)
    for note in source.notes:
        _say(note)
    plan = plan_conversion(source, args.dtype)
    files = companions(args.source)
    has_pieces = any(file.name in _VOCABULARIES for file in files)
    if plan.family.kind == "t5" and plan.config.vocab_size != _BYT5_ROWS and not has_pieces:
        _say("no sentencepiece model lies beside it: a task will need the path of one as its vocabulary")
    _say(
        f"{source.where}: {type(plan.config).__name__} of {_parameters(plan.table)} parameters, "
        f"{_gigabytes(plan.bytes)}"
    )
    for reason, names in _by_reason(plan.unused).items():
        _say(f"left out, {reason}: {names}")
    progress = _Progress(plan.bytes)
    record = convert(plan, args.to, files=files, written=progress)
    _say(f"peak memory {_peak_memory() / 1e9:.2f} GB")
    print(f"{record.directory} {record.kind} {record.fingerprint}")
    return 0


def _to_huggingface(args: argparse.Namespace) -> int:
    from slm_jax.checkpoints.foundation import read_foundation
    from slm_jax.checkpoints.to_huggingface import convert_to_huggingface

    if args.dtype is not None:
        raise UserError(
            "slm convert: --dtype has no meaning with --to_hf, which writes the numbers that there are"
        )
    record = read_foundation(args.source)
    total = sum(math.prod(shape) * _itemsize(dtype) for shape, dtype in record.parameters.values())
    convert_to_huggingface(record, args.to_hf, written=_Progress(total))
    _say(f"peak memory {_peak_memory() / 1e9:.2f} GB")
    described = json.loads((Path(args.to_hf) / "config.json").read_text(encoding="utf-8"))
    _say(f"transformers loads it by {described['architectures'][0]}.from_pretrained")
    print(Path(args.to_hf).absolute())
    return 0


def _peak_memory() -> int:
    """Bytes of this process at its largest; where the system does not tell, of those before it too."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _itemsize(dtype: str) -> int:
    import jax.numpy as jnp

    return jnp.dtype(dtype).itemsize


def _parameters(table: dict) -> str:
    count = sum(math.prod(shape) for shape, _ in table.values())
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def _by_reason(unused: dict[str, str]) -> dict[str, str]:
    """Their tensors that are left out, by reason: the first by name, and how many more."""
    names: dict[str, list[str]] = {}
    for name, reason in sorted(unused.items()):
        names.setdefault(reason, []).append(name)
    return {
        reason: found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        for reason, found in names.items()
    }


class _Progress:
    """Tells how much is written, and how long the rest will take, every few seconds."""

    _PERIOD = 5.0

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._started = self._told = time.monotonic()

    def __call__(self, written: int) -> None:
        self._done += written
        now = time.monotonic()
        if now - self._told < self._PERIOD and self._done < self._total:
            return
        self._told, spent = now, now - self._started
        left = spent * (self._total - self._done) / self._done
        _say(
            f"{_gigabytes(self._done)} of {_gigabytes(self._total)} written, "
            f"{self._done / 1e6 / max(spent, 1e-9):.0f} MB/s, {left:.0f} s left"
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
