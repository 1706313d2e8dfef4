"""Reading the `config.json` of a published model, and finding its tensors."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from slm_jax.errors import UserError, nearest

CONFIG = "config.json"
# The file that a source found the fields of `extractor_of` in.
EXTRACTOR = "the feature extractor (preprocessor_config.json or processor_config.json)"
SAMPLE_RATE = 16_000

# transformers' names of activations, and ours; the first of several is written. "gelu_fast" is the tanh form,
# written differently.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}

# More of anything than a network has; refused before memory or time is asked for it.
TOO_LARGE = 1 << 24
_LARGEST = float(np.finfo(np.float32).max)
# No value of a JSON file.
_REQUIRED: Any = object()


def whole(
    config: Mapping[str, Any], field: str, default: Any = _REQUIRED, least: int = 1, file: str = CONFIG
) -> int:
    """Returns a field that must be a whole number of at least `least`; `default` where it is missing.

    Raises:
      UserError: it is missing without a default, or another value.
    """
    expected = f"a whole number of at least {least}"
    found = _found(config, field, default, expected, file)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise UserError(f"{file} has {field} {found!r}, expected {expected}")
    if found >= TOO_LARGE:
        raise UserError(f"{file} has {field} {found}, expected less than {TOO_LARGE}")
    return found


def wholes(config: Mapping[str, Any], field: str, default: Any = _REQUIRED) -> tuple[int, ...]:
    """Returns a field that must be a list of whole numbers of at least 1; `default` where it is missing.

    Raises:
      UserError: it is missing without a default, or another value.
    """
    found = _found(config, field, default, "a list of whole numbers", CONFIG)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"config.json has {field} {found!r}, expected a list of whole numbers")
    return tuple(whole({field: number}, field) for number in found)


def number(
    config: Mapping[str, Any],
    field: str,
    default: Any = _REQUIRED,
    zero: bool = False,
    file: str = CONFIG,
) -> float:
    """Returns a field that must be a finite number above 0; `default` where it is missing.

    Args:
      config: the file's contents.
      field: of them.
      default: where it is missing; if not given, the field has to be there.
      zero: whether 0 will do.
      file: that is read.

    Raises:
      UserError: it is missing without a default, or another value.
    """
    expected = "a number of at least 0" if zero else "a number above 0"
    found = _found(config, field, default, expected, file)
    if not is_finite(found) or found < 0 or (found == 0 and not zero):
        raise UserError(f"{file} has {field} {found!r}, expected {expected}")
    return float(found)


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that float32 holds: neither NaN nor Infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value)) and abs(value) <= _LARGEST


def flag(config: Mapping[str, Any], field: str, default: bool, file: str = CONFIG) -> bool:
    """Returns a field that must be true or false; `default` where it is missing.

    Raises:
      UserError: it is another value.
    """
    found = config.get(field, default)
    if not isinstance(found, bool):
        raise UserError(f"{file} has {field} {found!r}, expected true or false")
    return found


def choose(config: Mapping[str, Any], field: str, choices: Mapping[Any, Any], default: Any) -> Any:
    """Returns what `choices` has for a field's value, a string or None; `default` where it is missing.

    Raises:
      UserError: it has nothing for it.
    """
    found = config.get(field, default)
    if not isinstance(found, str | None) or found not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise UserError(f"config.json has {field} {found!r}, expected one of {known}")
    return choices[found]


def activation(config: Mapping[str, Any], field: str, default: str = "gelu") -> str:
    """Returns our name of the activation in a field; that of their `default` where it is missing.

    Raises:
      UserError: we compute no such activation.
    """
    found = config.get(field, default)
    if not isinstance(found, str) or found not in ACTIVATIONS:
        raise UserError(f"config.json has {field} {found!r}{nearest(found, ACTIVATIONS)}")
    return ACTIVATIONS[found]


def activation_of(ours: str) -> str:
    """Returns transformers' name of one of our activations."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def require(
    config: Mapping[str, Any],
    field: str,
    expected: Any,
    default: Any = _REQUIRED,
    why: str = "",
    file: str = CONFIG,
) -> None:
    """Refuses a model of which a field is not as expected; lists equal tuples, and no number a boolean.

    Args:
      config: the file's contents.
      field: of them.
      expected: the value.
      default: the value where the field is missing; that expected if not given.
      why: a missing ability, for the sentence.
      file: that is read.

    Raises:
      UserError: naming the field, what was found and what was expected, and `why`.
    """
    found = _plain(config.get(field, expected if default is _REQUIRED else default))
    if isinstance(found, bool) != isinstance(expected, bool) or found != _plain(expected):
        reason = f": {why}" if why else ""
        raise UserError(f"{file} has {field} {found!r}, expected {_plain(expected)!r}{reason}")


def extractor_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what the feature extractor's own file says, nothing where there was none.

    Raises:
      UserError: it is no object.
    """
    found = config.get("feature_extractor")
    if not isinstance(found, Mapping | None):
        raise UserError(f"config.json has feature_extractor {found!r}, expected an object")
    return found or {}


def require_features(extractor: Mapping[str, Any], expected: Mapping[str, Any], why: str) -> None:
    """Refuses a model whose features were made otherwise than ours; fields that are missing are as expected.

    Args:
      extractor: as `extractor_of` returns it.
      expected: values by field, beside the sampling rate, which is 16 kHz in every model.
      why: for the sentence.

    Raises:
      UserError: naming the field, what was found and what was expected.
    """
    for field, value in {"sampling_rate": SAMPLE_RATE, **expected}.items():
        require(extractor, field, value, why=why, file=EXTRACTOR)


def prefix_of(tensors: Collection[str], prefixes: Sequence[str], name: str) -> str:
    """Returns the first of the prefixes with which there is a tensor `name`, or else the last one."""
    return next((prefix for prefix in prefixes if prefix + name in tensors), prefixes[-1])


def _found(config: Mapping[str, Any], field: str, default: Any, expected: str, file: str) -> Any:
    if field not in config and default is _REQUIRED:
        raise UserError(f"{file} has no {field}, expected {expected}{_similar(field, config)}")
    return config.get(field, default)


def _similar(field: str, config: Mapping[str, Any]) -> str:
    """Says which field has almost that name, if one does; all of them would be too many."""
    close = nearest(field, config)
    return close if "did you mean" in close else ""


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
