"""`slm plan`: a model on devices that are not there, by the same program that training runs."""

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from slm_jax.cli.main import main
from slm_jax.cli.wiring import frozen_as_loaded
from slm_jax.training import planning
from slm_jax.training.objectives.base import Part

TINY = [
    "plan", "--gin_file", "models/slm_tiny.gin", "--gin.BATCH_SIZE=4", "--gin.TENSOR=2",
    "--gin.TASK_FEATURE_LENGTHS={'speech': 32000, 'inputs': 16, 'targets': 16}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the command sets for its own process is taken back."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    yield
    jax.config.update("jax_platforms", "cpu")


def test_a_tiny_model_on_four_chips(capsys):
    assert main([*TINY, "--topology", "v5e:2x2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert (found["topology"], found["devices"]) == ("v5e:2x2", 4)
    assert found["device_kind"] == "TPU v5 lite"
    assert found["mesh"] == {"slice": 1, "data": 1, "fsdp": 2, "tensor": 2}
    assert found["parameters"]["params"]["adapter"] == found["parameters"]["params"]["total"] > 0
    assert found["parameters"]["frozen"]["llm"] > 0
    assert found["flops_per_step"] == sum(found["flops_by_part"].values())
    assert found["hardware_flops_per_step"] == pytest.approx(found["flops_per_step"], rel=0.1)
    size = found["bytes_per_device"]
    # State in float32 with two moments and frozen weights in bfloat16, over four chips, and a little whole.
    least = 3 * 4 * found["parameters"]["params"]["total"] + 2 * found["parameters"]["frozen"]["total"]
    assert least / 4 < size["arguments"] < least
    assert size["arguments"] < size["peak"] < found["usable_bytes"] == 15.75 * 2**30
    assert found["hbm_bytes"] == 16 * 2**30
    assert found["fits"] is True
    gathered = [one for one in found["collectives"] if one["kind"] == "all-gather"]
    assert sum(one["bytes"] for one in gathered) > found["parameters"]["frozen"]["total"]
    assert found["predicted_step_seconds"] >= max(
        found["seconds_by_cause"][cause] for cause in ("products", "memory", "beside")
    )
    assert found["audio_hours_per_second"] > 0
    assert found["assumptions"]


def test_a_model_that_does_not_fit_is_an_answer(capsys):
    bindings = [
        "--gin.BATCH_SIZE=4096",
        "--gin.TASK_FEATURE_LENGTHS={'speech': 480000, 'inputs': 512, 'targets': 512}",
    ]
    assert main([*TINY, *bindings, "--topology", "v5e:2x2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["bytes_needed"] > found["usable_bytes"]
    assert found["bytes_per_device"] is None


def test_without_libtpu_it_says_what_it_cannot_know(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert main([*TINY, "--topology", "v5e:2x2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["fits"] is None
    assert "libtpu is missing" in found["unknown"]
    assert "virtual CPU devices" in printed.err
    assert found["flops_per_step"] > 0
    assert found["bytes_per_device"]["arguments"] > 0


@pytest.mark.parametrize(("topology", "kernel"), [("gpu:h100x4", "cudnn"), ("v5e:2x2", "pallas")])
def test_a_kernel_that_no_cpu_has_is_planned_as_plain(topology, kernel, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    bindings = [
        f"--gin.conformer.preset.attention_kernel='{kernel}'",
        "--gin.conformer.preset.dtype='bfloat16'",
        "--gin.TASK_FEATURE_LENGTHS={'speech': 16000, 'inputs': 4, 'targets': 4}",
    ]
    assert main([*TINY, *bindings, "--topology", topology, "--json"]) == 0
    printed = capsys.readouterr()
    assert f"planned with plain attention, which a CPU compiles, in place of '{kernel}'" in printed.err
    found = json.loads(printed.out)
    size = found["bytes_per_device"]
    assert size["peak"] == size["arguments"] + size["temporaries"] > size["arguments"]
    assert "plain attention" in found["assumptions"][-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gin.run.MeshConfig.slices=-1"], "MeshConfig.slices is -1, and --topology is that of one slice"),
        (["--gin.run.MeshConfig.slices=0"], "MeshConfig.slices is 0, expected a whole number"),
        (["--slices", "-1"], "--slices is -1, expected a whole number"),
    ],
)
def test_a_number_of_slices_that_is_none_is_one_sentence(words, sentence, capsys):
    assert main([*TINY, *words, "--topology", "v5e:2x2"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        ("v5e:4x", "did you mean 'v5e:4x4'?"),
        ("v5e:4x4x4", "of 3 dims, expected 2"),
        ("v9:4x4", "did you mean"),
        ("gpu:h1000x8", "did you mean 'gpu:h100x8'?"),
        ("v5e:3x5", "libtpu refuses"),
    ],
)
def test_a_wrong_topology_is_one_sentence(topology, sentence, capsys):
    assert main([*TINY, "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("the total memory required for HLO temporaries (20.97G) exceeds available HBM (15.75G).", 20.97),
        ("Ran out of memory in memory space hbm. Used 73.80G of 15.75G hbm.", 73.8),
        ("memory required for HLO temporaries (1.50T) exceeds available HBM (15.75G).", 1536),
        ("INTERNAL: something else", None),
    ],
)
def test_needed_memory_is_read_from_the_compilers_refusal(message, expected):
    found = planning.needed_bytes(message)
    assert found == (expected and int(expected * 2**30))


def test_frozen_weights_are_held_as_loading_holds_them():
    shapes = {
        "layer": {
            "kernel": jax.ShapeDtypeStruct((4, 8), "int8"),
            "kernel_scale": jax.ShapeDtypeStruct((1, 8), "float32"),
            "bias": jax.ShapeDtypeStruct((8,), "float32"),
        }
    }
    held = planning.held(shapes, "bfloat16")["layer"]
    assert {name: leaf.dtype.name for name, leaf in held.items()} == {
        "kernel": "int8", "kernel_scale": "float32", "bias": "bfloat16"
    }  # fmt: skip
    assert planning.held(shapes, None) == shapes
    # What comes from no foundation model stays as it is initialised.
    parts = {name: Part("t5", None, (name,)) for name in ("llm", "speech_encoder")}
    run: Any = SimpleNamespace(
        foundations={"llm": "somewhere"}, frozen_dtype="bfloat16", objective=SimpleNamespace(parts=parts)
    )
    loaded = frozen_as_loaded(run, {"llm": shapes, "speech_encoder": shapes})
    assert loaded["llm"]["layer"]["bias"].dtype == "bfloat16"
    assert loaded["speech_encoder"] == shapes
