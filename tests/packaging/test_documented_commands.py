"""Every command in a `bash` block of the documents works as written, on a smaller recipe where it is long."""

import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import soundfile
import soxr
from published import tensors_of, write_checkpoint

from slm_jax.checkpoints.families import gemma3n, t5, w2v_bert, wav2vec2, whisper
from slm_jax.models import conformer
from slm_jax.models.t5 import T5Config
from slm_jax.models.wav2vec2 import Wav2Vec2Config
from slm_jax.models.whisper import WhisperConfig

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]
SLM = str(Path(sys.executable).with_name("slm"))


class Exercise(NamedTuple):
    """How a documented command is run here.

    Attributes:
      command: as documented.
      smaller: flags that make it short.
      check: looks at what it left, given the folder and its standard output.
      devices: virtual devices.
    """

    command: str
    smaller: str
    check: Callable[[Path, str], None]
    devices: int = 1


def documented() -> list[str]:
    """The commands of all bash blocks, in their order, lines that end in a backslash joined."""
    commands = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return commands


def says(text: str) -> Callable[[Path, str], None]:
    def check(folder: Path, output: str) -> None:
        assert re.search(text, output), output

    return check


def wrote(*names: str) -> Callable[[Path, str], None]:
    def check(folder: Path, output: str) -> None:
        for name in names:
            assert (folder / name).exists(), f"{name} is missing; {output}"

    return check


def answered_alone(folder: Path, output: str) -> None:
    assert output.count("\n") == 1, output


def answered_all(folder: Path, output: str) -> None:
    answers = [json.loads(line) for line in (folder / "runs/mine/answers.jsonl").read_text().splitlines()]
    references = (folder / "data/dev.jsonl").read_text().splitlines()
    assert [answer["id"] for answer in answers] == [json.loads(line)["id"] for line in references]
    assert all("reject_reason" not in answer for answer in answers)


def answered_three(folder: Path, output: str) -> None:
    assert output.count("\n") == 3, output


def answered_from(what: str) -> Callable[[Path, str], None]:
    def check(folder: Path, output: str) -> None:
        written = folder / f"runs/quickstart/evaluation/test-{what}"
        metrics = json.loads((written / "metrics.json").read_text())
        # However short answers may be, transcripts have room.
        assert metrics and not any(found["rejects"] for found in metrics.values()), metrics
        assert (written / "hypotheses/demo_slots.jsonl").exists()

    return check


def probed(folder: Path, output: str) -> None:
    results = json.loads((folder / "runs/best_rq/results.json").read_text())
    asked = results.pop("asked")
    assert asked["steps"] == 2
    assert set(results) == {"probe/0", "probe/2", "few/8/nothing", "few/8/best_rq"}
    assert all(found["wer"] > 0 for found in results.values())
    assert (folder / "runs/best_rq/probe.png").stat().st_size > 10_000


def scored(folder: Path, output: str) -> None:
    assert re.search(r"^my_asr wer \d+\.\d\d$", output, re.MULTILINE), output
    assert re.search(r"^my_ast_de bleu \d+\.\d\d$", output, re.MULTILINE), output


def brought_in(directory: str, kind: str) -> Callable[[Path, str], None]:
    def check(folder: Path, output: str) -> None:
        where, found, fingerprint = output.split()
        assert Path(where) == folder / directory and found == kind
        assert json.loads((folder / directory / "foundation.json").read_text())["fingerprint"] == fingerprint

    return check


# As `slm quickstart --steps 2` does, so that what it compiled is read back from the cache.
TWO_STEPS = "--gin.TRAIN_STEPS=2 --gin.WARMUP_STEPS=1"
FEW_TOKENS = "--gin.run.EvaluationConfig.max_tokens=4 --gin.run.EvaluationConfig.num_examples=4"
TINY = "--preset tiny --steps 2"
QUICKSTART = " --gin.CORPUS_DIR=\"'runs/demo/corpus'\" --gin.MODEL_DIR="
FOUNDATION = " --gin.CORPUS_DIR=\"'runs/foundation/corpus'\" --gin.MODEL_DIR="
# Groups of those that need one another, each in the order in which a reader types them.
ANSWERS = [
    Exercise(
        '.venv/bin/slm infer --run runs/quickstart --audio any.wav --prompt "Transcribe the speech:"',
        "--max_tokens 5",
        answered_alone,
    ),
    Exercise(
        '.venv/bin/slm infer --run runs/quickstart --audio any.wav --prompt "Translate to Spanish:"',
        "--max_tokens 5",
        answered_alone,
    ),
    Exercise(
        '.venv/bin/slm infer --run runs/quickstart --audio any.wav --prompt "Which city is named?"',
        "--max_tokens 5",
        answered_alone,
    ),
    Exercise(
        ".venv/bin/slm export --run runs/quickstart --to runs/quickstart-export",
        "",
        wrote("runs/quickstart-export/model.stablehlo", "runs/quickstart-export/adapter.safetensors"),
    ),
    Exercise(
        '.venv/bin/python serve.py runs/quickstart-export "Transcribe the speech:" a.wav b.wav c.wav',
        "",
        answered_three,
    ),
]
SEEDS = [
    Exercise(
        ".venv/bin/slm quickstart --run_dir runs/seed_1 --gin.SEED=1", TINY, wrote("runs/seed_1/curves.png")
    ),
    Exercise(
        ".venv/bin/slm quickstart --run_dir runs/seed_2 --gin.SEED=2",
        TINY,
        wrote("runs/seed_2/summary.json", "runs/seed_2/evaluation/test-hypothesis/metrics.json"),
    ),
    Exercise(
        ".venv/bin/python benchmarks/table_of_seeds.py runs/quickstart runs/seed_1 runs/seed_2",
        "",
        says(r"\| demo_slots \| exact_match \|"),
    ),
]
OWN_DATA = [
    Exercise(
        ".venv/bin/slm train --gin_file mine.gin --dry_run",
        "",
        says(r"(?s)TRAIN_STEPS = 1000.*params:.*adapter"),
    ),
    Exercise(
        ".venv/bin/slm train --gin_file mine.gin",
        f"{TWO_STEPS} --gin.BATCH_SIZE=8 {FEW_TOKENS}",
        wrote("runs/mine/config.gin", "runs/mine/checkpoints", "runs/mine/tensorboard"),
    ),
    Exercise(".venv/bin/slm evaluate --run runs/mine", FEW_TOKENS, scored),
    Exercise(
        ".venv/bin/slm infer --run runs/mine --manifest data/dev.jsonl"
        ' --prompt "Transcribe the speech:" --output runs/mine/answers.jsonl',
        "--max_tokens 5",
        answered_all,
    ),
    Exercise(
        ".venv/bin/slm train --gin_file mine.gin --gin.run.MeshConfig.fsdp=4 --gin.run.MeshConfig.tensor=2",
        "--dry_run",
        says(r"mesh: slice=1, data=1, fsdp=4, tensor=2"),
        devices=8,
    ),
    Exercise(
        ".venv/bin/slm doctor --gin_file mine.gin --dir runs",
        "",
        says(r"all-reduce +ok: (.*\n)storage +ok: /.*/runs is written and read by all;"),
    ),
    Exercise(
        ".venv/bin/python launch/local.py --processes 2 --devices_per_process 2"
        " --progress_dir runs/mine/checkpoints -- .venv/bin/slm train --gin_file mine.gin",
        "--dry_run",
        says(r"(?s)TRAIN_STEPS = 1000.*params:.*launch: attempt 0: all 2 processes finished"),
    ),
]
STEP_BY_STEP = [
    Exercise(
        ".venv/bin/slm demo --to runs/demo/corpus --preset adapter",
        "--preset tiny",
        wrote("runs/demo/corpus/names_test.jsonl"),
    ),
    Exercise(
        f".venv/bin/slm train --gin_file recipes/quickstart.gin{QUICKSTART}\"'runs/quickstart'\"",
        TWO_STEPS,
        wrote("runs/quickstart/config.gin"),
    ),
    Exercise(".venv/bin/slm evaluate --run runs/quickstart --split test", "", says(r"demo_names wer \d")),
    Exercise(".venv/bin/slm goodput --run runs/quickstart", "", says(r"^goodput \d+\.\d % of \d+ s")),
    Exercise(
        ".venv/bin/slm evaluate --run runs/quickstart --split test --speech_as transcript",
        "",
        answered_from("transcript"),
    ),
    Exercise(
        ".venv/bin/slm evaluate --run runs/quickstart --split test --speech_as hypothesis",
        "",
        answered_from("hypothesis"),
    ),
    Exercise(
        ".venv/bin/tensorboard --logdir runs/quickstart/tensorboard", "--inspect", says("eval/demo_asr")
    ),
]
THERE_AND_BACK = [
    Exercise(
        ".venv/bin/slm convert --from runs/quickstart --to_t5x runs/quickstart_t5x",
        "",
        wrote("runs/quickstart_t5x/checkpoint_2/state/manifest.ocdbt"),
    ),
    Exercise(
        ".venv/bin/slm convert --from runs/quickstart_t5x --to_run runs/from_t5x"
        " --gin_file recipes/quickstart.gin --gin.CORPUS_DIR=\"'runs/demo/corpus'\"",
        "",
        wrote("runs/from_t5x/config.gin", "runs/from_t5x/checkpoints/2/state"),
    ),
]
OWN_TASK_AND_MODEL = [
    Exercise(
        ".venv/bin/slm train --gin_file slots.gin",
        TWO_STEPS,
        wrote("runs/slots/checkpoints/2"),
    ),
    Exercise(".venv/bin/slm evaluate --run runs/slots", "", says(r"all_slots exact_match \d")),
    Exercise(
        f".venv/bin/slm train --gin_file recipes/quickstart.gin{QUICKSTART}\"'runs/deeper'\""
        ' --gin.adapters.AdapterConfig.layers=4 "--gin.REDUCER=@reducers.DropReducer()"',
        f"{TWO_STEPS} {FEW_TOKENS}",
        wrote("runs/deeper/checkpoints/2"),
    ),
]
SHARDS_AND_PLANS = [
    Exercise(
        ".venv/bin/slm data prepare --manifest runs/demo/corpus/train.jsonl --to runs/shards --shards 8"
        " --shuffle --workers 2",
        "",
        says("24 utterances, .* in 8 shards of split train"),
    ),
    Exercise(
        ".venv/bin/slm data prepare --gin_file mine.gin --task my_asr --split validation --to runs/shards",
        "",
        wrote("runs/shards/shards.json", "runs/shards/validation-00000-of-00001.array_record"),
    ),
    Exercise(
        ".venv/bin/slm data describe --from_shards runs/shards --png runs/shards.png",
        "",
        wrote("runs/shards.png"),
    ),
    Exercise(".venv/bin/slm data mixture --run runs/quickstart", "--steps 2", says("no padding: speech")),
    Exercise(
        ".venv/bin/slm data rows --run runs/quickstart --mesh data=4,fsdp=2,tensor=1 --hosts 4 --host 1"
        " --start 100 --count 2 --json",
        "",
        says(r'^\{"100": \{"1604": \["demo_'),
    ),
    Exercise(".venv/bin/python benchmarks/packing.py", "--references 9000", says(r"mls +packed +9\d\.\d %")),
]
PACKING = [
    Exercise(
        ".venv/bin/python benchmarks/packed_quickstart.py --to runs/packed_quickstart",
        "--preset tiny --live_steps 3 --steps 3 --repetitions 1 --seeds",
        says(r"\| hours of audio a second, encoder in the step \| \d\.\d+ \| \d\.\d+ \|"),
    ),
]
FOUNDATION_MODELS = [
    Exercise(
        ".venv/bin/slm demo --to runs/foundation/corpus",
        "--preset tiny",
        wrote("runs/foundation/corpus/train.jsonl"),
    ),
    Exercise(
        f".venv/bin/slm train --gin_file recipes/demo_t5.gin{FOUNDATION}\"'runs/foundation/t5_run'\""
        " --gin.LLM_OUTPUT=\"'runs/foundation/llm'\"",
        TWO_STEPS,
        wrote("runs/foundation/llm/params.safetensors"),
    ),
    Exercise(
        f".venv/bin/slm train --gin_file recipes/demo_encoder.gin{FOUNDATION}"
        "\"'runs/foundation/encoder_run'\""
        " --gin.SPEECH_ENCODER_OUTPUT=\"'runs/foundation/speech_encoder'\"",
        TWO_STEPS,
        wrote("runs/foundation/speech_encoder/foundation.json"),
    ),
    Exercise(
        ".venv/bin/python benchmarks/best_rq_probe.py --corpus runs/foundation/corpus --work runs/best_rq",
        "--steps 2 --checkpoints 1 --probe_steps 2 --few_steps 2 --few 8",
        probed,
    ),
]
PUBLISHED_MODELS = [
    Exercise(
        ".venv/bin/slm demo --to runs/corpus --preset tiny",
        "",
        wrote("runs/corpus/train.jsonl", "runs/corpus/vocabularies/text.model"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/mt0-large --to converted/mt0-large",
        "",
        brought_in("converted/mt0-large", "t5"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/w2v-bert-2.0 --to converted/w2v-bert-2.0",
        "",
        brought_in("converted/w2v-bert-2.0", "conformer"),
    ),
    Exercise(
        ".venv/bin/slm train --gin_file joined.gin",
        f"{TWO_STEPS} {FEW_TOKENS} --gin.BATCH_SIZE=2 --gin.adapters.AdapterConfig.dim=64"
        " --gin.adapters.AdapterConfig.mlp_dim=64 --gin.run.EvaluationConfig.batch_size=2",
        wrote("runs/joined/checkpoints/2"),
    ),
    Exercise(
        ".venv/bin/slm convert --from converted/mt0-large --to_hf runs/mt0-large-hf",
        "",
        wrote("runs/mt0-large-hf/config.json", "runs/mt0-large-hf/spiece.model"),
    ),
    Exercise(
        ".venv/bin/python benchmarks/conversion.py --work runs/conversion --models t5:large",
        "--models t5:tiny",
        says(r"(?m)^\| t5:tiny \| 0\.00\dB \|.* \| \d+ \| \d\.\d\d GB \| \d\.\d{3} x \|$"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/t5x/mt5_large --to converted/mt5-large",
        "",
        brought_in("converted/mt5-large", "t5"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/gemma-3n-E2B-it --to converted/gemma-3n-audio",
        "",
        brought_in("converted/gemma-3n-audio", "conformer"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/whisper-large-v3 --to converted/whisper-large-v3",
        "",
        brought_in("converted/whisper-large-v3", "whisper"),
    ),
    Exercise(
        ".venv/bin/slm convert --from downloads/hubert-large-ll60k --to converted/hubert-large",
        "",
        brought_in("converted/hubert-large", "wav2vec2"),
    ),
]
MACHINES = [
    Exercise(
        ".venv/bin/python benchmarks/step_vs_torch.py",
        "--size tiny --steps 1",
        says(r"(?m)^\| tiny \| \d+\.\d\d( \| \d+\.\d){7} \|$"),
    ),
    Exercise(
        ".venv/bin/slm plan --gin_file models/slm_tiny.gin --topology v5e:2x2 --gin.TENSOR=2",
        "--gin.BATCH_SIZE=8",
        says(r"fits\s+│ yes"),
    ),
    Exercise(
        ".venv/bin/python benchmarks/paper_size.py --rows 64 --attention_kernel cudnn --profile runs/trace",
        "--model tiny --seconds 1 --rows 2 --tokens 4 --steps 1 --attention_kernel xla",
        says(r'"remat": "frozen", "attention_kernel": "xla", .*"hardware_tflops"'),
    ),
]
EXERCISES = {
    "answers": ANSWERS,
    "seeds": SEEDS,
    "own_data": OWN_DATA,
    "step_by_step": STEP_BY_STEP,
    "there_and_back": THERE_AND_BACK,
    "own_task_and_model": OWN_TASK_AND_MODEL,
    "shards_and_plans": SHARDS_AND_PLANS,
    "packing": PACKING,
    "foundation_models": FOUNDATION_MODELS,
    "published_models": PUBLISHED_MODELS,
    "machines": MACHINES,
}
# What lies below `downloads/` here: the published ones' families, with sizes that all differ.
PUBLISHED: dict[str, tuple[Any, Any]] = {
    "mt0-large": (
        t5.FAMILY,
        T5Config(vocab_size=1024, emb_dim=40, num_heads=3, head_dim=8, mlp_dim=56, encoder_layers=2,
                 decoder_layers=1),
    ),
    "w2v-bert-2.0": (w2v_bert.FAMILY, conformer.preset("w2v_bert", layers=2, dim=24, heads=3, ffn_dim=40)),
    "gemma-3n-E2B-it": (
        gemma3n.FAMILY,
        conformer.preset("gemma3n", layers=2, dim=24, heads=3, subsampling_channels=(8, 4)),
    ),
    "whisper-large-v3": (
        whisper.FAMILY,
        WhisperConfig(mel_bins=16, layers=2, dim=24, heads=3, mlp_dim=40, positions=250),
    ),
    "hubert-large-ll60k": (
        wav2vec2.FAMILY,
        Wav2Vec2Config(layers=2, dim=24, heads=3, mlp_dim=40, position_kernel=16, position_groups=4),
    ),
}  # fmt: skip
# What make does itself is read from `make --dry-run`; CI runs these as they are.
MADE = {
    "make quickstart": ["slm quickstart --run_dir runs/quickstart"],
    "make foundation": [
        "slm demo --to runs/foundation/corpus",
        "slm train --gin_file recipes/demo_t5.gin",
        "slm train --gin_file recipes/demo_encoder.gin",
        "slm quickstart --foundation runs/foundation",
    ],
    "make test": ["ruff check .", "ruff format --check .", "pyright", "pytest -n 2"],
    "make lint": ["ruff check .", "ruff format --check .", "pyright"],
}


def test_every_documented_command_is_exercised_and_every_exercise_documented():
    exercised = [exercise.command for group in EXERCISES.values() for exercise in group]
    assert set(documented()) == set(exercised) | MADE.keys()
    assert len(set(exercised)) == len(exercised)


@pytest.mark.parametrize("command", MADE)
def test_make_runs_what_it_says(command: str):
    target = command.removeprefix("make ")
    plan = subprocess.run(
        ["make", "--dry-run", "--directory", str(ROOT), target, "VENV=.venv"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    places = [plan.find(step) for step in MADE[command]]
    assert -1 not in places and places == sorted(places), plan


def run(folder: Path, command: str, devices: int = 1) -> str:
    """Runs a command as typed in `folder`, with this environment for `.venv`; returns standard output."""
    words = [
        str(Path(sys.executable).with_name(Path(word).name)) if word.startswith(".venv/bin/") else word
        for word in shlex.split(command)
    ]
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "SLM_CACHE_DIR": str(folder / "cache"),
        # Many commands compile the same small programs.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    of_core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.monotonic() - began:6.1f} s, {of_core:5.1f} s of a core: {command}")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def own_data(folder: Path) -> None:
    """Lays the files that the README speaks of: manifests, a recording at another rate, the gin file."""
    (folder / "data").mkdir()
    for split in ("train", "dev"):
        lines = [
            json.loads(line) for line in (folder / f"runs/demo/corpus/{split}.jsonl").read_text().splitlines()
        ]
        for line in lines:
            line["audio"] = f"../runs/demo/corpus/{line['audio']}"
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples, rate = soundfile.read(folder / "data" / lines[0]["audio"])
    soundfile.write(folder / "any.wav", soxr.resample(samples, rate, 44_100), 44_100)
    for number, name in enumerate("abc"):
        cut = soxr.resample(samples, rate, 16_000)[: -1 - 1600 * number]
        soundfile.write(folder / f"{name}.wav", cut, 16_000)
    for page, name, language in (
        ("README.md", "mine.gin", "gin"),
        ("docs/quickstart.md", "slots.gin", "gin"),
        ("docs/export.md", "serve.py", "python"),
        ("docs/models.md", "joined.gin", "gin"),
    ):
        pattern = rf"^```{language}\n(# {re.escape(name)}\n.*?)^```"
        (block,) = re.findall(pattern, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        (folder / name).write_text(block)


def downloads(folder: Path) -> None:
    """Lays what a reader downloads: random weights of small configurations, as they are published."""
    for name, (family, config) in PUBLISHED.items():
        place = folder / "downloads" / name
        write_checkpoint(place, tensors_of(family, config, scale=0.1), family.hf_config(config))
    vocabulary = folder / "runs/demo/corpus/vocabularies/text.model"
    shutil.copyfile(vocabulary, folder / "downloads/mt0-large/spiece.model")
    with tarfile.open(ROOT / "tests/checkpoints/data/t5x/t5_legacy.tar.gz") as archive:
        archive.extractall(folder / "downloads/t5x", filter="data")
    (folder / "downloads/t5x/t5_legacy").rename(folder / "downloads/t5x/mt5_large")


def begin(folder: Path) -> None:
    """Makes a folder in which `make quickstart` has been, beside what a reader has and the documents show."""
    for name in ("benchmarks", "launch"):
        (folder / name).symlink_to(ROOT / name)
    run(folder, f"{SLM} quickstart {TINY} --run_dir runs/quickstart")
    summary = json.loads((folder / "runs/quickstart/summary.json").read_text())
    assert summary["tasks"] and summary["seconds"]
    own_data(folder)
    downloads(folder)


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which all begin; the first worker that needs it makes it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "begun.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "begun.done").exists():
            shutil.rmtree(shared / "begun", ignore_errors=True)
            (shared / "begun").mkdir()
            begin(shared / "begun")
            (shared / "begun.done").touch()
    return shared / "begun"


@pytest.mark.parametrize("group", EXERCISES)
def test_the_documented_commands_work_as_written(group: str, begun: Path, tmp_path: Path):
    folder = tmp_path / "reader"
    shutil.copytree(begun, folder, symlinks=True)
    # A run says from where its paths count.
    config = folder / "runs/quickstart/config.gin"
    config.write_text(config.read_text().replace(str(begun), str(folder)))
    for exercise in EXERCISES[group]:
        output = run(folder, f"{exercise.command} {exercise.smaller}", exercise.devices)
        exercise.check(folder, output)
