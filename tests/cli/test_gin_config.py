"""Gin files and flags: what resolves, and what a user is told when something does not."""

import dataclasses

import gin
import jax
import pytest
from jax.experimental import topologies

from slm_jax.cli import gin_config
from slm_jax.cli.run import Run, load_run, save_config
from slm_jax.demo import foundation
from slm_jax.errors import UserError
from slm_jax.models import slm
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.compiler_options import check_compiler_options

# What each packaged file leaves to the user, with a value that parses.
_REQUIRED = {
    "MODEL_DIR": "'run'",
    "CORPUS_DIR": "'corpus'",
    "MIXTURE_OR_TASK_NAME": "'asr'",
    "TASK_FEATURE_LENGTHS": "{'speech': 16000, 'inputs': 8, 'targets': 8}",
    "TRAIN_STEPS": "1",
    "SPEECH_ENCODER_CHECKPOINT": repr(foundation.speech_encoder()),
    "LLM_CHECKPOINT": repr(foundation.llm()),
    "LIBRISPEECH_DIR": "'LibriSpeech'",
    "MLS_DIR": "'mls_german'",
    "COVOST2_DIR": "'covost'",
    "CLIPS_DIR": "'clips'",
    "SPEECH_ENCODER_OUTPUT": "'encoder'",
    "LLM_OUTPUT": "'llm'",
    "CTC_VOCAB_SIZE": "8",
    "SLICES": "2",
}
_RUNS = {
    "runs/train.gin": ["models/slm_tiny.gin"],
    "runs/plan.gin": ["models/slm_tiny.gin"],
    "runs/pretrain_encoder_ctc.gin": ["models/encoders/conformer_tiny.gin"],
    "runs/pretrain_encoder_best_rq.gin": ["models/encoders/conformer_tiny.gin"],
    "runs/pretrain_t5.gin": ["models/llms/t5_tiny.gin"],
    "recipes/demo_best_rq.gin": [],
    "recipes/demo_encoder.gin": [],
    "recipes/demo_t5.gin": [],
    "recipes/public_corpora.gin": [],
    "recipes/quickstart.gin": [],
}


def _bindings(files):
    gin_config.parse(files)
    return [f"{name}={_REQUIRED[name]}" for name in gin_config.missing_required()]


@pytest.mark.parametrize("name", sorted(_RUNS))
def test_runs_and_recipes_build(name):
    files = [*_RUNS[name], name]
    gin_config.parse(files, _bindings(files))
    run = gin_config.build(Run)
    assert run.objective.parts
    assert run.loop.train_steps >= 1


def test_every_packaged_file_is_covered():
    # Those of t5x/ configure T5X's functions: tests/t5x_partner builds them where T5X is.
    known = [name for name in gin_config.packaged_gin_files() if not name.startswith("t5x/")]
    others = {name for name in known if name not in _RUNS}
    for name in others:
        gin_config.parse([name])
        assert gin.config_str()
    assert {name for name in others if name.startswith(("runs/", "recipes/"))} == {"runs/common.gin"}


@pytest.mark.parametrize("size", ["tiny", "xxl"])
def test_model_files_are_the_presets(size):
    gin_config.parse([f"models/slm_{size}.gin"])
    assert gin_config.build(slm.SLM).config == slm.preset(size)


_HARDWARE = ["nvidia_gpu", "tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e"]


def _on(hardware):
    files = ["models/slm_xxl.gin", "runs/train.gin", f"hardware/{hardware}.gin"]
    gin_config.parse(files, _bindings(files))
    return gin_config.build(Run)


@pytest.mark.parametrize("hardware", _HARDWARE)
def test_hardware_files_change_how_a_model_runs_and_not_what_it_is(hardware):
    found, preset = _on(hardware).objective.model.config, slm.preset("xxl")
    kernel = "cudnn" if hardware == "nvidia_gpu" else "plain"
    remat = "full" if hardware == "tpu_v5e" else "frozen"
    assert (found.llm.attention_kernel, found.llm.remat, found.adapter.remat) == (kernel, remat, "none")
    assert found.speech_encoder.attention_kernel == ("cudnn" if hardware == "nvidia_gpu" else "pallas")
    as_it_runs = {"attention_kernel": "plain", "remat": "full"}
    as_llm_runs = as_it_runs | {"loss_logits": preset.llm.loss_logits}
    assert dataclasses.replace(found.llm, **as_llm_runs) == preset.llm
    assert dataclasses.replace(found.speech_encoder, **as_it_runs) == preset.speech_encoder
    assert dataclasses.replace(found.adapter, remat="full") == preset.adapter


@pytest.mark.parametrize("hardware", _HARDWARE)
def test_options_of_other_hardware_are_refused_on_a_cpu(hardware):
    other = "gpu" if hardware == "nvidia_gpu" else "tpu"
    with pytest.raises(UserError, match=f"an option of {other}, and this run is on cpu"):
        check_compiler_options(_on(hardware).loop.compiler_options, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_of_a_tpu_takes_the_options_of_its_file(name, monkeypatch):
    # No chip is opened here, so several processes may load the library.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    kind = name.partition(":")[0]
    cores = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    mesh = make_mesh(fsdp=2, devices=devices)
    options = _on(f"tpu_{kind}").loop.compiler_options
    assert options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] > 1000
    check_compiler_options(options, mesh)
    with pytest.raises(UserError, match=r"'xla_tpu_scoped_vmem_limit_kib': 'much', .* tpu compiler refuses"):
        check_compiler_options({**options, "xla_tpu_scoped_vmem_limit_kib": "much"}, mesh)


def test_xla_knows_the_options_for_nvidia_gpus():
    # The compiler for CPUs has no use for them and still takes none that XLA does not know.
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    options = _on("nvidia_gpu").loop.compiler_options
    assert len(options) == 3
    lowered.compile(compiler_options=dict(options))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={**options, "xla_gpu_enable_nothing": True})


def test_files_are_found_in_any_order_and_overridden_by_flags():
    files = ["runs/train.gin", "models/slm_tiny.gin"]
    gin_config.parse(
        files, [*_bindings(files), "BATCH_SIZE=3", "adapters.AdapterConfig.layers=5", "DROPOUT_RATE=0.5"]
    )
    run = gin_config.build(Run)
    assert run.data.batch_size == 3
    assert run.objective.model.config.adapter.layers == 5
    assert run.objective.model.config.adapter.dropout == 0.5


def test_own_files_come_before_packaged_ones(tmp_path, monkeypatch):
    (tmp_path / "own.gin").write_text("include 'models/slm_tiny.gin'\nadapters.AdapterConfig.layers = 7\n")
    for search_paths, folder in (([str(tmp_path)], "/"), ([], tmp_path)):
        monkeypatch.chdir(folder)
        gin_config.parse(["own.gin"], search_paths=search_paths)
        assert gin_config.build(slm.SLM).config.adapter.layers == 7


@pytest.mark.parametrize(
    ("files", "bindings", "told"),
    [
        (["runs/trian.gin"], [], "did you mean 'runs/train.gin'"),
        (["runs/train.gin"], ["BATCH_SIZ=3"], "did you mean 'BATCH_SIZE'"),
        (["runs/train.gin"], ["BATCH_SIZE"], "expected --gin.NAME=value"),
        (["runs/train.gin"], ["BATCH_SIZE=[3"], "--gin.BATCH_SIZE=[3"),
        (["runs/train.gin"], ["BATCH_SIZE=abc"], "the value is no literal, expected one such as 3"),
        (["models/slm_tiny.gin"], ["adapters.AdapterConfig.layer=3"], "did you mean 'layers'"),
        (["models/slm_tiny.gin"], ["adapters.AdapterConfi.layers=3"], "did you mean 'AdapterConfig'"),
        (["models/slm_tiny.gin"], ["conformer.preset.name='tiyn'"], "did you mean 'tiny'"),
    ],
)
def test_mistakes_are_named_with_the_nearest_choice(files, bindings, told):
    with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as caught:
        gin_config.parse(files, bindings)
        gin_config.build(slm.SLM)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("binding", "told"),
    [
        ("FSDP='x'", "MeshConfig.fsdp is 'x', expected a whole number of at least 1, or -1"),
        ("run.Run.init_from=5", "Run.init_from is 5, expected a directory"),
        ("run.Run.model_dir=5", "Run.model_dir is 5, expected a directory"),
        ("run.Run.foundations={'llm': 5}", "Run.foundations is {'llm': 5}, expected parts and directories"),
        ("LEARNING_RATE='x'", "ScheduleConfig.peak is 'x', expected a number of at least 0"),
        ("WARMUP_STEPS='x'", "ScheduleConfig.warmup_steps is 'x', expected a whole number"),
    ],
)
def test_values_of_another_type_are_one_sentence(binding, told):
    files = ["models/slm_tiny.gin", "partitioning/fsdp.gin", "runs/train.gin"]
    with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as caught:
        gin_config.parse(files, [*_bindings(files), binding])
        gin_config.build(Run)
    assert told in str(caught.value)


def test_missing_macros_are_named_all_at_once():
    gin_config.parse(["models/slm_tiny.gin", "runs/train.gin"], ["MODEL_DIR='x'"])
    with pytest.raises(UserError) as caught:
        gin_config.build(Run)
    for name in ("MIXTURE_OR_TASK_NAME", "TRAIN_STEPS", "LLM_CHECKPOINT"):
        assert f"--gin.{name}=" in str(caught.value)
    assert "--gin.MODEL_DIR" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("include 'models/slm_tyni.gin'\n", "did you mean 'models/slm_tiny.gin'"),
        ("from __gin__ import dynamic_registration\nfrom slm_jax.models import nothing\n", "line 2"),
        ("X = 3 3\n", "line 1"),
        ("from __gin__ import dynamic_registration\nconformer.preset.name = 'x'\n", "line 2"),
    ],
)
def test_mistakes_in_files_are_one_sentence(tmp_path, text, told):
    path = tmp_path / "own.gin"
    path.write_text(text)
    with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as caught:
        gin_config.parse([str(path)])
    assert told in str(caught.value)


def test_a_saved_run_loads_from_any_folder(tmp_path, monkeypatch):
    files = ["models/slm_tiny.gin", "runs/train.gin"]
    monkeypatch.chdir(tmp_path)
    gin_config.parse(files, [*_bindings(files), "BATCH_SIZE=5"])
    run = gin_config.build(Run)
    (tmp_path / "run").mkdir()
    save_config(tmp_path / "run")
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    monkeypatch.chdir("/")
    loaded = load_run(moved)
    assert loaded.data == run.data
    assert loaded.model_dir == str(moved)
    assert loaded.path("encoder") == tmp_path / "encoder"


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_run(tmp_path / "nothing")
