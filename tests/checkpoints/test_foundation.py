"""Foundation models: saved whole or not at all, loaded onto any mesh, refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.foundation import load_foundation, read_foundation, save_foundation
from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh

CONFIG = {"layers": 2, "dims": (16, 8), "dtype": "float32"}


def make_params(rng):
    return {
        "encoder": {"kernel": rng.normal(size=(16, 8)).astype(np.float32)},
        "scale": rng.normal(size=8).astype(np.float32),
        "table": rng.integers(0, 9, 5).astype(np.int32),
    }


def abstract(params, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding), params)


@pytest.fixture
def saved(tmp_path, rng):
    (tmp_path / "pieces.model").write_bytes(b"tokenizer")
    params = make_params(rng)
    save_foundation(tmp_path / "t5", params, kind="t5", config=CONFIG, files=[tmp_path / "pieces.model"])
    return tmp_path / "t5", params


def test_round_trip(saved):
    directory, params = saved
    loaded = load_foundation(directory, "t5", abstract(params), config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), loaded, params)
    assert (directory / "pieces.model").read_bytes() == b"tokenizer"
    record = read_foundation(directory)
    assert record.kind == "t5"
    assert record.config == {"layers": 2, "dims": [16, 8], "dtype": "float32"}
    assert sorted(path.name for path in directory.parent.iterdir()) == ["pieces.model", "t5"]


def test_loads_sharded_and_in_another_dtype(saved):
    directory, params = saved
    mesh = make_mesh(2, 2, 2)
    shapes = abstract(params, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    shapes["encoder"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=split)
    loaded = load_foundation(directory, "t5", shapes, jnp.bfloat16)
    assert loaded["encoder"]["kernel"].sharding == split
    assert loaded["table"].dtype == jnp.int32
    expected = jnp.asarray(params["encoder"]["kernel"], jnp.bfloat16)
    np.testing.assert_array_equal(loaded["encoder"]["kernel"], expected)
    again = directory.parent / "again"
    save_foundation(again, load_foundation(directory, "t5", shapes), kind="t5", config=CONFIG)
    assert read_foundation(again).fingerprint == read_foundation(directory).fingerprint


def test_what_does_not_fit_is_refused_by_name(saved):
    directory, params = saved
    with pytest.raises(UserError, match=r"kind 't5', expected 'conformer'"):
        load_foundation(directory, "conformer", abstract(params))
    with pytest.raises(UserError, match="field 'layers' is 2, expected 3"):
        load_foundation(directory, "t5", abstract(params), config={**CONFIG, "layers": 3})
    with pytest.raises(UserError, match="field 'lyers' is unknown to the model; did you mean 'layers'"):
        load_foundation(directory, "t5", abstract(params), config={**CONFIG, "lyers": 3})
    other = abstract(params)
    other["encoder"]["kernel"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    with pytest.raises(UserError, match=r"encoder/kernel has shape \[16, 8\], this model's has \[16, 4\]"):
        load_foundation(directory, "t5", other)
    with pytest.raises(UserError, match="lacks parameter bias, which this model has"):
        load_foundation(directory, "t5", {**abstract(params), "bias": abstract(params)["scale"]})


def test_missing_and_foreign_directories(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        read_foundation(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"it has no foundation\.json"):
        read_foundation(tmp_path)


def test_nothing_is_overwritten(saved, rng):
    directory, params = saved
    before = read_foundation(directory)
    with pytest.raises(UserError, match="never overwritten"):
        save_foundation(directory, make_params(rng), kind="t5", config=CONFIG)
    assert read_foundation(directory) == before
    empty = directory.parent / "empty"
    empty.mkdir()
    save_foundation(empty, params, kind="t5", config=CONFIG)
    assert read_foundation(empty).fingerprint == before.fingerprint


def test_damage_is_found(saved, rng):
    directory, params = saved
    copy = directory.parent / "copy"
    shutil.copytree(directory, copy)
    record = json.loads((copy / "foundation.json").read_text())
    (copy / "foundation.json").write_text(json.dumps({**record, "fingerprint": "0" * 32}))
    with pytest.raises(UserError, match="is damaged: its parameters have fingerprint"):
        load_foundation(copy, "t5", abstract(params))
    (copy / "foundation.json").write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(UserError, match="newer release"):
        load_foundation(copy, "t5", abstract(params))
    for text in ("{", "[]", "{}"):
        (copy / "foundation.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_foundation(copy)
    for file in (directory / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_foundation(directory, "t5", abstract(params))


def test_an_unwritable_place_is_one_sentence(tmp_path, rng):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save the t5 model") as failure:
        save_foundation(tmp_path / "file" / "t5", make_params(rng), kind="t5", config=CONFIG)
    assert "\n" not in str(failure.value)


def test_a_killed_save_leaves_nothing_that_loads(tmp_path, rng):
    program = textwrap.dedent(
        """
        import sys
        import numpy as np
        from slm_jax.checkpoints.foundation import save_foundation
        params = {str(i): np.random.default_rng(i).normal(size=(64, 64)) for i in range(200)}
        print("saving", flush=True)
        save_foundation(sys.argv[1], params, kind="t5", config={})
        """
    )
    target = tmp_path / "t5"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob(".t5.partial-*/params*")):
        time.sleep(0.001)
    time.sleep(float(rng.uniform(0, 0.02)))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="there is no such directory"):
        read_foundation(target)
    params = make_params(rng)
    save_foundation(target, params, kind="t5", config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, load_foundation(target, "t5", abstract(params)), params)


def test_one_file_holds_what_orbax_holds(tmp_path, rng):
    params = make_params(rng)
    for form in ("orbax", "safetensors"):
        save_foundation(
            tmp_path / form, params, kind="t5", config=CONFIG, format=form, provenance={"by": "us"}
        )
    records = [read_foundation(tmp_path / form) for form in ("orbax", "safetensors")]
    assert records[0].fingerprint == records[1].fingerprint and records[1].provenance == {"by": "us"}
    assert sorted(path.name for path in (tmp_path / "safetensors").iterdir()) == [
        "foundation.json", "params.safetensors",
    ]  # fmt: skip
    mesh = make_mesh(2, 2, 2)
    shapes = abstract(params, NamedSharding(mesh, PartitionSpec()))
    loaded = load_foundation(tmp_path / "safetensors", "t5", shapes, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["scale"].sharding.mesh == mesh


def test_a_changed_file_is_damaged_and_an_unknown_format_is_named(tmp_path, rng):
    params = make_params(rng)
    save_foundation(tmp_path / "t5", params, kind="t5", config=CONFIG, format="safetensors")
    file = tmp_path / "t5" / "params.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_foundation(tmp_path / "t5", "t5", abstract(params))
    with pytest.raises(UserError, match="did you mean 'safetensors'"):
        save_foundation(tmp_path / "t6", params, kind="t5", config=CONFIG, format="safetensor")
