"""Reading gin files and `--gin.NAME=value` flags, with errors a user can act on."""

import contextlib
import importlib
import importlib.resources
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, TypeVar

import gin
from gin import config as gin_internals

from slm_jax.errors import UserError, nearest

T = TypeVar("T")

_MACRO = re.compile(r"%([A-Za-z_]\w*)")
_BINDING = re.compile(r"([A-Za-z_][\w./]*)\s*=(.*)", re.DOTALL)


def packaged_gin_dir() -> Path:
    """Returns the folder of the gin files that come with the package."""
    return Path(str(importlib.resources.files("slm_jax") / "gin"))


def packaged_gin_files() -> list[str]:
    """Returns every packaged gin file, relative to `packaged_gin_dir()`."""
    root = packaged_gin_dir()
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.gin"))


def find_gin_file(name: str, search_paths: Sequence[str]) -> Path:
    """Returns the file that `name` means: the working directory first, then `search_paths`, then the package.

    Raises:
      UserError: no such file anywhere; names the nearest packaged file.
    """
    for folder in ["", *search_paths, packaged_gin_dir()]:
        path = Path(folder) / name
        if path.is_file():
            return path
    raise UserError(
        f"--gin_file: {name!r} is neither a file here nor in the search paths nor packaged"
        f"{nearest(name, packaged_gin_files())}"
    )


def parse(gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> None:
    """Parses files, then bindings (`NAME=value`), into gin's global configuration, from a clean start.

    Raises:
      UserError: a missing file, a syntax error, an unknown name, or a macro that nothing reads.
    """
    gin.clear_config()
    gin_internals._LOCATION_PREFIXES[:] = [""]
    # Files alone: gin's reader of package resources takes any folder on sys.path called `models` for a
    # package, and fails on it.
    gin_internals._FILE_READERS[:] = [(open, os.path.isfile)]
    for folder in [*search_paths, str(packaged_gin_dir())]:
        gin.add_config_file_search_path(folder)
    paths = [str(find_gin_file(name, search_paths)) for name in gin_files]
    with _user_errors(), _quiet_search():
        for path in paths:
            gin.parse_config_file(path)
        known = _macro_names()
        for binding in bindings:
            parts = _BINDING.fullmatch(binding)
            if parts is None:
                raise UserError(f"--gin.{binding}: expected --gin.NAME=value")
            name, value = parts.groups()
            if "." not in name and name not in known:
                raise UserError(f"--gin.{name}: no gin file reads a macro of that name{nearest(name, known)}")
            with _user_errors(place=f"--gin.{binding}"):
                gin.parse_config(f"{_imports()}\n{name} = {value}")


def build(configurable: Callable[..., T], **given: Any) -> T:
    """Calls `configurable` with everything that gin binds to it.

    Args:
      configurable: what is called.
      **given: arguments in place of what is bound; then no other macro need have a value than those it reads.

    Raises:
      UserError: a required macro is missing, or a parameter has no value.
    """
    missing = missing_required()
    if missing and not given:
        flags = ", ".join(f"--gin.{name}=..." for name in missing)
        raise UserError(
            f"missing required macro{'s' * (len(missing) > 1)} {', '.join(missing)}: give {flags}"
        )
    with _user_errors():
        return gin.get_configurable(configurable)(**given)


def bind(text: str) -> None:
    """Adds bindings in gin's words to what was parsed; they may import."""
    with _user_errors():
        gin.parse_config(text)


def bound(name: str) -> Any:
    """Returns the value that is bound to a parameter, such as `run.Run.working_dir`; None where none is."""
    try:
        return gin.query_parameter(name)
    except ValueError:
        return None


def resolved_config() -> str:
    """Returns all bindings as one gin file that no longer needs the files it came from."""
    return gin.config_str(max_line_length=100)


def operative_config() -> str:
    """Returns the bindings that were used so far, defaults included, as gin text."""
    return gin.operative_config_str(max_line_length=100)


def _imports() -> str:
    """The import lines that command-line bindings need, those of all files parsed so far."""
    lines = [line for line in gin.config_str().splitlines() if re.match(r"(from \S+ )?import ", line)]
    return "\n".join(lines)


def _macro_names() -> set[str]:
    text = gin.config_str()
    defined = {scope for scope, selector in gin_internals._CONFIG if selector == "gin.macro"}
    return defined | set(_MACRO.findall(text))


def missing_required() -> list[str]:
    """Returns the macros that something reads and nothing sets, or that are still `%gin.REQUIRED`."""
    read = {name for name in _MACRO.findall(gin.config_str()) if name != "gin"}
    given = {
        scope
        for (scope, selector), values in gin_internals._CONFIG.items()
        if selector == "gin.macro" and str(values.get("value")) != "%gin.REQUIRED"
    }
    return sorted(read - given)


@contextlib.contextmanager
def _quiet_search() -> Iterator[None]:
    """Keeps gin from logging an error for every folder in which it looks for an include."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _user_errors(place: str = "") -> Iterator[None]:
    """Turns gin's own errors into one sentence; errors of our own pass through."""
    try:
        yield
    except UserError as error:
        # gin appends lines that say which of its configurables it was calling.
        raise UserError(str(error).split("\n")[0]) from error
    except (
        ValueError, AttributeError, NameError, TypeError, OSError, SyntaxError, ImportError, RuntimeError,
        TokenError,
    ) as error:  # fmt: skip
        sentence = _sentence(error, place)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _sentence(error: Exception, place: str) -> str | None:
    """One sentence for an error that gin raised about the configuration; None if it is somebody else's."""
    text = str(error.args[0]) if isinstance(error, TokenError) else str(error)
    where = re.search(r"In file \S+ line \d+", text)
    place = f" ({place or (where and where.group(0).replace('In ', 'in '))})" if place or where else ""
    if found := re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text):
        name, parameter = found.groups()
        return f"gin: {name} has no parameter {parameter!r}{nearest(parameter, _parameters(name))}{place}"
    if found := re.search(
        r"Couldn't resolve selector (\S+); <module '([^']+)'.*has no attribute (\w+)", text
    ):
        selector, module, attribute = found.groups()
        instead = nearest(attribute, _public(module))
        return f"gin: {selector} names nothing: {module} has no {attribute!r}{instead}{place}"
    if found := re.search(r"Could not find <\w+ '?slm_jax\.cli\.([\w.]+)", text):
        return (
            f"gin: the gin files configure no {found.group(1)}; include 'runs/train.gin', or give it as "
            "another --gin_file"
        )
    if "malformed node or string" in text:
        # Python's reader of literals tells of its own objects.
        return f"gin: the value is no literal, expected one such as 3, 'text' (in quotes) or [1, 2]{place}"
    if found := re.search(r"Unable to open file: (.+?)\. Searched", text):
        instead = nearest(found.group(1), packaged_gin_files())
        return f"gin: include {found.group(1)!r} was not found{instead}{place}"
    if (
        isinstance(error, (SyntaxError, ImportError, TokenError))
        or " In file " in text
        or "In bindings string" in text
    ):
        return f"gin: {text.strip().splitlines()[0]}{place}"
    if "Required bindings for" in text or ("missing" in text and "required positional argument" in text):
        return f"gin: {text.strip().splitlines()[0]}{place}"
    return None


def _parameters(selector: str) -> list[str]:
    with contextlib.suppress(Exception):
        found = gin_internals._REGISTRY.get_match(selector)
        return list(inspect.signature(found.wrapped).parameters) if found else []
    return []


def _public(module: str) -> list[str]:
    return [name for name in vars(importlib.import_module(module)) if not name.startswith("_")]
