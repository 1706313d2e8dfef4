"""Fingerprints: the same for the same content, however it is spread; another for any other content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.fingerprints import fingerprint, fingerprint_file, fingerprint_text
from slm_jax.partitioning.mesh import make_mesh


def make_tree(rng):
    return {
        "wi": rng.normal(size=(24, 40)).astype(np.float32),
        "stack": {"kernel": rng.normal(size=(3, 16, 8)).astype(jnp.bfloat16)},
        "odd": rng.normal(size=(7, 10)).astype(np.float32),
        "scale": np.float32(rng.normal()),
        "empty": np.zeros((0, 4), np.int32),
    }


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_the_mesh_does_not_matter(rng, shape):
    tree = make_tree(rng)
    mesh = make_mesh(*shape)
    specs = {
        "wi": PartitionSpec("fsdp", "tensor"),
        "stack": {"kernel": PartitionSpec(None, "tensor", "fsdp")},
        # Replicated over some axes, and whole.
        "odd": PartitionSpec(),
        "scale": PartitionSpec(),
        "empty": PartitionSpec(None, None),
    }
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)
    assert fingerprint(placed) == fingerprint(tree)


def test_shards_that_cut_through_tiles(rng):
    # Tiles of 5 rows (40 / 8), shards of 8: only the whole array has whole tiles.
    array = rng.normal(size=(40, 6)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:5]), ("five",))
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec("five", None)))
    assert fingerprint({"x": placed}) == fingerprint({"x": array})


def test_every_change_shows(rng):
    tree = make_tree(rng)
    seen = {fingerprint(tree)}
    place = tuple(int(rng.integers(size)) for size in tree["wi"].shape)
    flipped = tree["wi"].copy()
    flipped.view(np.uint32)[place] ^= 1
    swapped = tree["wi"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    far = tree["wi"].copy()
    # Two tiles that change places: each is there as before, elsewhere.
    far[[0, 23]] = far[[23, 0]]
    changes = [
        {**tree, "wi": flipped},
        {**tree, "wi": swapped},
        {**tree, "wi": far},
        {**tree, "wi": tree["wi"].T.copy()},
        {**tree, "wi": tree["wi"].reshape(40, 24)},
        {**tree, "wi": tree["wi"].view(np.int32)},
        {"wo" if name == "wi" else name: value for name, value in tree.items()},
        {name: value for name, value in tree.items() if name != "empty"},
        {**tree, "empty": np.zeros((4, 0), np.int32)},
        {**tree, "scale": -tree["scale"]},
    ]
    for changed in changes:
        seen.add(fingerprint(changed))
    assert len(seen) == len(changes) + 1


def test_order_of_keys_does_not_matter(rng):
    tree = make_tree(rng)
    assert fingerprint(dict(reversed(tree.items()))) == fingerprint(tree)


def test_files_and_texts(tmp_path, rng):
    content = rng.bytes(5000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_bytes(content[:-1])
    a, b, c = (fingerprint_file(tmp_path / name) for name in "abc")
    assert a == b != c
    assert fingerprint_text("a") != fingerprint_text("b")
