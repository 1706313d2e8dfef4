"""Collectives of compiled programs, counted in loops, against programs whose exchange is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.partitioning.collectives import GATHER_BY_SUM, count_collectives, memory_traffic
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.topology import Topology, compiling_for, find_topology

LAYERS, DIM, ROWS = 5, 256, 64


def lowered(mesh):
    """A scan over layers whose weights are split over fsdp and gathered in each round; a sum at the end."""

    def layer(x, part):
        return jnp.tanh(x @ jax.lax.all_gather(part, "fsdp", tiled=True)), None

    def step(weights, x):
        y, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.psum(jnp.sum(y), "data")

    specs = PartitionSpec(None, "fsdp"), PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    shapes = (LAYERS, DIM, DIM), (ROWS, DIM)
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(mapped).lower(*given)


@pytest.mark.parametrize("where", ["cpu", "v5e:2x2"])
def test_a_gather_in_a_loop_counts_as_often_as_the_loop_runs(where):
    here = Topology("here", jax.devices()[:4], "", 1, (), "on virtual devices")
    topology = here if where == "cpu" else find_topology(where)
    mesh = make_mesh(data=2, fsdp=2, devices=topology.devices)
    with compiling_for(topology) as options:
        text = lowered(mesh).compile(options).as_text()
    assert text
    found = {(one.kind, one.axes): one for one in count_collectives(text, mesh)}
    gathered = found["all-gather", ("fsdp",)]
    assert gathered.group == 2
    assert (gathered.count, gathered.bytes) == (LAYERS, LAYERS * DIM * DIM * 4)
    summed = found["all-reduce", ("data",)]
    assert (summed.count, summed.bytes) == (1, 4)
    # At least the gathered weights are written and read.
    assert memory_traffic(text) >= 2 * gathered.bytes


@pytest.mark.parametrize(("data", "kind"), [(1, GATHER_BY_SUM), (2, "all-gather")])
def test_over_a_whole_closed_torus_gathers_are_sums(data, kind):
    """Why presets have `DATA`: half of the torus is gathered as it is."""
    topology = find_topology("v5p:4x4x4")
    mesh = make_mesh(data=data, fsdp=64 // data, devices=topology.devices)
    with compiling_for(topology) as options:
        found = count_collectives(str(lowered(mesh).compile(options).as_text()), mesh)
    (gathered,) = [one for one in found if one.axes == ("fsdp",)]
    assert (gathered.kind, gathered.rings) == (kind, 1 if data == 2 else None)
    assert (gathered.count, gathered.bytes) == (LAYERS, LAYERS * DIM * DIM * 4)


def test_what_hosts_exchange_between_slices_counts():
    topology = find_topology("v5e:2x2", 2)
    mesh = make_mesh(data=1, fsdp=4, slices=2, devices=topology.devices)
    spec = PartitionSpec(("slice", "fsdp"))
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x, "slice"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec("fsdp")
    )
    x = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32, sharding=NamedSharding(mesh, spec))
    with compiling_for(topology) as options:
        text = str(jax.jit(summed).lower(x).compile(options).as_text())
    (found,) = count_collectives(text, mesh)
    assert found == ("all-reduce", ("slice",), 2, 1, ROWS // 8 * DIM * 4, None)


def test_of_arrays_that_are_summed_at_once_parts_in_zeros_are_gathered():
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    text = """
%put (z: f32[8], p: f32[2]) -> (f32[8], f32[8]) {
  %z = f32[8]{0} parameter(0)
  %p = f32[2]{0} parameter(1)
  %first = f32[8]{0} dynamic-update-slice(%z, %p, %c)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%z, %first)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[2]{0} parameter(1)
  %two = (f32[8]{0}, f32[8]{0}) fusion(%p, %q), kind=kLoop, calls=%put
  %none = f32[8]{0} get-tuple-element(%two), index=0
  %one = f32[8]{0} get-tuple-element(%two), index=1
  %again = f32[4,2]{1,0} bitcast(%one)
  ROOT %x = (f32[8]{0}, f32[4,2]{1,0}, f32[8]{0}) all-reduce(%none, %again, %p), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""  # noqa: E501
    assert count_collectives(text, mesh) == [
        ("all-reduce", ("fsdp",), 2, 1, 64, None),
        (GATHER_BY_SUM, ("fsdp",), 2, 1, 32, None),
    ]


GROUPS = {
    "{{0,2},{1,3}}": ("data",),
    "[2,2]<=[4]": ("fsdp",),
    "[2,2]<=[2,2]T(1,0)": ("data",),
    "[1,4]<=[4]": ("data", "fsdp"),
    "mesh['a'=2,'b'=1,'c'=2] {'c'}": ("fsdp",),
    "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}": ("fsdp",),
    "mesh['a'=4] {'a':(1)2}": ("data",),
    "mesh['a'=4] {'a':(2)2}": ("fsdp",),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_axes_are_found_in_every_way_to_write_groups(groups):
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        f"  ROOT %x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n"
    )
    (found,) = count_collectives(text, mesh)
    assert (found.kind, found.axes, found.bytes) == ("all-reduce", GROUPS[groups], 32)
    assert found.group == np.prod([2] * len(GROUPS[groups]))


def test_a_reduce_scatter_that_is_a_fusion_on_tpu_is_one():
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    text = """
%all-reduce-scatter.1 (p.1: f32[8]) -> f32[4] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  %y = f32[8]{0:T(128)} all-reduce(%p.1), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %z = f32[4]{0:T(128)} dynamic-slice(%y, %c), dynamic_slice_sizes={4}
}

ENTRY %main (p: f32[8]) -> f32[4] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %x = f32[4]{0:T(128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = count_collectives(text, mesh)
    assert found == ("reduce-scatter", ("fsdp",), 2, 1, 32, None)
    # Of a fusion the result alone is in memory.
    assert memory_traffic(text) == 2 * 16


def test_of_a_start_and_its_end_one_counts():
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %x = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %y = f32[8]{0:T(128)} collective-permute-done(%x)
}
"""  # noqa: E501
    assert count_collectives(text, mesh) == [("collective-permute", ("fsdp",), 2, 1, 32, None)]
    assert memory_traffic(text) == 2 * 32


def test_of_gathers_that_are_started_together_each_counts():
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    text = """
ENTRY %main (p: f32[8], q: f32[4]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %x = ((f32[8]{0}, f32[4]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%p, %q), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %y = (f32[16]{0}, f32[8]{0}) all-gather-done(%x)
  ROOT %z = f32[16]{0} get-tuple-element(%y), index=0
}
"""  # noqa: E501
    assert count_collectives(text, mesh) == [("all-gather", ("fsdp",), 2, 1, 96, None)]
