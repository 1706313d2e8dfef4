"""Runs of the `slm` command in processes of their own: killed, resumed, on other meshes, stopped, used."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from slm_jax.checkpoints.foundation import converted, load_foundation, read_foundation, save_foundation
from slm_jax.checkpoints.safetensors import unflatten
from slm_jax.errors import EXIT_STOPPED

STEPS = 12
# Often enough that a kill at a random step loses some steps and keeps some.
SAVING = ("CHECKPOINT_PERIOD=3", "loop.LoopConfig.log_ids=True")


def curve(run: Path) -> dict[int, tuple[float, dict]]:
    """Step -> loss and ids, of a run's log."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["ids"]) for line in lines}


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory) -> Path:
    """A run that nothing interrupts, on one device, with its programs and a trace beside it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    looking_on = ["--profile_steps", "5:6", "--dump_program", str(run.with_name("program"))]
    done = workshop.slm([*workshop.train_words(run, STEPS, SAVING), *looking_on])
    assert done.status == 0, done.err
    run.with_name("log.txt").write_text(done.err)
    assert sorted(curve(run)) == list(range(1, STEPS + 1))
    return run


def test_the_flags_write_the_program_and_a_trace(whole):
    texts = {path.name: path.read_text() for path in whole.with_name("program").iterdir()}
    kinds = {"jaxpr": "dot_general", "stablehlo": "stablehlo.dot_general", "hlo": "HloModule jit_train_step"}
    kinds["memory"] = "temp_size_in_bytes"
    assert set(texts) == {f"train_step.{kind}.txt" for kind in kinds}
    for kind, expected in kinds.items():
        assert expected in texts[f"train_step.{kind}.txt"]
    (trace,) = (whole / "profile").rglob("*.xplane.pb")
    assert b"jit_train_step" in trace.read_bytes()
    log = whole.with_name("log.txt").read_text()
    assert f"trace written to {whole / 'profile'}" in log
    (start,) = re.findall(r"^first step done after .*", log, re.M)
    for phase in ("process start and imports", "configuration", "shapes", "tracing"):
        assert phase in start


def test_a_dry_run_writes_the_program_that_training_runs(workshop, whole, tmp_path):
    words = workshop.train_words(tmp_path / "run", STEPS, SAVING)
    done = workshop.slm([*words, "--dry_run", "--dump_program", str(tmp_path / "program")])
    assert done.status == 0, done.err
    assert re.search(r"^train step: .* compiled in .* bytes per device", done.err, re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["program"]
    for kind in ("stablehlo", "memory"):
        text = (tmp_path / "program" / f"train_step.{kind}.txt").read_text()
        assert text == (whole.with_name("program") / f"train_step.{kind}.txt").read_text()


def test_a_program_that_cannot_be_written_is_told_before_it_is_compiled(workshop, slm_here, tmp_path):
    (tmp_path / "file").touch()
    words = workshop.train_words(tmp_path / "run", STEPS, SAVING)
    done = slm_here([*words, "--dry_run", "--dump_program", str(tmp_path / "file" / "program")])
    assert done.status == 2
    assert f"--dump_program {tmp_path}/file/program cannot be made: " in done.err
    assert "compiled in" not in done.err


def test_a_killed_run_goes_on_bit_for_bit(workshop, whole, tmp_path, rng):
    run = tmp_path / "run"
    words = workshop.train_words(run, STEPS, SAVING)
    # A step past the second save, which waits for the first one to be complete.
    kill_at = int(rng.integers(7, STEPS - 1))
    process = workshop.start(words)
    try:
        steps, deadline = run / "steps.jsonl", time.monotonic() + 300
        while not steps.exists() or steps.read_bytes().count(b"\n") < kill_at:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = workshop.slm(words)
    assert resumed.status == 0, resumed.err
    assert "going on from step" in resumed.out + resumed.err
    assert curve(run) == curve(whole)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_other_meshes_learn_the_same_from_the_same_examples(workshop, whole, tmp_path, mesh):
    run = tmp_path / "run"
    sizes = [
        f"run.MeshConfig.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    done = workshop.slm(workshop.train_words(run, STEPS, (*SAVING, *sizes)), devices=8)
    assert done.status == 0, done.err
    found, expected = curve(run), curve(whole)
    for step, (loss, ids) in expected.items():
        assert found[step][1] == ids
        assert found[step][0] == pytest.approx(loss, rel=1e-5)


def test_frames_encoded_once_train_as_the_speech_and_resume_bit_for_bit(workshop, whole, tmp_path):
    more = (*SAVING, "run.DataConfig.encode_once=True")
    done = workshop.slm(workshop.train_words(tmp_path / "run", STEPS, more))
    assert done.status == 0, done.err
    assert "encoded 24 utterances" in done.err
    found, expected = curve(tmp_path / "run"), curve(whole)
    for step, (loss, ids) in expected.items():
        assert found[step][1] == ids
        # Frames are kept in bfloat16.
        assert found[step][0] == pytest.approx(loss, rel=1e-2)
    assert found[1][0] != expected[1][0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    (tmp_path / "run" / "steps.jsonl").rename(tmp_path / "steps.jsonl")
    again = workshop.slm(workshop.train_words(tmp_path / "run", STEPS, more))
    assert again.status == 0, again.err
    assert "encoded" not in again.err
    resumed = curve(tmp_path / "run")
    assert sorted(resumed) == [10, 11, 12]
    assert resumed == {step: found[step] for step in resumed}


def test_a_run_goes_back_once_and_past_the_rows_of_two_steps(workshop, whole, tmp_path):
    run, before = tmp_path / "run", curve(whole)
    shutil.copytree(whole, run)
    words = [*workshop.train_words(run, STEPS, SAVING), "--rollback_to", "9", "--skip_steps", "2"]
    done = workshop.slm(words)
    assert done.status == 0, done.err
    assert "rolled back to step 9: checkpoints 12 are in" in done.err
    assert "going on from step 9; rows 72 to 87 of the plan are left out" in done.err
    after = curve(run)
    assert sorted(after) == sorted(before)
    assert {step: after[step] for step in range(1, 10)} == {step: before[step] for step in range(1, 10)}
    # Of the same rows of the plan as the last step before, by a model that knows two steps less.
    assert after[10][1] == before[12][1] and after[10][0] != before[12][0]


def test_what_no_row_holds_is_told_before_training(workshop, tmp_path):
    lengths = "TASK_FEATURE_LENGTHS={'speech': 44800, 'inputs': 40, 'targets': 40}"
    done = workshop.slm(workshop.train_words(tmp_path / "run", 1, (lengths, "WARMUP_STEPS=0")))
    assert done.status == 0, done.err
    found = re.findall(
        r"^demo_asr, split train: (\d+) references; rejected: speech_too_long (\d+)$", done.err, re.M
    )
    assert len(found) == 1 and int(found[0][0]) + int(found[0][1]) == 24, done.err


def test_sigterm_saves_and_exits_for_a_restart(workshop, whole, tmp_path):
    run = tmp_path / "run"
    words = workshop.train_words(run, 100_000, SAVING)
    process = workshop.start(words)
    steps, deadline = run / "steps.jsonl", time.monotonic() + 300
    while not steps.exists() or steps.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, err
    last = max(curve(run))
    saved = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    assert last in saved, out + err


def test_the_checkpoint_holds_the_adapter_alone(whole):
    (newest,) = [path for path in (whole / "checkpoints").iterdir() if path.name == str(STEPS)]
    bytes_saved = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    adapter = json.loads((newest / "record" / "metadata").read_text())["parameters"]
    assert {path.split("/")[0] for path in adapter} == {"step", "params", "opt_state"}
    assert not [path for path in adapter if "llm" in path or "speech_encoder" in path]
    assert {path.split("/")[1] for path in adapter if path.startswith("params/")} == {"adapter"}
    assert bytes_saved < 1_000_000


def test_the_checkpoint_records_what_the_run_depends_on(whole):
    record = json.loads((whole / "checkpoints" / str(STEPS) / "record" / "metadata").read_text())
    expected = {
        "plan",
        "foundation/llm",
        "foundation/speech_encoder",
        "tokenizer/inputs",
        "tokenizer/targets",
    }
    expected |= {"templates/demo_asr", "templates/demo_ast_de"}
    assert set(record["provenance"]["fingerprints"]) == expected


def test_infer_prints_the_text_alone(workshop, whole):
    audio = sorted((workshop.folder / "corpus" / "audio" / "test").glob("*.flac"))[:2]
    words = ["infer", "--run", str(whole), "--prompt", "Transcribe the speech:", "--max_tokens", "4"]
    done = workshop.slm([*words, "--audio", *map(str, audio)])
    assert done.status == 0, done.err
    assert done.out.count("\n") == 2
    assert done.err == ""


def test_infer_answers_what_a_cut_file_still_holds(workshop, whole, tmp_path, rng):
    soundfile.write(tmp_path / "a.mp3", 0.1 * rng.standard_normal(48_000), 16_000)
    sound = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(sound[: len(sound) // 2])
    words = ["infer", "--run", str(whole), "--prompt", "Transcribe the speech:", "--max_tokens", "4"]
    done = workshop.slm([*words, "--audio", str(tmp_path / "a.mp3")])
    assert done.status == 0, done.err
    assert done.out.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing.wav", "missing_file"),
        ("text.wav", "unreadable_audio"),
        ("empty.wav", "empty_audio"),
        ("long.wav", "speech_too_long"),
    ],
)
def test_infer_names_audio_that_it_cannot_use(workshop, whole, tmp_path, name, told):
    (tmp_path / "text.wav").write_text("this is no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "long.wav", np.zeros(160_000), 16_000)
    done = workshop.slm(["infer", "--run", str(whole), "--audio", str(tmp_path / name), "--prompt", "x"])
    assert done.status == 2, done
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert name in line and told in line
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["MIXTURE_OR_TASK_NAME='demo_asrr'"], "did you mean 'demo_asr'"),
        (["TASK_FEATURE_LENGTHS={'speach': 3, 'inputs': 4, 'targets': 4}"], "did you mean 'speech'"),
        (["LLM_CHECKPOINT='nowhere'"], "nowhere"),
        (["CORPUS_DIR='nowhere'"], "nowhere"),
        (["BATCH_SIZE=7", "run.MeshConfig.data=2"], "devices"),
        (["t5.preset.emb_dim=64"], "emb_dim"),
        (["SPEECH_ENCODER_CHECKPOINT=%LLM_CHECKPOINT"], "kind"),
        (["optimizers.ScheduleConfig.decay='cosin'"], "did you mean 'cosine'"),
        (
            ["run.DataConfig.encode_once=True", "slm.SLMConfig.trainable=('adapter', 'speech_encoder')"],
            "an SLM whose speech encoder is frozen",
        ),
        (
            ["run.DataConfig.encode_once=True", "AUGMENT=@spec_augment.SpecAugmentConfig()"],
            "SLMObjective.augment changes what the encoder hears",
        ),
    ],
)
def test_a_mistake_in_a_run_is_one_sentence(workshop, slm_here, tmp_path, more, told):
    done = slm_here(workshop.train_words(tmp_path / "run", 5, more))
    assert done.status == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert told in line
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["adapters.AdapterConfig.layers=2"], "another model"),
        (["SEED=1"], "plan"),
        (["LLM_CHECKPOINT=%SPEECH_ENCODER_CHECKPOINT"], "foundation/llm"),
    ],
)
def test_a_run_is_not_gone_on_with_as_another(workshop, slm_here, whole, more, told):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    done = slm_here(workshop.train_words(whole, STEPS + 1, (*SAVING, *more)))
    assert done.status == 2, done
    assert told in done.err
    kept = {path: path.read_bytes() for path in before if path.exists()}
    assert {p for p in before if kept.get(p) != before[p]} == set()


def test_a_foundation_is_not_overwritten_and_that_is_said_before_training(workshop, slm_here, tmp_path):
    taken = workshop.folder / "speech_encoder"
    before = {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()}
    places = {"CORPUS_DIR": workshop.folder / "corpus", "MODEL_DIR": tmp_path / "run"}
    places["SPEECH_ENCODER_OUTPUT"] = taken
    bindings = [
        "TRAIN_STEPS=3",
        "WARMUP_STEPS=1",
        *(f"{name}={str(path)!r}" for name, path in places.items()),
    ]
    flags = [f"--gin.{binding}" for binding in bindings]
    done = slm_here(["train", "--gin_file", "recipes/demo_encoder.gin", *flags])
    assert done.status == 2, done.err
    assert "never overwritten" in done.err and not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_not_taken(workshop, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = workshop.slm(workshop.train_words(tmp_path, 2))
    assert done.status == 2
    assert "thesis" in " ".join(path.name for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_part_that_was_saved_in_bfloat16_trains_in_its_own_dtype_and_resumes(workshop, tmp_path):
    """A foundation that is small on disk is no reason to train in few bits."""
    table = read_foundation(workshop.folder / "llm").parameters
    shapes = unflatten({name: jax.ShapeDtypeStruct(tuple(s), dtype) for name, (s, dtype) in table.items()})
    params = load_foundation(workshop.folder / "llm", "t5", shapes)
    record = read_foundation(workshop.folder / "llm")
    small = converted(params, "bfloat16")
    save_foundation(tmp_path / "llm", small, kind="t5", config=record.config, format="safetensors")
    more = (f"LLM_CHECKPOINT='{tmp_path / 'llm'}'", "slm.SLMConfig.trainable=('adapter', 'llm')", *SAVING)
    for steps in (3, 4):
        done = workshop.slm(workshop.train_words(tmp_path / "run", 4, (*more, f"TRAIN_STEPS={steps}")))
        assert done.status == 0, done.err
    saved = json.loads((tmp_path / "run/checkpoints/4/record/metadata").read_text())
    assert {dtype for name, (_, dtype) in saved["parameters"].items() if "llm" in name} == {"float32"}
