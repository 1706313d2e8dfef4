"""T5X checkpoints without T5X: its own logits, every way that it wrote arrays, and damage of all sorts."""

import math
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_jax.checkpoints.families.t5 import FAMILY
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.sources.t5x import T5XSource, find_t5x
from slm_jax.errors import UserError
from slm_jax.models.networks import abstract_params
from slm_jax.models.t5 import T5, T5Config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

DATA = Path(__file__).parent / "data" / "t5x"
# Which archive holds the logits of which.
LOGITS = {
    "t5_legacy": "t5_legacy",
    "scalable_scan_legacy": "scalable_scan_legacy",
    "t5_orbax": "t5_legacy",
}
EXAMPLES = int(os.environ.get("SLM_FUZZ_EXAMPLES", "300"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The folder of the three checkpoints; copy what you change."""
    folder = tmp_path_factory.mktemp("t5x")
    for name in LOGITS:
        with tarfile.open(DATA / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder


def filled(source: T5XSource) -> tuple[T5Config, dict[str, Any]]:
    """Our configuration and parameters; every one filled, every tensor used or explained."""
    config = FAMILY.config_of(source.config, source.tensors)
    shapes = flatten(abstract_params(config))
    params = {name: np.full(leaf.shape, np.nan, leaf.dtype) for name, leaf in shapes.items()}
    used = set()
    for piece in FAMILY.pieces(config, source.tensors):
        axis, layer = piece.select or (0, None)
        index = () if layer is None else (*[slice(None)] * axis, layer)
        tensor = source.read(piece.source, index)
        assert tensor.shape == piece.layout.theirs
        place = () if piece.layer is None else piece.layer
        params[piece.parameter][place] = piece.layout.to_ours(tensor)
        used.add(piece.source)
    assert all(np.isfinite(param).all() for param in params.values())
    assert all((name in used) is (FAMILY.unused(name) is None) for name in source.tensors)
    return config, unflatten(params)


def logits_of(config: T5Config, params: Any, reference: Any) -> np.ndarray:
    @jax.jit
    def logits(params, inputs, targets):
        model = T5(config).bind({"params": params})
        mask = (inputs > 0).astype(jnp.int32)
        encoded = model.encode(model.embed(inputs), mask)
        hidden = model.decode(encoded, mask, targets, (targets > 0).astype(jnp.int32))
        return model.logits(hidden)

    return np.asarray(logits(params, reference["encoder_input_tokens"], reference["decoder_target_tokens"]))


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_t5x(checkpoints, name):
    source = T5XSource(checkpoints / name)
    config, params = filled(source)
    reference = np.load(DATA / f"{LOGITS[name]}_logits.npz")
    found = logits_of(config, params, reference)
    real = reference["decoder_target_tokens"] > 0
    np.testing.assert_allclose(found[real], reference["logits"][real], atol=1e-5)
    assert source.where == str(checkpoints / name / "checkpoint_7")
    assert source.config["relative_bias"] == ("layer" if "scan" in name else "shared")
    assert any(other.startswith("state.") for other in source.tensors)


@pytest.mark.parametrize("name", ["t5_legacy", "scalable_scan_legacy"])
def test_transformers_computes_the_same_from_what_is_written_for_it(checkpoints, name):
    """Through T5, and umT5 where each layer has a table of relative positions."""
    config, params = filled(T5XSource(checkpoints / name))
    table, state = flatten(params), {}
    for piece in FAMILY.hf_pieces(config):
        values = table[piece.parameter][() if piece.layer is None else piece.layer]
        state[piece.source] = torch.tensor(np.ascontiguousarray(piece.layout.to_theirs(values)))
    fields = FAMILY.hf_config(config)
    umt5 = config.relative_bias == "layer"
    kind: Any = transformers.UMT5ForConditionalGeneration if umt5 else transformers.T5ForConditionalGeneration
    assert kind.__name__ == fields["architectures"][0]
    theirs = kind(kind.config_class.from_dict(fields))
    theirs.lm_head = torch.nn.Linear(config.emb_dim, config.vocab_size, bias=False)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # tied to `shared`
    reference = np.load(DATA / f"{name}_logits.npz")
    inputs = torch.tensor(reference["encoder_input_tokens"]).long()
    with torch.no_grad():
        found = theirs.eval()(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            decoder_input_ids=torch.tensor(reference["decoder_input_tokens"]).long(),
            use_cache=False,
        ).logits.numpy()
    # transformers 5 scales the logits of every umT5; T5X does not.
    found = found * config.emb_dim**0.5 if umt5 else found
    real = reference["decoder_target_tokens"] > 0
    np.testing.assert_allclose(found[real], reference["logits"][real], atol=2e-5)


def test_a_part_of_a_tensor_is_what_numpy_gives(checkpoints):
    for name in LOGITS:
        source = T5XSource(checkpoints / name)
        table = source.read("target.token_embedder.embedding")
        assert table.shape == source.tensors["target.token_embedder.embedding"].shape == (256, 16)
        np.testing.assert_array_equal(
            source.read("target.token_embedder.embedding", (slice(3, 9), 2)), table[3:9, 2]
        )
    query = "target.encoder.encoder.attention.query.kernel"
    source = T5XSource(checkpoints / "scalable_scan_legacy")
    np.testing.assert_array_equal(source.read(query, (slice(None), 1)), source.read(query)[:, 1])


# Ways of the index to say where an array was written; all of them mean the folder beside it.
SPECS: dict[str, Callable[[str], dict[str, Any]]] = {
    "kvstore": lambda name: {"kvstore": {"driver": "file", "path": f"{name}/"}},
    "bucket": lambda name: {"kvstore": {"driver": "gcs", "bucket": "b", "path": f"models/x/{name}"}},
    "gfile": lambda name: {"kvstore": {"driver": "gfile", "path": f"/cns/models/x/{name}"}},
    "old": lambda name: {"kvstore": {"driver": "gcs", "bucket": "b"}, "path": f"models/x/{name}/"},
}


def write_legacy(
    folder: Path, params: dict[str, np.ndarray], place: Callable[[str, np.ndarray], Any]
) -> None:
    """Writes a legacy checkpoint, each leaf of whose index is what `place` returns."""
    folder.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, value in params.items():
        *folders, last = name.removeprefix("target.").split(".")
        node = target
        for part in folders:
            node = node.setdefault(part, {})
        node[last] = place(name, value)
    index = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(3)}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))


def zarr_beside(folder: Path, spec: Callable[[str], dict[str, Any]], chunks: int = 1) -> Any:
    """Writes each array as zarr, in `chunks` parts per dim, and returns what the index says of it."""

    def place(name: str, value: np.ndarray) -> dict[str, Any]:
        metadata = {
            "shape": list(value.shape),
            "chunks": [max(1, -(-size // chunks)) for size in value.shape],
            "compressor": {"id": "gzip", "level": 1},
        }
        kvstore = {"driver": "file", "path": f"{folder / name}/"}
        array = ts.open(
            {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "dtype": value.dtype.name},
            create=True,
        ).result()
        array.write(value).result()
        return {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata, **spec(name)}

    return place


@pytest.fixture(scope="module")
def params(checkpoints) -> dict[str, np.ndarray]:
    source = T5XSource(checkpoints / "t5_legacy")
    return {name: source.read(name) for name in source.tensors if name.startswith("target.")}


def assert_reads(folder: Path, params: dict[str, np.ndarray]) -> None:
    source = T5XSource(folder)
    assert {name for name in source.tensors if name.startswith("target.")} == params.keys()
    for name, value in params.items():
        assert source.tensors[name] == (value.shape, value.dtype)
        np.testing.assert_array_equal(source.read(name), value)
    assert FAMILY.config_of(source.config, source.tensors).num_heads == 4


@pytest.mark.parametrize("style", SPECS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_arrays_lie_beside_the_index_wherever_they_were_written(tmp_path, params, style, chunks):
    folder = tmp_path / "checkpoint_3"
    write_legacy(folder, params, zarr_beside(folder, SPECS[style], chunks))
    assert_reads(folder, params)


def test_bfloat16(tmp_path, params):
    halves = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    folder = tmp_path / "checkpoint_3"
    write_legacy(folder, halves, zarr_beside(folder, SPECS["kvstore"]))
    assert_reads(folder, halves)
    inline = tmp_path / "inline" / "checkpoint_3"
    write_legacy(inline, halves, lambda name, value: value)
    assert_reads(inline, halves)


@pytest.mark.parametrize("most", [1 << 30, 1000], ids=["whole", "chunked"])
def test_arrays_inside_the_index(tmp_path, monkeypatch, params, most):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", most)
    folder = tmp_path / "checkpoint_3"
    write_legacy(folder, params, lambda name, value: value.copy())
    assert (b"__msgpack_chunked_array__" in (folder / "checkpoint").read_bytes()) is (most == 1000)
    assert_reads(folder, params)
    assert T5XSource(folder).read("state.step") == 3


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_with_a_store_or_a_folder_for_each(tmp_path, params, ocdbt):
    tree = unflatten({name.replace(".", "/"): value for name, value in params.items()})
    tree["state"] = {"step": np.int32(3), "m": np.ones(2, np.float32)}
    state = tmp_path / "checkpoint_3" / "state"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(state, tree)
    assert (state / "manifest.ocdbt").exists() is ocdbt
    assert_reads(tmp_path, params)
    source = T5XSource(tmp_path)
    assert FAMILY.unused("state.m") and source.tensors["state.m"].shape == (2,)


@pytest.mark.parametrize("dims", [2, 3])
def test_unrolled_layers_with_a_table_each(tmp_path, checkpoints, dims):
    """T5X's scalable T5 without its scan: three dims of kernels, and a bias table in every layer."""
    source = T5XSource(checkpoints / "scalable_scan_legacy")
    config, expected = filled(source)
    unrolled = {}
    for name in (name for name in source.tensors if name.startswith("target.")):
        value = source.read(name)
        for stack in ("encoder", "decoder"):
            if not name.startswith(f"target.{stack}.{stack}."):
                continue
            for layer in range(value.shape[1]):
                one = np.take(value, layer, axis=1)
                if one.ndim == 3 and dims == 2:
                    one = one.reshape(-1, 16) if name.endswith("out.kernel") else one.reshape(16, -1)
                unrolled[name.replace(f"{stack}.{stack}", f"{stack}.layers_{layer}")] = one
            break
        else:
            unrolled[name] = value
    write_legacy(tmp_path / "checkpoint_1", unrolled, lambda name, value: value)
    found_config, found = filled(T5XSource(tmp_path))
    assert found_config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_layers_on_the_first_axis_tied_and_ungated(tmp_path, checkpoints):
    source = T5XSource(checkpoints / "scalable_scan_legacy")
    moved = {}
    for name in (name for name in source.tensors if name.startswith("target.")):
        value = source.read(name)
        moved[name] = (
            np.moveaxis(value, 1, 0) if ".encoder.encoder." in name or ".decoder.decoder." in name else value
        )
    moved.pop("target.decoder.logits_dense.kernel")
    for name in [name for name in moved if "wi_1" in name]:
        del moved[name]
        moved[name.replace("wi_1", "wi")] = moved.pop(name.replace("wi_1", "wi_0"))
    write_legacy(tmp_path / "checkpoint_1", moved, lambda name, value: value)
    config, params = filled(T5XSource(tmp_path))
    assert (config.tied_logits, config.gated, config.activation) == (True, False, "relu")
    kernel = flatten(params)["encoder/encoder/attention/out/kernel"]
    np.testing.assert_array_equal(kernel, moved["target.encoder.encoder.attention.out.kernel"])


def test_the_newest_step_is_taken_and_said(tmp_path, checkpoints):
    assert find_t5x(tmp_path) is None and find_t5x(tmp_path / "none") is None
    for step in (9, 10, 100):
        shutil.copytree(checkpoints / "t5_legacy" / "checkpoint_7", tmp_path / f"checkpoint_{step}")
    (tmp_path / "checkpoint_200").mkdir()
    assert find_t5x(tmp_path) == tmp_path / "checkpoint_100"
    assert find_t5x(tmp_path / "checkpoint_9") == tmp_path / "checkpoint_9"
    newest, *assumed = T5XSource(tmp_path).notes
    assert newest == f"checkpoint_100 is the newest of 3 checkpoints in {tmp_path}"
    assert T5XSource(tmp_path / "checkpoint_9").notes == tuple(assumed)
    assert "taken as gelu, 128" in assumed[0]


TABLE = "target.token_embedder.embedding"


def _drop(path: str) -> Callable[[Path], None]:
    return lambda folder: (
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    )


def _write(path: str, data: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / path).write_bytes(data)


def _cut(path: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:size])


def _swap(path: str, old: bytes, new: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes().replace(old, new))


DAMAGE = [
    (_drop(TABLE), "target.token_embedder.embedding cannot be read"),
    (_drop(f"{TABLE}/0.0"), "has 0 chunks, expected 1: the array is not whole"),
    (_cut(f"{TABLE}/0.0", 100), "cannot be read"),
    (_cut(f"{TABLE}/0.0", 5), "has a chunk of 5 bytes, expected one for 16384"),
    (_write(f"{TABLE}/.zarray", b"{"), "zarray is damaged"),
    (_swap(f"{TABLE}/.zarray", b'shape":[256,16]', b'shape":[256,999999]'), "has 1 chunks, expected"),
    (_swap(f"{TABLE}/.zarray", b"[256,16]", b"[99999999999,16]"), "has a chunk of"),
    (_swap(f"{TABLE}/.zarray", b"[256,16]", b"[256,17]"), r"has shape \(256, 16\) and dtype float32, but"),
    (_swap(f"{TABLE}/.zarray", b"<f4", b"|O"), "zarray is damaged: dtype"),
    (_cut("checkpoint", 1000), "checkpoint is damaged"),
    (_cut("checkpoint", 0), "checkpoint is damaged"),
    (_write("checkpoint", b"\x91" * 100000), "checkpoint is damaged"),
    (_write("checkpoint", b"\x80"), "has no optimizer/target"),
    (_write("checkpoint", msgpack.packb({"version": 4})), "has format 4, expected at most 3"),
    (
        _write("checkpoint", msgpack.packb({"optimizer": {"target": {"a": {"driver": "zarr"}}}})),
        "target.a has no path",
    ),
    (_write("checkpoint", msgpack.packb({"optimizer": {"target": {"a": "b"}}})), "expected an array"),
    (
        _write("checkpoint", msgpack.packb({"optimizer": {"target": {}}})),
        "has no target.token_embedder.embedding",
    ),
    (
        _swap("checkpoint", b"target.token_embedder.embedding/", b"../../../../../../../../etc/pass"),
        "cannot be read",
    ),
]


@pytest.mark.parametrize(("harm", "told"), DAMAGE)
def test_damage_is_told_in_one_sentence(tmp_path, checkpoints, harm, told):
    folder = tmp_path / "checkpoint_7"
    shutil.copytree(checkpoints / "t5_legacy" / "checkpoint_7", folder)
    harm(folder)
    with pytest.raises(UserError, match=told) as caught:
        T5XSource(tmp_path).read(TABLE)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("harm", ["manifest.ocdbt", "d"])
def test_damaged_orbax(tmp_path, checkpoints, harm):
    folder = tmp_path / "checkpoint_7"
    shutil.copytree(checkpoints / "t5_orbax" / "checkpoint_7", folder)
    found = [folder / "state" / harm] if harm != "d" else list((folder / "state").glob("**/d/*"))
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="state is damaged") as caught:
        T5XSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_missing(tmp_path, params):
    kept = {name: value for name, value in params.items() if "decoder.layers_1." not in name}
    write_legacy(tmp_path / "checkpoint_1", kept, lambda name, value: value)
    with pytest.raises(UserError, match=r"has layers \[0, 2\] of the decoder, expected all from 0"):
        T5XSource(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no T5X checkpoint, expected a folder checkpoint_<step>"):
        T5XSource(tmp_path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory, checkpoints) -> tuple[Path, bytes]:
    """A checkpoint whose index each example overwrites; its small arrays stand in the index."""
    source = T5XSource(checkpoints / "scalable_scan_legacy")
    folder = tmp_path_factory.mktemp("fuzzed") / "checkpoint_1"
    beside = zarr_beside(folder, SPECS["old"])
    names = sorted(name for name in source.tensors if name.startswith("target."))
    params = {name: source.read(name) for name in names}
    write_legacy(folder, params, lambda name, value: value if value.size < 99 else beside(name, value))
    return folder, (folder / "checkpoint").read_bytes()


@settings(
    max_examples=EXAMPLES,
    deadline=2000,
    derandomize=False,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_index_is_read_or_refused(fuzzed, data):
    folder, index = fuzzed
    size = len(index)
    mutated = bytearray(index)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(size, len(mutated)) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "delete", "repeat"]))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and at:
            del mutated[at:]
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete" and len(mutated) > 9:
            del mutated[at : at + 8]
        elif kind == "repeat":
            mutated[at:at] = mutated[at : at + 64]
    (folder / "checkpoint").write_bytes(mutated)
    try:
        source = T5XSource(folder)
        names = [name for name in source.tensors if name.startswith("target.")]
        # Nothing asks for more memory than the files can fill.
        assert sum(math.prod(source.tensors[name].shape) for name in names) < 100_000
        for name in names:
            assert source.read(name).shape == source.tensors[name].shape
        config = FAMILY.config_of(source.config, source.tensors)
        assert FAMILY.pieces(config, source.tensors)
    except UserError as error:
        assert "\n" not in str(error)
