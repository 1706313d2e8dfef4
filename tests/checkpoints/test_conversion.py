"""Published checkpoints become foundation models and come back, whole or not at all."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import WHISPER, tensors_of, write_checkpoint, write_whisper
from safetensors.numpy import load_file, save_file

from slm_jax.checkpoints import conversion
from slm_jax.checkpoints.conversion import companions, convert, open_source, plan_conversion, slab_dim
from slm_jax.checkpoints.directories import new_directory
from slm_jax.checkpoints.families import t5, wav2vec2, whisper
from slm_jax.checkpoints.families.mapping import Layout, same, transposed
from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import config_of, load_foundation, read_foundation
from slm_jax.checkpoints.safetensors import flatten
from slm_jax.checkpoints.to_huggingface import convert_to_huggingface
from slm_jax.errors import UserError
from slm_jax.models.networks import abstract_params, boxed_params
from slm_jax.models.quantization import quantized
from slm_jax.models.t5 import T5Config
from slm_jax.models.wav2vec2 import Wav2Vec2Config

T5X = Path(__file__).parent / "data" / "t5x"


def converted(source, directory, dtype=None):
    return convert(plan_conversion(open_source(source), dtype), directory)


def loaded(record, sharding=None):
    abstract = abstract_params(WHISPER)
    if sharding is not None:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), abstract
        )
    return load_foundation(record.directory, "whisper", abstract)


def limited(file_bytes: int, words: list[str]) -> subprocess.CompletedProcess:
    """Runs `slm convert` where no file grows beyond a size: what a full disk says, without one."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import slm_jax.checkpoints.conversion;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}));"
        "from slm_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, "convert", *words], capture_output=True, text=True)


class TestForth:
    def test_every_number_arrives_where_its_layout_says(self, tmp_path):
        tensors = write_whisper(tmp_path / "hf", shards=4)
        record = converted(tmp_path / "hf", tmp_path / "ours")
        params = flatten(loaded(record))
        seen = set()
        for piece in whisper.FAMILY.hf_pieces(WHISPER):
            values = np.asarray(params[piece.parameter])
            one = values if piece.layer is None else values[piece.layer]
            np.testing.assert_array_equal(piece.layout.to_theirs(one), tensors[piece.source])
            seen.add(piece.parameter)
        assert seen == params.keys()
        assert config_of(record) == WHISPER

    def test_the_fingerprint_is_that_of_the_loaded_parameters(self, tmp_path):
        write_whisper(tmp_path / "hf")
        record = converted(tmp_path / "hf", tmp_path / "ours")
        assert (
            record.fingerprint
            == fingerprint(loaded(record))
            == read_foundation(tmp_path / "ours").fingerprint
        )

    def test_one_shard_or_many_give_the_same_model(self, tmp_path):
        write_whisper(tmp_path / "one")
        write_whisper(tmp_path / "many", shards=5)
        one, many = (converted(tmp_path / name, tmp_path / f"{name}_ours") for name in ("one", "many"))
        assert one.fingerprint == many.fingerprint

    def test_bfloat16_rounds_to_the_nearest(self, tmp_path):
        write_whisper(tmp_path / "hf")
        exact = loaded(converted(tmp_path / "hf", tmp_path / "f32"))
        rounded = loaded(converted(tmp_path / "hf", tmp_path / "bf16", "bfloat16"))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), np.asarray(b)),
            exact,
            rounded,
        )

    @pytest.mark.parametrize("slab_bytes", [256 << 20, 64])
    def test_int8_on_disk_is_what_a_run_would_round(self, tmp_path, monkeypatch, slab_bytes):
        monkeypatch.setattr(conversion, "_SLAB_BYTES", slab_bytes)
        config = T5Config(
            vocab_size=64, emb_dim=24, num_heads=3, head_dim=5, mlp_dim=40, encoder_layers=3, decoder_layers=2
        )
        write_checkpoint(tmp_path / "hf", tensors_of(t5.FAMILY, config), t5.FAMILY.hf_config(config))
        floats = converted(tmp_path / "hf", tmp_path / "floats")
        small = converted(tmp_path / "hf", tmp_path / "int8", "int8")
        boxed = jax.eval_shape(quantized, boxed_params(config))
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            nn.unbox(boxed),
        )
        rounded = load_foundation(floats.directory, "t5", abstract, dtype="bfloat16")
        stored = load_foundation(small.directory, "t5", abstract, dtype="bfloat16")
        assert flatten(rounded).keys() == flatten(stored).keys()
        for name, leaf in flatten(rounded).items():
            assert leaf.dtype == flatten(stored)[name].dtype, name
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(stored)[name]), err_msg=name)
        assert flatten(stored)["decoder/logits_dense/kernel_scale"].dtype == np.float32
        size = [
            sum(np.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in record.parameters.values())
            for record in (floats, small)
        ]
        assert size[1] < 0.35 * size[0]
        with pytest.raises(UserError, match=r"holds int8 weights.*FROZEN_WEIGHTS"):
            load_foundation(small.directory, "t5", abstract_params(config))
        with pytest.raises(UserError, match="transformers is given those of one dtype"):
            convert_to_huggingface(small, tmp_path / "back")

    def test_slabs_give_the_same_as_the_whole(self, tmp_path, monkeypatch):
        write_whisper(tmp_path / "hf")
        whole = converted(tmp_path / "hf", tmp_path / "whole")
        monkeypatch.setattr(conversion, "_SLAB_BYTES", 64)
        assert converted(tmp_path / "hf", tmp_path / "slabs").fingerprint == whole.fingerprint
        jax.tree.map(
            np.testing.assert_array_equal, loaded(whole), loaded(read_foundation(tmp_path / "slabs"))
        )

    def test_where_slabs_lie(self):
        assert slab_dim(same((8, 3))) == 0
        assert slab_dim(transposed((3,), (8,))) == 1
        assert slab_dim(transposed((3,), (4, 2))) is None
        assert slab_dim(Layout((), ())) is None

    def test_what_is_left_out_is_said(self, tmp_path):
        tensors = write_whisper(tmp_path / "hf")
        tensors["decoder.layers.0.fc1.weight"] = np.zeros((2, 2), np.float32)
        config = whisper.FAMILY.hf_config(WHISPER)
        write_checkpoint(tmp_path / "hf", tensors, config)
        assert plan_conversion(open_source(tmp_path / "hf")).unused == {
            "decoder.layers.0.fc1.weight": "the decoder"
        }

    @pytest.mark.parametrize("normalised", [False, True])
    def test_what_the_feature_extractors_file_says_of_our_network_counts(self, tmp_path, normalised):
        family, config = wav2vec2.FAMILY, Wav2Vec2Config(layers=1, dim=16, heads=2, mlp_dim=20)
        theirs = family.hf_config(config)
        theirs.pop("do_normalize")
        write_checkpoint(tmp_path / "hf", tensors_of(family, config), theirs)
        text = json.dumps({"do_normalize": normalised, "feature_size": 1})
        (tmp_path / "hf" / "preprocessor_config.json").write_text(text)
        found = plan_conversion(open_source(tmp_path / "hf")).config
        assert found == dataclasses.replace(config, normalize=normalised)


class TestBack:
    @pytest.mark.parametrize("shard_bytes", [1 << 30, 2000])
    def test_every_byte_comes_back(self, tmp_path, monkeypatch, shard_bytes):
        monkeypatch.setattr("slm_jax.checkpoints.to_huggingface._SHARD_BYTES", shard_bytes)
        tensors = write_whisper(tmp_path / "hf")
        record = converted(tmp_path / "hf", tmp_path / "ours")
        convert_to_huggingface(record, tmp_path / "back")
        back = {}
        for file in (tmp_path / "back").glob("*.safetensors"):
            back |= load_file(file)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name], tensor)
        # What is written can be converted again: the index, the names and the configuration are right.
        assert converted(tmp_path / "back", tmp_path / "again").fingerprint == record.fingerprint

    @pytest.mark.parametrize("change", [{"layers": 2}, {"layers": 4}, {"mel_bins": 8}])
    def test_a_record_that_belies_its_parameters_is_refused(self, tmp_path, change):
        write_whisper(tmp_path / "hf")
        converted(tmp_path / "hf", tmp_path / "ours")
        text = json.loads((tmp_path / "ours/foundation.json").read_text())
        text["config"] |= change
        (tmp_path / "ours/foundation.json").write_text(json.dumps(text))
        with pytest.raises(UserError, match="is of another model: parameter"):
            convert_to_huggingface(read_foundation(tmp_path / "ours"), tmp_path / "back")
        text["parameters"] = {}
        (tmp_path / "ours/foundation.json").write_text(json.dumps(text))
        with pytest.raises(UserError, match="holds parameters of nothing"):
            convert_to_huggingface(read_foundation(tmp_path / "ours"), tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_a_disk_that_fills_up_on_the_way_back(self, tmp_path):
        write_whisper(tmp_path / "hf")
        converted(tmp_path / "hf", tmp_path / "ours")
        done = limited(3_000, ["--from", str(tmp_path / "ours"), "--to_hf", str(tmp_path / "new" / "back")])
        assert done.returncode == 2, done.stderr
        assert "cannot save the checkpoint of transformers" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]

    def test_damaged_parameters_are_not_written(self, tmp_path):
        write_whisper(tmp_path / "hf")
        record = converted(tmp_path / "hf", tmp_path / "ours")
        text = json.loads((tmp_path / "ours/foundation.json").read_text())
        text["fingerprint"] = "0" * 32
        (tmp_path / "ours/foundation.json").write_text(json.dumps(text))
        with pytest.raises(UserError, match=r"damaged.*fingerprint"):
            convert_to_huggingface(read_foundation(record.directory), tmp_path / "back")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


class TestRefused:
    """One sentence, and nothing left behind."""

    @pytest.fixture
    def hf(self, tmp_path):
        write_whisper(tmp_path / "hf", shards=2)
        return tmp_path / "hf"

    def refused(self, hf, match, dtype=None):
        before = sorted(path.name for path in hf.parent.iterdir())
        with pytest.raises(UserError, match=match) as error:
            converted(hf, hf.parent / "ours", dtype)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in hf.parent.iterdir()) == before

    def shard(self, hf, number=1):
        return hf / f"model-{number:05d}-of-00002.safetensors"

    def change(self, hf, **fields):
        config = json.loads((hf / "config.json").read_text()) | fields
        (hf / "config.json").write_text(json.dumps(config))

    def test_no_directory(self, hf):
        self.refused(hf.with_name("absent"), "absent is no directory")

    def test_no_config(self, hf):
        (hf / "config.json").unlink()
        self.refused(hf, "holds no config.json")

    def test_config_that_is_no_json(self, hf):
        (hf / "config.json").write_text("{")
        self.refused(hf, "config.json is no JSON")
        (hf / "config.json").write_text("[" * 100_000)
        self.refused(hf, "config.json is no JSON")
        (hf / "config.json").write_text("[]")
        self.refused(hf, "expected an object")

    def test_unknown_architecture(self, hf):
        self.change(hf, model_type="whispr")
        self.refused(hf, r"model_type 'whispr', expected one of .*whisper")

    def test_truncated_shard(self, hf):
        data = self.shard(hf).read_bytes()
        self.shard(hf).write_bytes(data[:-1])
        self.refused(hf, "model-00001-of-00002.safetensors cannot be read")

    def test_absent_shard(self, hf):
        self.shard(hf).unlink()
        self.refused(hf, "index.json names model-00001-of-00002.safetensors, and .* holds no such file")

    def test_index_that_points_outside(self, hf):
        index = hf / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001", "../model-00001"))
        self.refused(hf, "expected a file name beside it")

    def test_index_that_lies(self, hf):
        a, b = self.shard(hf, 1).read_bytes(), self.shard(hf, 2).read_bytes()
        self.shard(hf, 1).write_bytes(b)
        self.shard(hf, 2).write_bytes(a)
        self.refused(hf, "lacks tensor .*, which model.safetensors.index.json says it holds")

    def test_pickles(self, tmp_path):
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "whisper"}))
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
        self.refused(folder, "pytorch_model.bin, which is not read because unpickling.*save_pretrained")

    def test_no_weights(self, hf):
        for path in hf.glob("model*"):
            path.unlink()
        self.refused(hf, "neither model.safetensors nor")

    def test_wrong_shape(self, hf):
        self.change(hf, encoder_ffn_dim=41)
        self.refused(hf, r"tensor layers.0.fc1.bias has shape \[40\], and its configuration asks for \[41\]")

    def test_missing_layer(self, hf):
        self.change(hf, encoder_layers=4)
        self.refused(hf, "lacks tensors layers.3.* and .* more, which its configuration asks for")

    def test_layers_too_many(self, hf):
        self.change(hf, encoder_layers=2)
        self.refused(hf, "holds tensors layers.2.* for which a model of its configuration has no use")

    @pytest.mark.parametrize("field", ["encoder_layers", "d_model", "num_mel_bins", "max_source_positions"])
    @pytest.mark.parametrize("value", [10**12, -1, 0, 2.5, "12", None, True, [3]])
    def test_sizes_that_cannot_be(self, hf, field, value):
        self.change(hf, **{field: value})
        self.refused(hf, "config")

    def test_mixed_dtypes(self, hf):
        tensors = load_file(self.shard(hf))
        name = min(tensors)
        tensors[name] = tensors[name].astype(np.float16)
        save_file(tensors, self.shard(hf))
        self.refused(hf, rf"mixes dtypes: float16 \({name}\) and float32 .*--dtype")
        assert converted(hf, hf.parent / "ours", "float32").parameters["conv_0/kernel"][1] == "float32"

    @pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "int8"])
    def test_whole_numbers_for_weights(self, hf, dtype):
        tensors = load_file(self.shard(hf))
        name = min(tensors)
        save_file(tensors | {name: tensors[name].astype(np.int32)}, self.shard(hf))
        self.refused(hf, f"tensor {name} has dtype int32, expected floating", dtype)

    def test_an_unreadable_tokenizer_is_said_before_anything_is_written(self, hf, monkeypatch):
        (hf / "spiece.model").write_bytes(b"pieces")
        # Whoever runs the tests may read everything.
        monkeypatch.setattr(os, "access", lambda path, mode: path.name != "spiece.model")
        with pytest.raises(UserError, match=r"spiece\.model cannot be read: permission denied"):
            companions(hf)

    def test_numbers_that_are_none(self, hf):
        tensors = load_file(self.shard(hf))
        name = min(tensors)
        tensors[name].flat[0] = np.nan
        save_file(tensors, self.shard(hf))
        self.refused(hf, f"tensor {name} holds values that are no numbers")

    def test_unknown_dtype_asked_for(self, hf):
        self.refused(hf, "--dtype is 'bf16'; did you mean 'bfloat16'", "bf16")

    def test_no_room(self, hf, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
        self.refused(hf, "GB free, expected")

    def test_a_disk_that_fills_up_meanwhile(self, hf):
        done = limited(3_000, ["--from", str(hf), "--to", str(hf.parent / "new" / "ours")])
        assert done.returncode == 2, done.stderr
        assert "cannot save the whisper model" in done.stderr
        assert sorted(path.name for path in hf.parent.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("we[ird]", "expected one without any of"),
        ("par*/ours", "expected one without any of"),
        ("", "is empty"),
        ("x" * 300, "name too long"),
        ("link", "is a link"),
    ],
)
def test_places_where_no_model_can_be_put(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(UserError, match=rf"(?i){told}"):
        new_directory(name)


def test_parents_that_were_made_go_with_what_failed(tmp_path):
    write_whisper(tmp_path / "hf")
    plan = plan_conversion(open_source(tmp_path / "hf"))
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="no_such_file"):
        convert(plan, tmp_path / "kept" / "a" / "b" / "ours", files=[tmp_path / "no_such_file"])
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("slab_bytes", [256 << 20, 64])
def test_layers_of_a_scanned_t5x_are_read_together_and_come_out_alike(tmp_path, monkeypatch, slab_bytes):
    with tarfile.open(T5X / "scalable_scan_legacy.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    whole = converted(tmp_path / "scalable_scan_legacy", tmp_path / "whole")
    monkeypatch.setattr(conversion, "_SLAB_BYTES", slab_bytes)
    source = open_source(tmp_path / "scalable_scan_legacy")
    reads, read = [], source.read
    monkeypatch.setattr(source, "read", lambda *args: reads.append(args) or read(*args))
    made, parts = [], conversion._Parts
    monkeypatch.setattr(conversion, "_Parts", lambda *args: made.append(parts(*args)) or made[-1])
    again = convert(plan_conversion(source), tmp_path / "again")
    # Nothing that was read is kept until the end.
    assert made and not any(part.read_before for part in made)
    assert again.fingerprint == whole.fingerprint
    kernels = [args for args in reads if args[0] == "target.decoder.decoder.mlp.wo.kernel"]
    assert len(kernels) == (1 if slab_bytes > 64 else 3)


def test_a_checkpoint_file_of_tensorflow_makes_no_t5x_of_a_folder(tmp_path):
    write_whisper(tmp_path / "hf")
    (tmp_path / "hf" / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    assert plan_conversion(open_source(tmp_path / "hf")).config == WHISPER


def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_cleans_up(tmp_path):
    write_whisper(tmp_path / "hf")
    # Slow enough to be killed between two parts.
    code = (
        "import sys, time; from slm_jax.checkpoints import streaming;"
        "streaming._Handler._write = lambda self, *args: (print('part', flush=True), time.sleep(600));"
        "from slm_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", "--from", tmp_path / "hf", "--to", tmp_path / "ours"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "part\n"
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".ours.partial-")]
    assert len(left) == 1
    # Another conversion to the same place leaves the living one's folder alone ...
    record = converted(tmp_path / "hf", tmp_path / "ours")
    assert left[0].is_dir()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(record.directory)
    for folder in left:
        with pytest.raises(UserError, match="no foundation model"):
            read_foundation(folder)
    # ... and one after its death removes it.
    converted(tmp_path / "hf", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    write_whisper(tmp_path / "hf")
    plan = plan_conversion(open_source(tmp_path / "hf"))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "ours", written=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_each_shard_is_read_once(tmp_path, spec):
    import tensorstore

    from slm_jax.checkpoints.streaming import StreamedArray, save_streamed

    values = np.random.default_rng(0).standard_normal((3, 512, 1024)).astype(np.float32)
    array = StreamedArray(
        values.shape, values.dtype, True, lambda: (((n, 0, 0), values[n : n + 1]) for n in range(3))
    )
    save_streamed(tmp_path / "params", {"kernel": array})
    size = sum(path.stat().st_size for path in (tmp_path / "params").rglob("d/*"))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *spec))
    import orbax.checkpoint as ocp

    def bytes_read() -> int:
        name = "/tensorstore/kvstore/file/bytes_read"
        (metric,) = tensorstore.experimental_collect_matching_metrics(name)
        return metric["values"][0]["value"]

    before = bytes_read()
    abstract = {"kernel": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params", abstract)["kernel"]
    assert bytes_read() - before < 1.05 * size
    np.testing.assert_array_equal(np.asarray(restored), values)
