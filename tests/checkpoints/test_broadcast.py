"""What several replicas hold is read by one of them, has the same bits in all, and fails in all alike."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.broadcast import spread
from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import PARAMS_FILE, save_foundation, save_foundation_streamed
from slm_jax.checkpoints.safetensors import save_safetensors
from slm_jax.checkpoints.streaming import StreamedArray
from slm_jax.partitioning.mesh import make_mesh

# Replicas that are processes; several in each process; one across both; three axes; the slow network's axis.
MESHES = [
    {"data": 2, "fsdp": 4},
    {"data": 4, "fsdp": 2},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"slices": 2, "data": 2, "fsdp": 2},
]
# Divides no array's rows: the last piece overlaps the one before.
PIECE_BYTES = 50_000


def make_params(rng):
    params = {
        "wide": rng.normal(size=(251, 2048)).astype(np.float32),
        "tall": rng.normal(size=(2048, 256)).astype(np.float32),
        "stacked": rng.normal(size=(3, 64, 512)).astype(jnp.bfloat16),
        "norm": rng.normal(size=2048).astype(np.float32),
        "mask": rng.random(37) < 0.5,
        "count": np.asarray(rng.integers(9), np.int32),
    }
    # What a sum of floats would lose.
    params["norm"][:3] = -0.0, np.nan, 1e-42
    params["stacked"][0, 0, :2] = -0.0, 1e-40
    return params


def streamed(value):
    return StreamedArray(
        value.shape, value.dtype, value.ndim == 3, lambda: iter([((0,) * value.ndim, value)])
    )


def run(folder, expected, cases):
    """Returns what two processes of four devices told of each case."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = str(Path(__file__).with_name("loading_process.py"))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    logs = [folder / f"{process}.log" for process in range(2)]
    running = []
    for process, log in enumerate(logs):
        words = [*map(str, (port, 2, process, PIECE_BYTES, expected)), json.dumps(cases)]
        with log.open("w") as errors:
            running.append(
                subprocess.Popen(
                    [sys.executable, program, *words],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
            )
    lines = [process.communicate(timeout=180)[0].splitlines() for process in running]
    assert not any(process.returncode for process in running), "\n".join(log.read_text() for log in logs)
    # Gloo writes lines of its own.
    told = [[json.loads(line) for line in of if line.startswith("{")] for of in lines]
    return list(zip(*told, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one model in both formats, and copies of it that are damaged each in its way."""
    folder = tmp_path_factory.mktemp("models")
    params = make_params(np.random.default_rng(int(os.environ["SLM_TEST_SEED"])))
    save_safetensors(folder / "expected.safetensors", params)
    save_foundation(folder / "one_file", params, kind="t5", config={}, format="safetensors")
    arrays = {name: streamed(value) for name, value in params.items()}
    save_foundation_streamed(
        folder / "orbax", arrays, kind="t5", config={}, fingerprint=lambda: fingerprint(params)
    )
    for name, source in {
        "changed": "one_file", "lacking": "one_file", "cut": "orbax", "renamed": "orbax",
    }.items():  # fmt: skip
        shutil.copytree(folder / source, folder / name)
    save_safetensors(
        folder / "changed" / PARAMS_FILE,
        {**params, "wide": params["wide"] * 2, "tall": params["tall"] * 2},
    )
    save_safetensors(folder / "lacking" / PARAMS_FILE, {"wide": params["wide"]})
    for file in (folder / "cut" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    record = json.loads((folder / "renamed" / "foundation.json").read_text())
    (folder / "renamed" / "foundation.json").write_text(json.dumps({**record, "fingerprint": "0" * 32}))
    return folder


@pytest.fixture(scope="module")
def results(models):
    """What both processes told, by the case's name."""

    def case(mesh, first, second=None, **more):
        return {"mesh": mesh, "directories": [str(models / first), str(models / (second or first))], **more}

    cases = {}
    for number, mesh in enumerate(MESHES):
        # Orbax twice: the first time modules are read too.
        for name in ("orbax", "one_file", "orbax again"):
            cases[f"{name} {number}"] = case(mesh, name.split()[0])
    for name in ("orbax", "one_file"):
        cases[f"{name} int8"] = case(MESHES[3], name, int8=True)
    for name, sound in {
        "nowhere": "orbax", "changed": "one_file", "lacking": "one_file", "cut": "orbax", "renamed": "orbax",
    }.items():  # fmt: skip
        cases[name] = case(MESHES[0], sound, name)
    cases["nowhere for both"] = case(MESHES[0], "nowhere")
    cases["broken"] = case(MESHES[0], "one_file", broken=1)
    cases["sound after all"] = case(MESHES[0], "one_file")
    return dict(zip(cases, run(models, models / "expected.safetensors", list(cases.values())), strict=True))


def test_every_process_holds_the_bits_on_disk(results):
    right = [name for name in results if name.startswith(("orbax", "one_file", "sound"))]
    assert len(right) == 3 * len(MESHES) + 3
    for name in right:
        assert [told.get("wrong", told) for told in results[name]] == [[], []], name


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_each_byte_is_read_once(results, models, number):
    size = (models / "expected.safetensors").stat().st_size
    read = [told["read"] for told in results[f"orbax again {number}"]]
    assert 0.8 * size < sum(read) < 1.25 * size, MESHES[number]
    # The work is shared.
    assert max(read) < 0.75 * size, MESHES[number]


def test_what_one_process_cannot_read_ends_both_with_one_sentence(results, models):
    for name, words in {
        "nowhere": "UserError: process 1 of 2: .*nowhere is no foundation model",
        "lacking": "UserError: process 1 of 2: .*lacks parameter count",
        "cut": "UserError: process 1 of 2: .*cut is damaged",
        "renamed": f"UserError: process 1 of 2 found a t5 model with fingerprint {'0' * 32}, expected",
        "nowhere for both": f"UserError: {models}/nowhere is no foundation model",
    }.items():
        first, second = (told["error"] for told in results[name])
        assert first == second
        assert re.match(words, first), first


def test_changed_numbers_in_one_process_are_damage_in_both(results):
    for told in results["changed"]:
        assert "is damaged: its parameters have fingerprint" in told["error"]


def test_a_bug_in_one_process_ends_the_other_too(results):
    first, second = (told["error"] for told in results["broken"])
    assert first == "UserError: process 1 of 2: RuntimeError: broken"
    assert second == "RuntimeError: broken"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.bool_])
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [((2, 2, 2, 1), (None, "fsdp")), ((1, 4, 1, 2), ("tensor",)), ((2, 2, 1, 2), ())],
)
def test_pieces_that_do_not_divide_the_rows(rng, sizes, spec, dtype):
    slices, *others = sizes
    mesh = make_mesh(*others, slices=slices)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shape = (14, 6)
    # Every device holds something else; which replica it is of follows from its place on the mesh.
    shards = {device: rng.normal(size=sharding.shard_shape(shape)) * 9 for device in mesh.devices.flat}
    axes = [n for n, axis in enumerate(mesh.axis_names) if axis not in spec and mesh.devices.shape[n] > 1]
    counts = [mesh.devices.shape[n] for n in axes]
    replica = int(rng.integers(np.prod(counts)))
    # Three rows at a time of 14 or 7.
    piece_bytes = 3 * sharding.shard_shape(shape)[1] * np.dtype(dtype).itemsize
    whole = jax.make_array_from_single_device_arrays(
        shape, sharding, [jax.device_put(shards[d].astype(dtype), d) for d in mesh.devices.flat]
    )
    for shard in spread(whole, replica, piece_bytes).addressable_shards:
        place = [int(n[0]) for n in np.nonzero(mesh.devices == shard.device)]
        for n, number in zip(axes, np.unravel_index(replica, counts), strict=True):
            place[n] = int(number)
        np.testing.assert_array_equal(shard.data, shards[mesh.devices[tuple(place)]].astype(dtype))
