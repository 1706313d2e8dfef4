"""`slm data encode`, and training on what it writes: the losses of the live encoder, without the encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import gin_config
from slm_jax.cli.main import main
from slm_jax.cli.run import Run
from slm_jax.cli.wiring import Wiring
from slm_jax.data.frames import from_record
from slm_jax.data.shards import read_index, read_record
from slm_jax.errors import UserError

STEPS = 6
# Evaluation needs the encoder, and training does not.
EVALUATING = (
    "EVALUATION=@run.EvaluationConfig()",
    "run.EvaluationConfig.mixture_or_task='demo_asr'",
    "run.EvaluationConfig.num_examples=4",
    "EVAL_PERIOD=3",
)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def encode_words(workshop, model_dir: Path, to: Path, *flags: str, more: tuple[str, ...] = ()) -> list[str]:
    train, *words = workshop.train_words(model_dir, STEPS, more)
    assert train == "train"
    return ["data", "encode", *words, "--to", str(to), "--per_shard", "10", *flags]


def frames_of(directory: Path) -> str:
    return f"run.DataConfig.frames={str(directory)!r}"


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def live(workshop, tmp_path_factory) -> Path:
    """A run with the encoder in its steps."""
    run = tmp_path_factory.mktemp("live") / "run"
    done = workshop.slm(workshop.train_words(run, STEPS))
    assert done.status == 0, done.err
    return run


@pytest.fixture(scope="module")
def frames(workshop, tmp_path_factory) -> Path:
    """Frames of the small run in bfloat16."""
    to = tmp_path_factory.mktemp("encoded") / "frames"
    done = workshop.slm(encode_words(workshop, to.parent / "run", to))
    assert done.status == 0, done.err
    assert done.out.startswith("24 utterances, 0.0") and done.out.rstrip().endswith("in bfloat16")
    assert not (to.parent / "run").exists()
    return to


@pytest.fixture(scope="module")
def small_frames(workshop, tmp_path_factory) -> Path:
    """The same frames in int8."""
    to = tmp_path_factory.mktemp("encoded_small") / "frames"
    done = workshop.slm(encode_words(workshop, to.parent / "run", to, "--dtype", "int8"))
    assert done.status == 0, done.err
    return to


@pytest.fixture(scope="module")
def run(workshop, frames, tmp_path_factory) -> Path:
    """A run on frames, scored on the way."""
    run = tmp_path_factory.mktemp("on_frames") / "run"
    done = workshop.slm(workshop.train_words(run, STEPS, (frames_of(frames), *EVALUATING)))
    assert done.status == 0, done.err
    return run


def test_frames_train_as_the_live_encoder_and_evaluate(workshop, live, frames, run):
    found, expected = losses(run), losses(live)
    assert sorted(found) == sorted(expected) and found != expected
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-2)
    assert "speech_encoder" not in (run / "sharding_plan.txt").read_text()
    assert "speech_encoder" in (live / "sharding_plan.txt").read_text()
    # Scores come from the audio, whatever has become of the frames.
    moved = frames.rename(frames.parent / "moved")
    scored = workshop.slm(["evaluate", "--run", str(run), "--split", "validation"])
    moved.rename(frames)
    assert scored.status == 0, scored.err
    assert "demo_asr wer" in scored.out


def test_a_stopped_encoding_goes_on_to_the_same_bytes(workshop, frames, tmp_path):
    to = tmp_path / "frames"
    to.mkdir()
    for path in frames.glob("*-00001-of-*"):
        shutil.copy(path, to)
    done = workshop.slm(encode_words(workshop, tmp_path / "run", to))
    assert done.status == 0, done.err
    assert "encoded 14 utterances" in done.err
    assert content(to) == content(frames)
    done = workshop.slm(encode_words(workshop, tmp_path / "run", to))
    assert done.status == 0 and "encoded" not in done.err


def test_another_mesh_writes_the_same_utterances_to_the_last_bits(workshop, frames, tmp_path):
    done = workshop.slm(encode_words(workshop, tmp_path / "run", tmp_path / "frames"), devices=4)
    assert done.status == 0, done.err
    for shard in sorted(path.stem for path in frames.glob("*.parquet")):
        ours, theirs = (read_index(str(folder), shard).table for folder in (tmp_path / "frames", frames))
        assert ours["id"].equals(theirs["id"]) and ours["samples"].equals(theirs["samples"])
        for number in range(len(ours)):
            found, expected = (
                from_record(read_record(f"{folder}/{shard}.array_record", number)).speech.astype(np.float32)
                for folder in (tmp_path / "frames", frames)
            )
            # Two neighbours in bfloat16, where float32 differs in its last bits.
            np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)
            assert (found == expected).mean() > 0.9


def test_int8_takes_half_and_trains(workshop, live, frames, small_frames, tmp_path):
    # Files of so little are mostly padding.
    small, large = (
        sum(
            len(read_record(str(path), number).data)
            for path in folder.glob("*.array_record")
            for number in (0, 1)
        )
        for folder in (small_frames, frames)
    )
    assert 0.5 < small / large < 0.53
    done = workshop.slm(workshop.train_words(tmp_path / "run", STEPS, (frames_of(small_frames),)))
    assert done.status == 0, done.err
    for step, loss in losses(live).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=3e-2)


def test_a_run_does_not_go_on_with_other_frames(workshop, slm_here, run, small_frames, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    done = slm_here(workshop.train_words(again, STEPS + 1, (frames_of(small_frames), *EVALUATING)))
    assert done.status == 2 and "was made with another frames" in done.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["reducers.StackReducer.factor=2"], "made with reducer.factor 4, and this run has 2"),
        (["run.Run.frozen_dtype='bfloat16'"], "made with weights 'float32', and this run has 'bfloat16'"),
        (["MIXTURE_OR_TASK_NAME='demo_scored'", "SPLIT='validation'"], "no split 'validation'"),
        (["slm.SLMConfig.trainable=('adapter', 'speech_encoder')"], "whose speech encoder is frozen"),
        (
            ["AUGMENT=@spec_augment.SpecAugmentConfig()"],
            "SLMObjective.augment changes what the encoder hears",
        ),
        (
            [
                "run.DataConfig.augment=@augmentation.AugmentationConfig()",
                "augmentation.AugmentationConfig.gain=@augmentation.GainConfig()",
            ],
            "DataConfig.augment changes what the encoder hears",
        ),
        (["run.DataConfig.encode_once=True"], "expected one of both"),
    ],
)
def test_frames_that_do_not_fit_are_refused_in_one_sentence(
    workshop, frames, tmp_path, monkeypatch, more, told
):
    monkeypatch.setenv("SLM_CACHE_DIR", str(workshop.folder / "cache"))
    more = [binding.replace("SPLIT=", "run.DataConfig.split=") for binding in more]
    bindings = workshop.bindings(tmp_path / "run", 2, (frames_of(frames), *more))
    with pytest.raises(UserError) as error:
        gin_config.parse(["recipes/quickstart.gin"], bindings)
        Wiring(gin_config.build(Run)).train_batches()
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dtype", "int4"], "--dtype: 'int4'; did you mean 'int8'"),
        (["--per_shard", "0"], "--per_shard is 0, expected a whole number"),
        (["--run", "somewhere"], "slm data encode: give either --run or --gin_file"),
    ],
)
def test_flags_are_checked(workshop, tmp_path, capsys, flags, told):
    assert main(encode_words(workshop, tmp_path / "run", tmp_path / "frames", *flags)) == 2
    assert told in capsys.readouterr().err
