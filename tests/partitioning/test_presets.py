"""Rules and presets: what is refused, and the sharding plan of two models under each preset.

`SLM_WRITE_GOLDEN=1 pytest tests/partitioning/test_presets.py` writes the plans anew.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from slm_jax.cli import gin_config
from slm_jax.cli.run import MeshConfig
from slm_jax.errors import UserError
from slm_jax.models import slm
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES, check_rules
from slm_jax.partitioning.sharding import plan_text

GOLDEN = Path(__file__).parent / "golden"
PRESETS = ("ddp", "fsdp", "fsdp_tensor", "multislice")
ONE = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device where nothing is computed."""

    id: int
    process_index: int = 0
    platform: str = "cpu"


def preset(name):
    gin_config.parse([f"partitioning/{name}.gin"], ["SLICES=2"] if name == "multislice" else [])
    found = gin_config.build(MeshConfig)
    devices = [Device(number) for number in range(16)]
    return make_mesh(found.data, found.fsdp, found.tensor, slices=found.slices, devices=devices), found.rules


@functools.cache
def boxed(size):
    model = slm.SLM(slm.preset(size))
    samples = 4 * model.samples_per_position
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    batch = {
        "speech": jax.ShapeDtypeStruct((1, 1, samples), jnp.int16),
        "speech_segments": jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.int32),
        "loss_weights": jax.ShapeDtypeStruct((1, 4), jnp.float32),
    }
    names = ("inputs", "layout", "layout_segment_ids", "targets", "target_segment_ids", "target_positions")
    return dict(jax.eval_shape(model.init, jax.random.key(0), {**batch, **dict.fromkeys(names, tokens)}))


@pytest.mark.parametrize("size", ["tiny", "xxl"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_of_a_preset(name, size):
    mesh, rules = preset(name)
    check_rules(rules, mesh.shape)
    path = GOLDEN / f"slm_{size}_{name}.txt"
    found = plan_text(boxed(size), mesh, rules)
    if os.environ.get("SLM_WRITE_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["fsdp_tensor", "multislice"])
def test_presets_that_split_all_agree_with_the_default_rules(name):
    assert sorted(preset(name)[1], key=str) == sorted(DEFAULT_RULES, key=str)


@pytest.mark.parametrize(
    ("rules", "sizes", "told"),
    [
        ((*DEFAULT_RULES, ("emded", "fsdp")), {}, "'emded'; did you mean 'embed'"),
        ((*DEFAULT_RULES, ("kv", "tensor")), {}, "'kv' -> 'tensor' is never used"),
        ((*DEFAULT_RULES, ("embed", ("data", "fsdp"))), {}, "is never used"),
        ((("embed", "tenser"), *DEFAULT_RULES), {}, "names no axis of the mesh; did you mean 'tensor'"),
        (DEFAULT_RULES[:-1], {}, "'activation_kv' has no rule"),
        (tuple((name, None) for name, _ in DEFAULT_RULES), {"tensor": 2}, "'tensor' is of size 2 and no"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rules, sizes, told):
    with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as caught:
        check_rules(rules, {**ONE, **sizes})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "rules",
    [
        5,
        None,
        "vocab",
        ("vocab",),
        (("vocab", 5),),
        (("vocab", ("data", 5)),),
        ((5, "data"),),
        dict(DEFAULT_RULES),
    ],
)
def test_what_are_no_rules_is_refused(rules):
    with pytest.raises(
        UserError, match=r"^MeshConfig.rules (is|has) [^\n]*, expected pairs of a logical axis"
    ):
        check_rules(rules, ONE)
    with pytest.raises(UserError, match=r"^MeshConfig.rules "):
        MeshConfig(rules=rules)


@pytest.mark.parametrize("axis", ["slices", "data", "fsdp", "tensor"])
@pytest.mark.parametrize("size", ["x", 0, -2, 1.5, True, None])
def test_what_is_no_size_of_an_axis_is_refused(axis, size):
    with pytest.raises(UserError, match=rf"^MeshConfig.{axis} is {size!r}, expected a whole number .* or -1"):
        MeshConfig(**{axis: size})


def test_a_second_choice_is_in_order():
    check_rules((*DEFAULT_RULES, ("embed", "data"), ("embed", None)), ONE)
