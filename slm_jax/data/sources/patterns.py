"""Names of many files at once: braces, `*`, folders and lists."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence

from slm_jax import storage
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.errors import UserError, nearest

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expanded(pattern: str) -> list[str]:
    """Returns what braces stand for, as a shell would: `{000..123}` and `{a,b}`, several of them multiplied.

    `_OP_0..123_CL_`, NeMo's way to write braces where a shell or Hydra would take them, counts as braces.
    """
    pieces = _BRACES.split(pattern.replace("_OP_", "{").replace("_CL_", "}"))
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def files_of(paths: Paths, suffix: str, what: str) -> list[str]:
    """Returns the files that paths, braces, `*` or folders name, in that order.

    Args:
      paths: one or several; of a folder all files that end in `suffix`.
      suffix: such as `.tar`.
      what: the files are, for errors.

    Raises:
      UserError: a folder or a `*` names no file, or cannot be listed. That files exist is not checked.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files: list[str] = []
    for pattern in itertools.chain.from_iterable(expanded(os.fspath(path)) for path in given):
        path = storage.absolute(pattern)
        with naming_mistakes(path, what):
            files += _listed(path, suffix, what)
    if not files:
        raise UserError(f"no {what} is named, expected at least one")
    return files


def _listed(path: str, suffix: str, what: str) -> list[str]:
    folder, _, name = path.rpartition("/")
    if "*" in name:
        if found := storage.find(path):
            return found
        raise UserError(f"no {what} matches {path}{nearest(name, storage.list_folder(folder))}")
    if path.endswith(suffix) or not storage.is_folder(path):
        return [path]
    names = storage.list_folder(path)
    if found := [f"{path.rstrip('/')}/{name}" for name in names if name.endswith(suffix)]:
        return found
    raise UserError(f"folder {path} holds no {what} (*{suffix})")


def _choices(inside: str) -> list[str]:
    if numbers := _RANGE.fullmatch(inside):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]
