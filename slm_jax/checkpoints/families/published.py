"""Reading the `config.json` of a published model, and finding its tensors."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slm_jax.errors import UserError, nearest

# transformers' names of activations, and ours.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}


def whole(config: Mapping[str, Any], field: str) -> int:
    """Returns a field that must be a whole number of at least 1.

    Raises:
      UserError: it is missing or another value.
    """
    found = _present(config, field, "a whole number of at least 1")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise UserError(f"config.json has {field} {found!r}, expected a whole number of at least 1")
    return found


def wholes(config: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """Returns a field that must be a list of whole numbers of at least 1.

    Raises:
      UserError: it is missing or another value.
    """
    found = _present(config, field, "a list of whole numbers")
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"config.json has {field} {found!r}, expected a list of whole numbers")
    return tuple(whole({field: number}, field) for number in found)


def number(config: Mapping[str, Any], field: str, default: float) -> float:
    """Returns a field that must be a number above 0; `default` where it is missing.

    Raises:
      UserError: it is another value.
    """
    found = config.get(field, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
        raise UserError(f"config.json has {field} {found!r}, expected a number above 0")
    return float(found)


def flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """Returns a field that must be true or false; `default` where it is missing.

    Raises:
      UserError: it is another value.
    """
    found = config.get(field, default)
    if not isinstance(found, bool):
        raise UserError(f"config.json has {field} {found!r}, expected true or false")
    return found


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


def require(config: Mapping[str, Any], field: str, expected: Any, default: Any, why: str) -> None:
    """Refuses a model of which a field, `default` where it is missing, is not as expected.

    Raises:
      UserError: naming the field, what was found and what was expected, and `why`.
    """
    if (found := config.get(field, default)) != expected:
        raise UserError(f"config.json has {field} {found!r}, expected {expected!r}: {why}")


def prefix_of(tensors: Collection[str], prefixes: Sequence[str], name: str) -> str:
    """Returns the first of the prefixes with which there is a tensor `name`, or else the last one."""
    return next((prefix for prefix in prefixes if prefix + name in tensors), prefixes[-1])


def _present(config: Mapping[str, Any], field: str, expected: str) -> Any:
    if field not in config:
        raise UserError(f"config.json has no {field}, expected {expected}")
    return config[field]
