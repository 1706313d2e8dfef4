"""Parameters as one file: read by the format's own library, the same bytes for the same parameters."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from slm_jax.checkpoints.safetensors import flatten, load_safetensors, save_safetensors, unflatten
from slm_jax.errors import UserError


def params(rng):
    return {
        "layers": {"wi": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}, "count": np.arange(3)},
        "scale": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }


def test_round_trip_in_all_dtypes(tmp_path, rng):
    tree = params(rng)
    save_safetensors(tmp_path / "a.safetensors", tree, {"kind": "test", "sizes": [1, 2]})
    read = load_safetensors(tmp_path / "a.safetensors")
    assert flatten(read).keys() == flatten(tree).keys() == {"layers/wi/kernel", "layers/count", "scale"}
    for name, leaf in flatten(tree).items():
        assert flatten(read)[name].dtype == leaf.dtype
        np.testing.assert_array_equal(flatten(read)[name], leaf)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == {"kind": "test", "sizes": "[1, 2]"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_parameters_give_the_same_bytes(tmp_path, rng):
    tree = params(rng)
    for name in ("a", "b"):
        save_safetensors(tmp_path / name, dict(reversed(tree.items())) if name == "b" else tree)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_others_may_read_it_as_any_file(tmp_path, rng):
    save_safetensors(tmp_path / "a", params(rng))
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_unflatten_is_the_inverse(rng):
    tree = params(rng)
    assert flatten(unflatten(flatten(tree))).keys() == flatten(tree).keys()


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      cut"])
def test_a_file_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors cannot be read"):
        load_safetensors(path)
