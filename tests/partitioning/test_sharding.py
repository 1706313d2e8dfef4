"""Mesh, rules and sharding plan."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.linen.spmd import with_logical_constraint
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import MESH_AXES, make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.partitioning.sharding import (
    batch_sharding,
    batch_shards,
    check_batch_rows,
    like_params,
    named_shardings,
    partitioned,
    plan_text,
    spec_of,
)
from slm_jax.training.optimizers import AdafactorConfig, make_optimizer


class Tiny(nn.Module):
    """Two layers of each kind of axis."""

    @nn.compact
    def __call__(self, x):
        def param(name, shape, axes, dtype=jnp.float32):
            return self.param(name, nn.with_logical_partitioning(nn.initializers.ones, axes), shape, dtype)

        param("embedding", (64, 16), ("vocab", "embed"), jnp.bfloat16)
        param("query", (2, 16, 4, 8), ("layers", "embed", "heads", "kv"))
        param("wi", (2, 16, 32), ("layers", "embed", "mlp"))
        param("scale", (16,), ("norm",))
        self.param("plain", nn.initializers.ones, (3,))
        return x


def boxed():
    return dict(jax.eval_shape(Tiny().init, jax.random.key(0), jnp.zeros(1)))


def box(shape, axes):
    return {"layer": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)}}


@pytest.mark.parametrize(
    ("asked", "found"),
    [((), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 1), (1, 8, 1)), ((1, 2, 4), (1, 2, 4))],
)
def test_mesh_fills_the_open_axis(asked, found):
    mesh = make_mesh(*asked)
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, (1, *found), strict=True))
    assert [device.id for device in mesh.devices.ravel()] == list(range(8))


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "cpu"


def test_slices_are_groups_of_processes():
    # As jax.devices() may list them: not in the order of processes.
    devices = [Device(number, process_index=number % 4) for number in range(8)]
    mesh = make_mesh(fsdp=2, slices=2, devices=devices)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [{d.process_index for d in part.ravel()} for part in mesh.devices] == [{0, 1}, {2, 3}]
    with pytest.raises(UserError, match=r"slice=8, .*: 4 processes cannot be divided into 8 slices"):
        make_mesh(slices=8, devices=devices)
    # One process stands in for several.
    assert make_mesh(tensor=2, slices=2).devices.shape == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1 needs 3 devices, found 8"),
        ((-1, 3, 1), "8 devices are not divisible by 3"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 1), "number from 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*asked)


def test_every_axis_of_the_contract_has_a_rule():
    parameters = "embed heads kv mlp vocab layers relpos_buckets conv_kernel mel conv_in conv_out norm"
    parameters += " positions codebooks gates lora_rank"
    activations = "batch slots length embed heads kv mlp vocab"
    names = {*parameters.split(), *(f"activation_{name}" for name in activations.split())}
    assert {name for name, _ in DEFAULT_RULES} == names


def test_named_shardings_drop_the_boxes():
    mesh = make_mesh(2, 2, 2)
    specs = jax.tree.map(lambda sharding: sharding.spec, named_shardings(boxed(), mesh))
    assert specs == {
        "params": {
            "embedding": PartitionSpec("tensor", "fsdp"),
            "query": PartitionSpec(None, "fsdp", "tensor", None),
            "wi": PartitionSpec(None, "fsdp", "tensor"),
            "scale": PartitionSpec(None),
            "plain": PartitionSpec(),
        }
    }


def test_a_mesh_axis_is_used_once_per_array():
    mesh = make_mesh(2, 2, 2)
    assert spec_of(("embed", "embed"), mesh) == PartitionSpec("fsdp", None)
    # Rules come in order of precedence, not dims.
    assert spec_of(("mlp", "heads"), mesh) == PartitionSpec(None, "tensor")


def test_an_unknown_axis_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"parameter layer/kernel: .*'emded' .*did you mean 'embed'"):
        named_shardings(box((4, 4), ("emded", "mlp")), make_mesh())
    with pytest.raises(UserError, match="'embed' -> 'model' names no axis of the mesh"):
        spec_of(("embed",), make_mesh(), (("embed", "model"),))


def test_a_dim_that_does_not_divide_is_refused_with_the_parameter():
    with pytest.raises(UserError, match=r"layer/kernel: dim 'heads' of size 6 .* tensor of size 4"):
        named_shardings(box((16, 6), ("embed", "heads")), make_mesh(1, 2, 4))


def test_axes_and_dims_must_agree():
    with pytest.raises(UserError, match=r"shape \[16,6\] names 1 logical axes"):
        named_shardings(box((16, 6), ("embed",)), make_mesh())


def test_rows_of_a_batch_lie_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    assert batch_sharding(mesh).spec == PartitionSpec(("slice", "data", "fsdp"))
    assert batch_shards(mesh) == 4
    check_batch_rows(8, mesh)
    with pytest.raises(UserError, match=r"10 .* 4 batch shards; the nearest is 8 or 12"):
        check_batch_rows(10, mesh)
    with pytest.raises(UserError, match="the nearest is 4"):
        check_batch_rows(3, mesh)


def test_adafactor_slots_follow_the_dims_that_they_keep():
    mesh = make_mesh(2, 2, 2)
    params = {
        "wi": jax.ShapeDtypeStruct((16, 32), jnp.float32),
        "square": jax.ShapeDtypeStruct((16, 16), jnp.float32),
        "scale": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    shardings = {
        "wi": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "square": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "scale": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    optimizer = make_optimizer(AdafactorConfig(min_dim_size_to_factor=8))
    abstract = jax.eval_shape(optimizer.init, params)
    found = like_params(abstract, params, shardings, mesh)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(found), strict=True
        )
    }

    def slot(ending):
        return next(value for path, value in by_path.items() if path.endswith(ending))

    # Which of the two statistics is called row depends on the sizes.
    assert {slot("v_row/wi"), slot("v_col/wi")} == {
        ((16,), PartitionSpec("fsdp")),
        ((32,), PartitionSpec("tensor")),
    }
    assert slot("v_row/square") == ((16,), PartitionSpec())
    assert slot("/v/scale") == ((16,), PartitionSpec("fsdp"))
    for shape, spec in by_path.values():
        assert len(spec) <= len(shape)
        NamedSharding(mesh, spec).shard_shape(shape)


def test_constraints_inside_a_model_take_hold():
    mesh = make_mesh(2, 2, 2)

    def constrained(x):
        return with_logical_constraint(x, ("activation_batch", "activation_mlp"))

    with partitioned(mesh):
        result = jax.jit(constrained)(jnp.zeros((8, 4)))
    split = NamedSharding(mesh, PartitionSpec(("slice", "data", "fsdp"), "tensor"))
    assert result.sharding.is_equivalent_to(split, result.ndim)


GOLDEN = {
    (8, 1, 1): """\
mesh: slice=1, data=8, fsdp=1, tensor=1

params:
  embedding  [64,16]     bfloat16  (vocab,embed)            (tensor,fsdp)      2,048
  plain      [3]         float32   -                        -                  12
  query      [2,16,4,8]  float32   (layers,embed,heads,kv)  (-,fsdp,tensor,-)  4,096
  scale      [16]        float32   (norm)                   (-)                64
  wi         [2,16,32]   float32   (layers,embed,mlp)       (-,fsdp,tensor)    4,096
  total: 3,091 parameters, 10,316 bytes, 10,316 bytes per device
""",
    (2, 2, 2): """\
mesh: slice=1, data=2, fsdp=2, tensor=2

params:
  embedding  [64,16]     bfloat16  (vocab,embed)            (tensor,fsdp)      512
  plain      [3]         float32   -                        -                  12
  query      [2,16,4,8]  float32   (layers,embed,heads,kv)  (-,fsdp,tensor,-)  1,024
  scale      [16]        float32   (norm)                   (-)                64
  wi         [2,16,32]   float32   (layers,embed,mlp)       (-,fsdp,tensor)    1,024
  total: 3,091 parameters, 10,316 bytes, 2,636 bytes per device
""",
    (1, 2, 4): """\
mesh: slice=1, data=1, fsdp=2, tensor=4

params:
  embedding  [64,16]     bfloat16  (vocab,embed)            (tensor,fsdp)      256
  plain      [3]         float32   -                        -                  12
  query      [2,16,4,8]  float32   (layers,embed,heads,kv)  (-,fsdp,tensor,-)  512
  scale      [16]        float32   (norm)                   (-)                64
  wi         [2,16,32]   float32   (layers,embed,mlp)       (-,fsdp,tensor)    512
  total: 3,091 parameters, 10,316 bytes, 1,356 bytes per device
""",
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_the_plan_as_text(shape):
    assert plan_text(boxed(), make_mesh(*shape)) == GOLDEN[shape]
