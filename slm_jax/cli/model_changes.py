"""A run's model with parts that run another way: the same model, other memory and time."""

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax.cli.run import Run


def changed(run: "Run", change: Callable[[Any], Any]) -> "Run":
    """Returns the run with `change` applied to every configuration inside its model."""
    objective = copy.copy(run.objective)
    objective.model = _changed(run.objective.model, change)
    return dataclasses.replace(run, objective=objective)


def configs(run: "Run") -> list[Any]:
    """All configurations inside a run's model, inner ones first."""
    found: list[Any] = []

    def see(config: Any) -> Any:
        found.append(config)
        return config

    changed(run, see)
    return found


def with_remat(run: "Run", remat: str) -> "Run":
    """Returns the run with another remat policy of its LLM, or of all its parts where there is none."""
    from slm_jax.models.t5 import T5Config

    has_llm = any(isinstance(config, T5Config) for config in configs(run))

    def change(config: Any) -> Any:
        if isinstance(config, T5Config) if has_llm else hasattr(config, "remat"):
            return dataclasses.replace(config, remat=remat)
        return config

    return changed(run, change)


def with_plain_attention(run: "Run", kernel: str) -> "Run":
    """Returns the run with plain attention where it has this kernel, which needs its own hardware."""

    def change(config: Any) -> Any:
        if getattr(config, "attention_kernel", None) == kernel:
            return dataclasses.replace(config, attention_kernel="plain")
        return config

    return changed(run, change)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    import flax.linen as nn

    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.init and field.name not in ("parent", "name")
    }
    inner = {name: _changed(field, change) for name, field in fields.items()}
    new = {name: field for name, field in inner.items() if field is not fields[name]}
    if isinstance(value, nn.Module):
        return value.clone(**new) if new else value
    return change(dataclasses.replace(value, **new) if new else value)
