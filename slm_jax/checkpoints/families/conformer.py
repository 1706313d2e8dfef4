"""What the families whose network is the Conformer share: reading `config.json`, and our parameters."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slm_jax.errors import UserError, nearest
from slm_jax.models.conformer import ConformerConfig

KIND = "conformer"

# What changes how the network is run and not what it computes, and the features before it, of which
# `config.json` knows the number alone.
_OF_THE_RUN = ("dropout", "dtype", "remat", "scan_unroll", "log_mel", "kaldi_fbank")


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> Any:
    """Returns a positive or zero number of `config.json`; without a default the field must be there.

    Raises:
      UserError: it is missing, or no number, or negative.
    """
    value = config.get(name, default)
    if value is None:
        raise UserError(f"config.json: {name} is missing, expected a number{nearest(name, config)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"config.json: {name} is {value!r}, expected a number of at least 0")
    return value


def whole(config: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """Returns a whole number of `config.json`; without a default the field must be there.

    Raises:
      UserError: it is missing, or no whole number, or below `least`.
    """
    value = number(config, name, default)
    if not isinstance(value, int) or value < least:
        raise UserError(f"config.json: {name} is {value!r}, expected a whole number of at least {least}")
    return value


def expect(config: Mapping[str, Any], name: str, expected: Any) -> None:
    """Raises UserError where `config.json` has the field with another value; lists equal tuples."""
    found = config.get(name, expected)
    if _plain(found) != _plain(expected):
        raise UserError(f"config.json: {name} is {_plain(found)!r}, expected {_plain(expected)!r}")


def choose(config: Mapping[str, Any], name: str, choices: Mapping[Any, Any], default: Any) -> Any:
    """Returns what `choices` has for the field's value.

    Raises:
      UserError: it has nothing for it.
    """
    found = config.get(name, default)
    if not isinstance(found, str | None) or found not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise UserError(f"config.json: {name} is {found!r}, expected one of {known}")
    return choices[found]


def configured(**fields: Any) -> ConformerConfig:
    """Returns the configuration with these fields, refusals of which name `config.json`."""
    try:
        return ConformerConfig(**fields)
    except UserError as error:
        raise UserError(f"config.json gives sizes that do not fit: {error}") from error


def check_written(config: ConformerConfig, read_back: ConformerConfig, inert: Iterable[str]) -> None:
    """Refuses a configuration that is not computed by what was written for it.

    Args:
      config: what is to be written.
      read_back: what would be read of it.
      inert: fields that this family's network does not look at.

    Raises:
      UserError: a field differs.
    """
    for field in dataclasses.fields(config):
        found, expected = getattr(config, field.name), getattr(read_back, field.name)
        if found != expected and field.name not in (*_OF_THE_RUN, *inert):
            raise UserError(
                f"ConformerConfig.{field.name} is {found!r}, expected {expected!r}: "
                "transformers' model of this family computes nothing else"
            )


def prefix_of(tensors: Iterable[str], anchor: str) -> str:
    """Returns what stands before `anchor`, a tensor of the bare model, in a checkpoint's names."""
    return next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), "")


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
