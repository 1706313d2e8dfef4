"""`slm data prepare` and `slm data describe` as they are typed."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from slm_jax.cli.main import main
from slm_jax.demo.corpus import PRESETS, build_corpus
from slm_jax.demo.vocabulary import place_vocabularies

TASKS = """
from __gin__ import dynamic_registration

from slm_jax.cli import run
from slm_jax.data.sources import shards
from slm_jax.tasks import asr

asr.register_asr:
  name = '{name}'
  vocabulary = '{folder}/corpus/vocabularies/text.model'
  templates = ('Transcribe: {{speech}}',)
  {source}
run.DataConfig.register = (@asr.register_asr,)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny demonstration corpus, and gin files of a task on it and of one on its shards."""
    folder = tmp_path_factory.mktemp("data_commands")
    build_corpus(folder / "corpus", PRESETS["tiny"], report=lambda line: None)
    place_vocabularies(folder / "corpus")
    manifests = (
        f"manifests = {{'train': '{folder}/corpus/train.jsonl', 'validation': '{folder}/corpus/dev.jsonl'}}"
    )
    (folder / "tasks.gin").write_text(TASKS.format(name="on_manifests", folder=folder, source=manifests))
    source = f"source = @shards.ShardSource()\nshards.ShardSource.directory = '{folder}/shards'"
    (folder / "shards.gin").write_text(TASKS.format(name="on_shards", folder=folder, source=source))
    return folder


def test_a_gin_file_of_tasks_alone_is_enough_to_look_at_them(folder, tmp_path, capsys):
    tasks = (folder / "tasks.gin").read_text().replace("from slm_jax.cli import run\n", "")
    path = tmp_path / "alone.gin"
    path.write_text(
        tasks.replace("run.DataConfig.register", "REGISTER_TASKS").replace("'on_manifests'", "'alone'")
    )
    words = "describe", "--gin_file", path, "--task", "alone"
    assert said(capsys, *words).startswith("alone, split train: 24 examples")
    # A run cannot be made of it, and that is one sentence.
    assert main(["train", "--gin_file", str(path)]) == 2
    assert "the gin files configure no run.Run; include 'runs/train.gin'" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_CACHE_DIR", str(folder / "cache"))


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs `slm data` and returns what it says; its status is 0."""
    assert main(["data", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["data", *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.count("slm: error: ") == 1
    return err.rpartition("slm: error: ")[2].strip()


def test_a_task_becomes_shards_that_a_task_reads(folder: Path, capsys):
    task = ("--gin_file", folder / "tasks.gin", "--task", "on_manifests")
    out = said(capsys, "prepare", *task, "--to", folder / "shards", "--shards", 3, "--shuffle")
    assert out.startswith(f"{folder}/shards: 24 utterances, 0.0") and "in 3 shards of split train\n" in out
    said(capsys, "prepare", *task, "--to", folder / "shards", "--split", "validation", "--format", "pcm16")
    again = said(capsys, "prepare", *task, "--to", folder / "shards", "--shards", 3, "--shuffle")
    assert again == out
    described = json.loads(said(capsys, "describe", "--from_shards", folder / "shards", "--json"))
    manifest = json.loads(said(capsys, "describe", "--manifest", folder / "corpus/train.jsonl", "--json"))
    for name in ("examples", "hours", "languages", "lengths", "rejected"):
        assert described[name] == manifest[name], name
    tokens = [
        json.loads(said(capsys, "describe", "--gin_file", folder / file, "--task", name, "--json"))
        for file, name in (("tasks.gin", "on_manifests"), ("shards.gin", "on_shards"))
    ]
    assert tokens[0].pop("name") == "on_manifests" and tokens[1].pop("name") == "on_shards"
    assert tokens[0] == tokens[1]
    assert tokens[0]["lengths"]["targets"]["count"] == 24


def test_a_manifest_is_described_as_text_and_picture(folder: Path, capsys, tmp_path: Path):
    png = tmp_path / "lengths.png"
    out = said(capsys, "describe", "--manifest", folder / "corpus/train.jsonl", "--png", png)
    assert out.startswith(f"{folder}/corpus/train.jsonl, split train: 24 examples, ")
    assert "\nlanguage     examples        hours\nen                 24 " in out
    assert "\nspeech, seconds: shortest " in out and "\ntext, characters: shortest " in out
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000


def test_limits_of_the_run_count(folder: Path, capsys):
    binding = "--gin.run.DataConfig.feature_lengths={'speech': 48000, 'inputs': 50, 'targets': 50}"
    words = ("describe", "--gin_file", folder / "tasks.gin", "--task", "on_manifests", binding)
    out = said(capsys, *words)
    assert "rejected, speech_too_long " in out


def test_a_share_of_broken_files(folder: Path, capsys, tmp_path: Path):
    soundfile.write(tmp_path / "good.wav", np.ones(1_600, np.int16), 16_000)
    lines = [{"audio": "good.wav", "duration": 0.1, "text": "x"}] * 18
    lines += [{"audio": "none.wav", "duration": 1, "text": "x"}] * 2
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("prepare", "--manifest", manifest, "--to", tmp_path / "shards")
    assert refused(capsys, *words) == (
        "2 of 20 references are rejected (missing_file 2), more than --max_bad_share 0.05; they are listed "
        f"in {tmp_path}/shards/rejects.jsonl"
    )
    out = said(capsys, *words, "--max_bad_share", 0.1)
    assert "18 utterances" in out and "rejected: missing_file 2\n" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--task", "on_manifests"), "--task on_manifests needs --gin_file, the file that registers it"),
        (("--task", "on_manifest", "--gin_file", "tasks.gin"), "unknown task 'on_manifest'; did you mean"),
        (("--manifest", "a.jsonl", "--gin_file", "tasks.gin"), "--gin_file and --gin.NAME are for --task"),
        (("--manifest", "corpus/trian.jsonl"), "trian.jsonl does not exist; did you mean 'train.jsonl'?"),
        (("--from_shards", "corpus"), "corpus has no shards.json, expected a directory of speech shards"),
        (
            ("--task", "on_manifests", "--gin_file", "tasks.gin", "--split", "test"),
            "no split 'test'; choose from train, validation",
        ),
        ((), "one of the arguments --task --manifest --from_shards is required"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(folder: Path, capsys, monkeypatch, words, sentence: str):
    monkeypatch.chdir(folder)
    assert sentence in refused(capsys, "describe", *words)
    assert sentence in refused(capsys, "prepare", *words, "--to", "never")
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--runner", "Direct"), "--runner is 'Direct'; did you mean 'DirectRunner'?"),
        (("--beam", "=x"), "--beam =x: expected NAME=VALUE"),
        (("--format", "mp3"), "--format is 'mp3'; choose from flac, pcm16"),
    ],
)
def test_flags_of_prepare(folder: Path, capsys, words, sentence: str):
    source = ("--manifest", folder / "corpus/train.jsonl", "--to", folder / "never")
    assert sentence in refused(capsys, "prepare", *source, *words)
    assert not (folder / "never").exists()


def test_options_reach_beam(folder: Path, capsys, tmp_path: Path, monkeypatch):
    from apache_beam.options.pipeline_options import PipelineOptions

    reached: list[dict[str, object]] = []
    from_dictionary = PipelineOptions.from_dictionary

    def spy(options):
        reached.append(options)
        return from_dictionary(options)

    monkeypatch.setattr(PipelineOptions, "from_dictionary", spy)
    flags = ("--beam", "experiments=a", "--beam", "experiments=b=c", "--beam", "runtime_type_check")
    words = ("--manifest", folder / "corpus/dev.jsonl", "--to", tmp_path / "to", *flags)
    assert "6 utterances" in said(capsys, "prepare", *words)
    expected = {"runner": "DirectRunner", "experiments": ["a", "b=c"], "runtime_type_check": True}
    assert expected.items() <= reached[-1].items()
