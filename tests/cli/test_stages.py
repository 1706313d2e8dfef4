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
from slm_jax.cli.run import load_run
from slm_jax.cli.starting_point import StartingPoint
from slm_jax.cli.wiring import Wiring
from slm_jax.errors import UserError
from slm_jax.training.initialisation import RunShapes
from slm_jax.training.state import TrainState

SCHEDULE = ("WARMUP_STEPS=1", "optimizers.ScheduleConfig.total_steps=4")
LORA = ("LORA=@lora.LoRAConfig()", "lora.LoRAConfig.rank=4")


def arrays_of(run: Path, step: int, prefix: str = "params/") -> dict[str, np.ndarray]:
    sharding = SingleDeviceSharding(jax.devices()[0])
    with contextlib.closing(RunCheckpoints(run / "checkpoints", read_only=True)) as checkpoints:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
            for name, (shape, dtype) in checkpoints.read_record(step)["parameters"].items()
            if name.startswith(prefix)
        }
        arrays = jax.device_get(checkpoints.restore_arrays(shapes, step))
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


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
    assert " of adapter go on from it with their optimizer state, 12 parameters of llm do not" in done.err
    taken, found = arrays_of(first, 2), arrays_of(run, 1)
    assert {name for name in found if name not in taken} == {name for name in found if "lora" in name}
    for name, leaf in taken.items():
        np.testing.assert_array_equal(found[name], leaf)
    first_log, log = (
        [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (first, run)
    )
    assert log[0]["loss"] < first_log[0]["loss"]

    # What the second run began with, by the wiring of it.
    wired = Wiring(load_run(run))
    wired.load_foundations({"params": wired.shapes.state.params})
    slots = wired.load_slots(wired.shapes.state.opt_state)
    before = arrays_of(first, 2, "opt_state/")
    assert slots.keys() == {
        f"inner_state/1/states/{name}/0/{slot}"
        for name in taken
        for slot in ("count", f"mu/{name}", f"nu/{name}")
    }
    for name, slot in slots.items():
        _, _, saved = name.rpartition("/0/")
        np.testing.assert_array_equal(slot, before[f"inner_state/1/0/{saved}"])
    # After its first step.
    after = arrays_of(run, 1, "opt_state/")
    for name in found:
        adam, schedule = (after[f"inner_state/1/states/{name}/{place}/count"] for place in (0, 2))
        assert (int(adam), int(schedule)) == (3 if name in taken else 1, 1)

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


def test_a_part_that_the_first_run_trained_and_saved_is_frozen_in_the_second(workshop, tmp_path):
    first, second, encoder = tmp_path / "first", tmp_path / "second", tmp_path / "encoder"
    saving = f"run.Run.save_foundations={{'speech_encoder': {str(encoder)!r}}}"
    trained = ("slm.SLMConfig.trainable=('adapter', 'speech_encoder')", "run.Run.save_dtype=None", saving)
    done = workshop.slm(workshop.train_words(first, 1, (*trained, *SCHEDULE)))
    assert done.status == 0, done.err
    begin = (f"run.Run.init_from={str(first)!r}", "LEARNING_RATE=0.0", *SCHEDULE)
    frozen = f"SPEECH_ENCODER_CHECKPOINT={str(encoder)!r}"
    done = workshop.slm(workshop.train_words(second, 1, (*begin, frozen)))
    assert done.status == 0, done.err
    assert " of adapter go on from it with their optimizer state" in done.err, done.err
    found = arrays_of(second, 1)
    taken = {name: leaf for name, leaf in arrays_of(first, 1).items() if name.startswith("adapter/")}
    assert found.keys() == taken.keys()
    for name, leaf in taken.items():
        np.testing.assert_array_equal(found[name], leaf)
    told = json.loads((second / "starting_point.json").read_text())
    assert (told["run"], told["step"]) == (str(first), 1)
    # With the one that the first run began with, it is told how.
    done = workshop.slm(workshop.train_words(tmp_path / "third", 1, begin))
    assert done.status == 2 and "which is frozen in this run" in done.err, done.err


def test_a_run_that_saved_nothing_begins_again_with_the_same_checkpoint(first, tmp_path):
    known = load_run(first)
    run = dataclasses.replace(known, model_dir=str(tmp_path), init_from=str(first), init_from_step=1)
    newest = dataclasses.replace(run, init_from_step="newest")

    def step(run) -> int:
        start = StartingPoint(run, {}, RunShapes({}, TrainState(0, {}, {}), {}))
        with start._open() as (_, found):
            return found

    assert (step(run), step(newest), step(newest)) == (1, 2, 2)
    # As if the other run had gone on meanwhile.
    path = tmp_path / "starting_point.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 1}))
    assert (step(newest), step(run)) == (1, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["adapters.AdapterConfig.mlp_dim=48"], "has shape [1, 32, 32], this model's has [1, 32, 48]"),
        (["run.Run.init_from='nowhere'"], "nowhere/checkpoints holds no checkpoints of a run"),
        (
            ["LORA=None", "slm.SLMConfig.trainable=('llm',)"],
            "which is frozen in this run",
        ),
        (
            ["OPTIMIZER=@optimizers.AdafactorConfig()"],
            "another form than AdafactorConfig has for what goes on",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_by_name(workshop, first, tmp_path, more, told):
    done = workshop.slm(words(workshop, first, tmp_path / "run", 1, *more))
    assert done.status == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert told in line and "Traceback" not in done.err


def test_which_checkpoint_and_on_what_it_was_trained(first):
    known, shapes = load_run(first), RunShapes({}, TrainState(0, {}, {}), {})
    run = dataclasses.replace(known, model_dir=str(first.parent / "second"), init_from=str(first))

    def told(fingerprints, metric=None, **changes) -> str:
        loop = dataclasses.replace(run.loop, best_metric=metric)
        start = StartingPoint(dataclasses.replace(run, loop=loop, **changes), fingerprints, shapes)
        with pytest.raises(UserError) as error:
            start.load(print)
        return str(error.value)

    assert "init_from_step is 7, and" in told({}, init_from_step=7)
    assert "expected loop.LoopConfig.best_metric" in told({}, init_from_step="best")
    assert "no checkpoint that was scored by a/wer" in told({}, "a/wer", init_from_step="best")
    assert "this run, expected another" in told({}, init_from=run.model_dir)
    assert "made with another foundation/llm" in told({"foundation/llm": "00"})
    for change, meant in (({"init_from_step": "newst"}, "newest"), ({"init_optimizer": "fesh"}, "fresh")):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            dataclasses.replace(run, **change)
