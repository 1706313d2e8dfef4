"""Optimizer state that goes on from another run, beside what is new."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.parameters import parameter_table
from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import path_text
from slm_jax.training.carried import carried_slots
from slm_jax.training.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    Decay,
    MuonConfig,
    ScheduleConfig,
    make_optimizer,
)
from slm_jax.training.spikes import SpikeConfig
from tests.training.toy import toy_train

AXES: Any = {
    "adapter": {"kernel": ("layers", "embed", "mlp"), "scale": ("norm",)},
    "lora": ("embed", "lora_rank"),
}
SHAPES = {"adapter": {"kernel": (3, 8, 12), "scale": (12,)}, "lora": (8, 4)}
CONFIGS = [
    AdamWConfig(weight_decay=0.1, b2=0.999, clip_norm=None),
    AdafactorConfig(min_dim_size_to_factor=8, update_rms=None),
    MuonConfig(),
]
NAMES = [type(config).__name__ for config in CONFIGS]


def drawn(rng, tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def leaves_of(tree: Any) -> dict[str, Any]:
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def carry(state: Any, fresh: Any, going_on: set[str]) -> Any:
    """The state of a second run, begun with what of the first one's goes on."""
    slots = carried_slots(fresh, {name: leaf.shape for name, leaf in leaves_of(state).items()}, going_on)
    assert slots is not None
    leaves = {**leaves_of(fresh), **{name: leaves_of(state)[old] for name, old in slots.items()}}
    return jax.tree.unflatten(jax.tree.structure(fresh), list(leaves.values()))


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_what_goes_on_steps_as_it_would_have_and_what_is_new_as_in_any_run(rng, config):
    params = drawn(rng, SHAPES)
    old, axes = ({"adapter": tree["adapter"]} for tree in (params, AXES))
    rate = dataclasses.replace(config, schedule=ScheduleConfig(0.03, 0))
    first = make_optimizer(dataclasses.replace(config, schedule=ScheduleConfig(0.5, 3, Decay.RSQRT)), axes)
    state = first.init(old)
    for _ in range(5):
        _, state = first.update(drawn(rng, {"adapter": SHAPES["adapter"]}), state, old)

    second = make_optimizer(rate, AXES, apart=True)
    begun = carry(state, second.init(params), {"adapter/kernel", "adapter/scale"})
    # The first run at this rate, and a run of its own for what is new.
    without_schedule, new = make_optimizer(rate, axes), make_optimizer(rate, {"lora": AXES["lora"]})
    new_state = new.init({"lora": params["lora"]})
    for _ in range(2):
        grads = drawn(rng, SHAPES)
        updates, begun = jax.jit(second.update)(grads, begun, params)
        went_on, state = jax.jit(without_schedule.update)({"adapter": grads["adapter"]}, state, old)
        began, new_state = jax.jit(new.update)({"lora": grads["lora"]}, new_state, {"lora": params["lora"]})
        expected = leaves_of({**went_on, **began})
        for name, leaf in leaves_of(updates).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-9)

    # A third run finds what it needs in the second one as well, though it clips and watches for spikes.
    changed = make_optimizer(
        dataclasses.replace(rate, clip_norm=1e9), AXES, spikes=SpikeConfig(6.0), apart=True
    )
    saved, names = leaves_of(begun), set(leaves_of(params))
    slots = carried_slots(
        jax.eval_shape(changed.init, params), {name: leaf.shape for name, leaf in saved.items()}, names
    )
    assert slots is not None
    for name, slot in slots.items():
        assert name == f"inner_state/{slot.replace('inner_state/', 'inner_state/1/', 1)}"
    # All but three counters of what is not finite and the counts of schedules, of which Muon has two.
    assert len(saved) - len(slots) == 3 + len(names) * (2 if isinstance(config, MuonConfig) else 1)


def test_state_of_another_optimizer_or_of_another_form_is_none_to_go_on_with(rng):
    params, names = drawn(rng, SHAPES), set(leaves_of(drawn(rng, SHAPES)))

    def saved(config) -> dict[str, tuple[int, ...]]:
        state = make_optimizer(config, AXES).init(params)
        return {name: shape for name, (shape, _) in parameter_table(state).items()}

    for wanted in CONFIGS:
        state = jax.eval_shape(make_optimizer(wanted, AXES, apart=True).init, params)
        for config in CONFIGS:
            assert (carried_slots(state, saved(config), names) is not None) == (config is wanted)
    state = jax.eval_shape(make_optimizer(AdafactorConfig(), AXES, apart=True).init, params)
    assert carried_slots(state, saved(CONFIGS[1]), names) is None


def test_a_run_that_carries_goes_on_bit_for_bit_and_as_it_began(tmp_path):
    adam = AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=1))
    before = toy_train(tmp_path / "first", 3, optimizer=adam, dropout=0.0)
    asked = []

    def load_slots(opt_state: Any) -> dict[str, jax.Array]:
        asked.append(True)
        saved = leaves_of(before.state.opt_state)
        slots = carried_slots(opt_state, {name: leaf.shape for name, leaf in saved.items()}, {"wi", "wo"})
        assert slots is not None
        return {name: jnp.array(saved[old], copy=True) for name, old in slots.items()}

    def second(name: str, steps: int, **options: Any) -> Any:
        return toy_train(
            tmp_path / name,
            steps,
            optimizer=adam,
            mesh=make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]),
            load_variables=lambda shapes: (
                {"params": jax.tree.map(jnp.copy, before.state.params)} if "params" in shapes else {}
            ),
            **{"load_slots": load_slots, **options},
        )

    whole = second("whole", 4)
    assert len(asked) == 1
    second("parts", 2)
    parts = second("parts", 4)
    # The second half read its own checkpoint.
    assert len(asked) == 2
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    state = whole.state.opt_state.inner_state[1].states["wi"]
    assert (int(state[0].count), int(state[2].count)) == (7, 4)
    assert state[0].mu["wi"].sharding.spec == whole.state.params["wi"].sharding.spec
    with pytest.raises(UserError, match="began as init_optimizer='carried', and this run asks for 'fresh'"):
        second("parts", 5, load_slots=None)
    with pytest.raises(UserError, match="began as init_optimizer='fresh', and this run asks for 'carried'"):
        toy_train(tmp_path / "first", 4, optimizer=adam, dropout=0.0, load_slots=load_slots)
    with contextlib.closing(RunCheckpoints(tmp_path / "parts" / "checkpoints", read_only=True)) as found:
        assert found.latest_step() == 4
