"""T5X's train state of an SLM: frozen variables come from foundation models, and no checkpoint holds them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from t5x import train_state as t5x_train_state  # pyright: ignore[reportMissingImports]
from t5x import utils as t5x_utils  # pyright: ignore[reportMissingImports]

from slm_jax.checkpoints.foundation import architecture, load_foundation
from slm_jax.checkpoints.parameters import check_parameters, parameter_table
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.sources.t5x import T5XTensors
from slm_jax.errors import UserError
from slm_jax.t5x_partner.model import FROZEN, SLMModel

_EMPTY = flax.core.freeze({})


class _FromFoundations:
    """What a checkpoint neither holds nor brings: `flax_mutables`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what T5X saves, and asks a checkpoint for."""
        whole = super().state_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return {name: value for name, value in whole.items() if name != "flax_mutables"}

    def restore_state(self, state_dict: Mapping[str, Any]) -> Any:
        """Returns what was saved, with the foundation models."""
        restored = super().restore_state(state_dict)  # pyright: ignore[reportAttributeAccessIssue]
        # T5X casts counters too to the dtype of `RestoreCheckpointConfig`; a step is compiled for these.
        like = self.replace(flax_mutables=_EMPTY)  # pyright: ignore[reportAttributeAccessIssue]
        restored = jax.tree.map(_as_counted, restored, like)
        return restored.replace(flax_mutables=self.load_frozen())  # pyright: ignore[reportAttributeAccessIssue]

    def as_logical_axes(self) -> Any:
        """Returns the logical axes of what T5X saves."""
        axes = super().as_logical_axes()  # pyright: ignore[reportAttributeAccessIssue]
        return axes.replace(flax_mutables=_EMPTY)


class SLMTrainState(_FromFoundations, t5x_train_state.FlaxOptimTrainState):
    """State of a training; `load_frozen` returns the frozen variables."""

    load_frozen: Callable[[], Any] | None = flax.struct.field(pytree_node=False, default=None)

    def replace_step(self, step: jax.Array) -> Any:
        """Returns the same at another step."""
        frozen, state_dict = self.flax_mutables, self.state_dict()
        state_dict["state"]["step"] = step
        return t5x_train_state.FlaxOptimTrainState.restore_state(self, state_dict).replace(
            flax_mutables=frozen
        )


class SLMInferenceState(_FromFoundations, t5x_train_state.InferenceState):
    """State without an optimizer; `load_frozen` returns the frozen variables."""

    load_frozen: Callable[[], Any] | None = flax.struct.field(pytree_node=False, default=None)


class SLMTrainStateInitializer(t5x_utils.TrainStateInitializer):
    """Gives T5X the state of an `SLMModel`: what trains, and what is frozen from foundation models.

    T5X's arguments, in `train_script.train.train_state_initializer_cls` and those of eval and infer.

    Raises:
      UserError: a frozen part has no foundation model.
    """

    def __init__(
        self,
        optimizer_def: Any,
        init_fn: Any,
        input_shapes: Mapping[str, Any],
        partitioner: Any,
        input_types: Mapping[str, Any] | None = None,
    ):
        self._model: SLMModel = init_fn.__self__
        super().__init__(optimizer_def, self._model.initial_variables, input_shapes, partitioner, input_types)
        shapes, axes = self.global_train_state_shape, self.train_state_axes
        self._frozen: Any = None
        self._frozen_shapes = _placed(shapes.flax_mutables, axes.flax_mutables, partitioner.mesh)
        self._trained_axes = axes.replace(flax_mutables=_EMPTY)
        for part in self._frozen_shapes.get(FROZEN, {}):
            if part not in self._model.foundations:
                raise UserError(
                    f"SLMModel.foundations has no {part!r}, which is frozen; expected its directory"
                )
        self.global_train_state_shape = self._with_frozen(shapes, shapes.flax_mutables)
        self.train_state_axes = self._with_frozen(axes, axes.flax_mutables)

    def from_scratch(self, init_rng: jax.Array) -> Any:
        """Returns the state before the first step."""
        # What is not returned is not computed: frozen models are never drawn.
        initialise = self._partitioner.partition(
            lambda rng: self._initialize_train_state(rng).replace(flax_mutables=_EMPTY),
            in_axis_resources=None,
            out_axis_resources=self._trained_axes,
        )
        state = initialise(init_rng)
        shapes = _placed(state.params, self.train_state_axes.params, self._partitioner.mesh)
        if self._model.initial_checkpoint is None:
            params = {**flax.core.unfreeze(state.params), **self._load(shapes, None)}
        else:
            params = _of_checkpoint(self._model.initial_checkpoint, shapes)
        state = state.replace_params(flax.core.freeze(params))
        return self._with_frozen(state, self._load_frozen())

    def _with_frozen(self, state: Any, frozen: Any) -> Any:
        of_inference = isinstance(state, t5x_train_state.InferenceState)
        kind = SLMInferenceState if of_inference else SLMTrainState
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return kind(**{**fields, "flax_mutables": frozen, "load_frozen": self._load_frozen})

    def _load_frozen(self) -> Any:
        """Returns the frozen variables on the mesh; read once, unless a train step was given them since."""
        loaded = jax.tree.leaves(self._frozen)
        if not loaded or any(leaf.is_deleted() for leaf in loaded):
            shapes = self._frozen_shapes.get(FROZEN)
            found = {FROZEN: self._load(shapes, self._model.frozen_dtype)} if shapes else {}
            self._frozen = flax.core.freeze(found)
        return self._frozen

    def _load(self, shapes: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
        """Returns those of the foundation models whose part is in `shapes`, as these say."""
        loaded = {}
        for name, directory in self._model.foundations.items():
            part = self._model.objective.parts[name]
            (place,) = part.path
            beside = dtype is None and place in self._frozen_shapes.get(FROZEN, {})
            # What trains beside a frozen part, such as LoRA, is no part of the foundation.
            if place not in shapes or beside:
                continue
            loaded[place] = load_foundation(
                directory,
                part.kind,
                flax.core.unfreeze(shapes[place]),
                dtype=dtype,
                config=architecture(part.config),
                defaults=architecture(type(part.config)()),
            )
            if dtype is None:
                loaded[place] = jax.tree.map(
                    lambda leaf, shape: leaf.astype(shape.dtype),
                    loaded[place],
                    flax.core.unfreeze(shapes[place]),
                )
        return loaded


def _as_counted(leaf: Any, like: Any) -> Any:
    return leaf if jnp.issubdtype(like.dtype, jnp.floating) else leaf.astype(like.dtype)


def _of_checkpoint(directory: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a T5X checkpoint, placed as these shapes say."""
    source = T5XTensors(directory)
    found = {name: (info.shape, info.dtype.name) for name, info in source.parameters().items()}
    check_parameters(found, parameter_table(shapes), source.where, check_dtype=False)
    return unflatten(
        {
            name: jax.device_put(source.parameter(name).astype(shape.dtype), shape.sharding)
            for name, shape in flatten(shapes).items()
        }
    )


def _placed(shapes: Any, axes: Any, mesh: Any) -> Any:
    """Returns shapes with the shardings that T5X's mesh axes give them, as plain dictionaries."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        flax.core.unfreeze(shapes),
        flax.core.unfreeze(axes),
    )
