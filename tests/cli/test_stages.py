"""A run that begins with what another one has trained: LoRA after the adapter alone."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.cli.run import load_run
from slm_jax.cli.starting_point import StartingPoint
from slm_jax.errors import UserError

SCHEDULE = ("WARMUP_STEPS=1", "optimizers.ScheduleConfig.total_steps=4")
LORA = ("LORA=@lora.LoRAConfig()", "lora.LoRAConfig.rank=4")


def params_of(run: Path, step: int) -> dict[str, np.ndarray]:
    sharding = SingleDeviceSharding(jax.devices()[0])
    with contextlib.closing(RunCheckpoints(run / "checkpoints", read_only=True)) as checkpoints:
        shapes = {
            name.removeprefix("params/"): jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
            for name, (shape, dtype) in checkpoints.read_record(step)["parameters"].items()
            if name.startswith("params/")
        }
        return jax.device_get(flatten(checkpoints.restore_params(unflatten(shapes), step=step)))


@pytest.fixture(scope="module")
def first(workshop, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    done = workshop.slm(
        workshop.train_words(run, 2, ("CHECKPOINT_PERIOD=1", "LEARNING_RATE=0.01", *SCHEDULE))
    )
    assert done.status == 0, done.err
    return run


def words(workshop, first: Path, run: Path, steps: int, *more: str) -> list[str]:
    begin = f"run.Run.init_from={str(first)!r}"
    # A step changes nothing at a rate of 0, so that its checkpoint holds what the run began with.
    return workshop.train_words(run, steps, (*LORA, *SCHEDULE, "LEARNING_RATE=0.0", begin, *more))


def test_the_adapter_goes_on_lora_begins_and_the_run_resumes_without_the_first(workshop, first, tmp_path):
    source, run = tmp_path / "first", tmp_path / "second"
    shutil.copytree(first, source)
    done = workshop.slm(words(workshop, source, run, 1))
    assert done.status == 0, done.err
    assert f"{source}/checkpoints/2: " in done.err
    assert " of adapter go on from it, 12 parameters of llm do not" in done.err
    taken, found = params_of(first, 2), params_of(run, 1)
    assert {name for name in found if name not in taken} == {name for name in found if "lora" in name}
    for name, leaf in taken.items():
        np.testing.assert_array_equal(found[name], leaf)
    first_log, log = (
        [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (first, run)
    )
    assert log[0]["loss"] < first_log[0]["loss"]

    shutil.rmtree(source)
    for more, status, told in (
        ((), 0, "going on from step 1"),
        (("run.Run.init_from_step=1",), 2, "was made with another init_from"),
    ):
        done = workshop.slm(words(workshop, source, run, 2, *more))
        assert done.status == status, done.err
        assert told in done.err + done.out
    recording = min((workshop.folder / "corpus" / "audio" / "test").glob("*.flac"))
    asked = ["infer", "--run", str(run), "--audio", str(recording), "--prompt", "Transcribe:"]
    done = workshop.slm([*asked, "--max_tokens", "4"])
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["adapters.AdapterConfig.mlp_dim=48"], "has shape [1, 32, 32], this model's has [1, 32, 48]"),
        (["run.Run.init_from='nowhere'"], "nowhere/checkpoints holds no checkpoints of a run"),
        (
            ["LORA=None", "slm.SLMConfig.trainable=('llm',)"],
            "which is frozen in this run",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_by_name(workshop, first, tmp_path, more, told):
    done = workshop.slm(words(workshop, first, tmp_path / "run", 1, *more))
    assert done.status == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert told in line and "Traceback" not in done.err


def test_which_checkpoint_and_on_what_it_was_trained(first):
    known = load_run(first)
    run = dataclasses.replace(known, model_dir=str(first.parent / "second"), init_from=str(first))

    def told(fingerprints, metric=None, **changes) -> str:
        loop = dataclasses.replace(run.loop, best_metric=metric)
        start = StartingPoint(dataclasses.replace(run, loop=loop, **changes), fingerprints, ())
        with pytest.raises(UserError) as error:
            start.load({}, print)
        return str(error.value)

    assert "init_from_step is 7, and" in told({}, init_from_step=7)
    assert "expected loop.LoopConfig.best_metric" in told({}, init_from_step="best")
    assert "no checkpoint that was scored by a/wer" in told({}, "a/wer", init_from_step="best")
    assert "this run, expected another" in told({}, init_from=run.model_dir)
    assert "made with another foundation/llm" in told({"foundation/llm": "00"})
    with pytest.raises(UserError, match="did you mean 'newest'"):
        dataclasses.replace(run, init_from_step="newst")
