"""The variables of a run: shapes, places, and how they come to be, never whole on one device."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slm_jax.errors import UserError
from slm_jax.partitioning.rules import LogicalRules, check_rules
from slm_jax.partitioning.sharding import like_params, named_shardings, partitioned, path_text, replicated
from slm_jax.training.objectives.base import Objective
from slm_jax.training.optimizers import OptimizerConfig, make_optimizer
from slm_jax.training.spikes import SpikeConfig
from slm_jax.training.state import TrainState

# Gets shapes with shardings by collection; returns arrays for the parts of that tree that it knows.
LoadVariables = Callable[[dict[str, Any]], dict[str, Any]]
# Gets shapes with shardings of the optimizer's state; returns arrays by name, such as `inner_state/0/count`.
LoadSlots = Callable[[Any], Mapping[str, jax.Array]]


class RunShapes(NamedTuple):
    """Shapes with shardings of all that a run holds.

    Attributes:
      boxed: variables by collection, with logical axes, for the sharding plan.
      state: of TrainState.
      frozen: of the frozen variables; empty where nothing is frozen.
    """

    boxed: dict[str, Any]
    state: TrainState
    frozen: Any


def optimizer_of(
    config: OptimizerConfig,
    objective: Objective,
    batch_shapes: dict[str, jax.ShapeDtypeStruct],
    spikes: SpikeConfig | None = None,
    apart: bool = False,
) -> optax.GradientTransformation:
    """Makes a run's optimizer as `make_optimizer`, which may look at the logical axes of the parameters."""
    boxed = jax.eval_shape(objective.init, jax.random.key(0), batch_shapes)["params"]
    axes = jax.tree.map(
        lambda leaf: tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else (),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return make_optimizer(config, axes, spikes, apart)


def run_shapes(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_shapes: dict[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    rules: LogicalRules,
) -> RunShapes:
    """Finds shapes and shardings without computing anything.

    Raises:
      UserError: from the partitioning rules, or the objective has nothing to train.
    """
    check_rules(rules, mesh.shape)
    with partitioned(mesh, rules):
        # The key is made inside: a mesh of devices that are only described computes nothing.
        boxed = dict(jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch), batch_shapes))
    if not jax.tree.leaves(boxed.get("params")):
        raise UserError("nothing trains: the model has no variables in the collection 'params'")
    unboxed = nn.unbox(boxed)
    shardings = named_shardings(boxed, mesh, rules)
    params = unboxed["params"]
    # Optax sees unboxed parameters: with boxes Adafactor's rank-1 slots would inherit rank-2 axes.
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        _placed(params, shardings["params"]),
        _placed(opt_state, like_params(opt_state, params, shardings["params"], mesh)),
    )
    return RunShapes(boxed, state, _placed(unboxed.get("frozen", {}), shardings.get("frozen", {})))


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_variables(
    objective: Objective,
    batch_shapes: dict[str, jax.ShapeDtypeStruct],
    shapes: dict[str, Any],
    load: LoadVariables | None,
    seed: int,
    mesh: Mesh,
    rules: LogicalRules,
) -> dict[str, Any]:
    """Loads what `load` knows and initialises the rest from the seed, every array already split.

    Args:
      objective: gives the initial values.
      batch_shapes: shapes of the global batch.
      shapes: shapes with shardings, by collection, of the variables wanted.
      load: brings foundation models; None initialises everything.
      seed: the same seed gives the same values on every mesh.
      mesh, rules: where the arrays go.

    Raises:
      UserError: from `load`, or it brings something that the model lacks or of another shape.
    """
    wanted = dict(jax.tree_util.tree_leaves_with_path(shapes))
    loaded = dict(jax.tree_util.tree_leaves_with_path(load(shapes))) if load else {}
    for path, leaf in loaded.items():
        if path not in wanted:
            raise UserError(f"the foundation model brings {path_text(path)}, which this model lacks")
        if leaf.shape != wanted[path].shape:
            raise UserError(
                f"the foundation model brings {path_text(path)} of shape {list(leaf.shape)}, "
                f"this model's has {list(wanted[path].shape)}"
            )
    missing = [path for path in wanted if path not in loaded]

    def initialise(key: jax.Array) -> list[jax.Array]:
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in batch_shapes.items()}
        # What is not returned is not computed: a frozen model that is loaded is never drawn.
        leaves = dict(jax.tree_util.tree_leaves_with_path(nn.unbox(dict(objective.init(key, batch)))))
        return [leaves[path] for path in missing]

    with partitioned(mesh, rules):
        fresh = jax.jit(initialise, out_shardings=[wanted[path].sharding for path in missing])(
            jax.random.key(seed)
        )
    leaves = {**loaded, **dict(zip(missing, fresh, strict=True))}
    return jax.tree_util.tree_map_with_path(
        lambda path, shape: jax.device_put(leaves[path], shape.sharding), shapes
    )


def make_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    carried: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the trained parameters.
      optimizer: of the run.
      shapes: of the state, with shardings.
      carried: optimizer state by name, such as `inner_state/0/count`, that goes on from another run.
    """
    slots = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.opt_state)}
    carried = carried or {}
    missing = [name for name in slots if name not in carried]

    def initialise(params: Any) -> list[jax.Array]:
        leaves = jax.tree_util.tree_leaves_with_path(optimizer.init(params))
        return [leaf for path, leaf in leaves if path_text(path) not in carried]

    fresh = jax.jit(initialise, out_shardings=[slots[name].sharding for name in missing])(params)
    leaves = {**carried, **dict(zip(missing, fresh, strict=True))}
    placed = [jax.device_put(leaves[name], slot.sharding) for name, slot in slots.items()]
    opt_state = jax.tree.unflatten(jax.tree.structure(shapes.opt_state), placed)
    return TrainState(jax.device_put(jnp.int32(0), shapes.step.sharding), params, opt_state)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
