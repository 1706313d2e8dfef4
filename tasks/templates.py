"""Prompt templates as data: packaged sets, a user's own files, or templates written in place.

A set is a JSON or TOML file, language of the prompt -> list of templates, as those in `prompts/` are.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.preprocessors import LANGUAGE_NAMES, SPEECH_MARKER, template_fields
from slm_jax.data.prompt_languages import language_name
from slm_jax.errors import UserError, nearest

# The name of a set, the path of a file, or the templates themselves, by language or for all of them.
Templates = str | Path | Sequence[str] | Mapping[str, Sequence[str]]

# The language of templates that were given without one.
ANY = ""
# As a language of the prompt: that of the speech.
OF_SPEECH = "speech"

ORDERS = ("template", "speech_first", "speech_last")

_FILE_ENDINGS = (".json", ".toml")
_NAMES_FILE = "language_names.json"
_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")


def load_templates(templates: Templates) -> dict[str, tuple[str, ...]]:
    """Returns templates by the language of the prompt; those given without one have the language `ANY`.

    Args:
      templates: the name of a packaged set, such as `asr`; the path of a `.json` or `.toml` file; a list of
        templates; or a mapping from language to such a list.

    Raises:
      UserError: there is no such set or file, it is not what is expected, or a template is malformed.
    """
    if isinstance(templates, str | Path):
        where, found = _read(templates)
    else:
        where, found = "prompt templates", templates
    if not isinstance(found, Mapping):
        return {ANY: _checked(found, where)}
    if not found:
        raise UserError(f"{where} hold no language, expected an object of language: list of templates")
    for language in found:
        if not isinstance(language, str) or not (_CODE.fullmatch(language) or language == ANY):
            raise UserError(f"{where}: {language!r} is no code of a language, expected one such as 'en'")
    return {language: _checked(some, f"{where}, {language!r}") for language, some in found.items()}


def filled(templates: Mapping[str, Sequence[str]], field: str, value: str) -> dict[str, tuple[str, ...]]:
    """Returns templates with `{field}` replaced by a text."""
    # A brace of the text is none of the template's.
    text = value.replace("{", "{{").replace("}", "}}")
    return {
        language: tuple(template.replace(f"{{{field}}}", text) for template in some)
        for language, some in templates.items()
    }


def with_target_language(
    templates: Mapping[str, Sequence[str]], code: str, prompt_language: str
) -> dict[str, tuple[str, ...]]:
    """Returns templates with `{target_language}` replaced by the name of a language in each one's own."""
    done: dict[str, tuple[str, ...]] = {}
    for language, some in templates.items():
        names = names_in(language or prompt_language)
        done |= filled({language: some}, "target_language", language_name(code, names))
    return done


def in_language(templates: Mapping[str, Sequence[str]], prompt_language: str) -> tuple[str, ...]:
    """Returns the templates of a fixed language.

    Raises:
      UserError: there are none; names the nearest language that there is.
    """
    if ANY in templates:
        return tuple(templates[ANY])
    if prompt_language not in templates:
        raise UserError(
            f"prompt_language is {prompt_language!r}, and there are no templates in it"
            f"{nearest(prompt_language, [*templates, OF_SPEECH])}"
        )
    return tuple(templates[prompt_language])


def by_language(templates: Mapping[str, Sequence[str]], first: str = "en") -> dict[str, tuple[str, ...]]:
    """Returns the templates of every language, those for speech in any other language first.

    Raises:
      UserError: they were given without a language.
    """
    if ANY in templates:
        raise UserError(
            "prompt_language is 'speech', which needs templates by language: language -> list of templates"
        )
    order = sorted(templates, key=lambda language: language != first)
    return {language: tuple(templates[language]) for language in order}


def names_in(prompt_language: str) -> Mapping[str, str]:
    """Returns the names of languages, code -> name, in a language; in English where those are not known."""
    return _names().get(prompt_language.replace("_", "-").partition("-")[0], LANGUAGE_NAMES)


def in_order(templates: Sequence[str], order: str) -> tuple[str, ...]:
    """Returns templates with the speech first or last.

    Args:
      templates: with the speech anywhere; one without stays as it is.
      order: `template` leaves it where it is; `speech_first`, `speech_last`.

    Raises:
      UserError: another order.
    """
    if order not in ORDERS:
        raise UserError(f"order is {order!r}{nearest(order, ORDERS)}")
    return tuple(_moved(template, order) for template in templates)


def _moved(template: str, order: str) -> str:
    head, marker, tail = template.partition(SPEECH_MARKER)
    if not marker or order == "template" or not (head if order == "speech_first" else tail).strip():
        return template
    if order == "speech_first":
        # The colon announced the speech, and is of no use before anything else.
        text = f"{head.rstrip().removesuffix(':').rstrip()} {tail.strip()}"
        return f"{marker} {text.strip()}"
    text = f"{head.strip()} {tail.strip()}".strip()
    return f"{text} {marker}" if text.endswith((".", "?", "!", ":")) else f"{text}: {marker}"


def packaged_sets() -> list[str]:
    """Returns the names of the packaged sets of templates."""
    return sorted(path.stem for path in _folder().glob("*.json") if path.name != _NAMES_FILE)


def _folder() -> Path:
    return Path(str(importlib.resources.files("slm_jax.tasks") / "prompts"))


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    return json.loads((_folder() / _NAMES_FILE).read_text(encoding="utf-8"))


def _read(name_or_path: str | Path) -> tuple[str, Any]:
    """Returns what to call a set of templates, and what it holds."""
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.suffix not in _FILE_ENDINGS:
        path = _folder() / f"{name_or_path}.json"
        if name_or_path not in packaged_sets():
            raise UserError(
                f"there is no set of prompt templates {name_or_path!r}, expected the name of a packaged one, "
                f"a .json or .toml file, or a list of templates{nearest(name_or_path, packaged_sets())}"
            )
    elif path.suffix not in _FILE_ENDINGS:
        raise UserError(f"prompt templates {path}: expected a .json or .toml file")
    try:
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*") if p.suffix in _FILE_ENDINGS]
        raise UserError(f"prompt templates {path} do not exist{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"prompt templates {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"prompt templates {path} are no {path.suffix[1:].upper()} ({line})") from None
    if not isinstance(found, dict):
        raise UserError(f"prompt templates {path}: expected an object of language: list of templates")
    return f"prompt templates {path}", found


def _checked(some: Any, where: str) -> tuple[str, ...]:
    if isinstance(some, str) or not isinstance(some, Sequence):
        raise UserError(f"{where}: found {some!r}, expected a list of templates")
    if not some:
        raise UserError(f"{where}: the list of templates is empty")
    for template in some:
        if not isinstance(template, str):
            raise UserError(f"{where}: template {template!r} is no text")
        try:
            template_fields(template)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if list(some).count(template) > 1:
            raise UserError(f"{where}: template {template!r} stands twice")
    return tuple(some)
