"""The gin files of docs/tasks.md, and the recipe on public corpora, register what they say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import seqio

from slm_jax.cli import gin_config
from slm_jax.cli.run import DataConfig, Run
from slm_jax.demo import foundation
from slm_jax.tasks import templates as prompts

PAGE = (Path(__file__).parent.parent.parent / "docs/tasks.md").read_text(encoding="utf-8")
REQUIRED = ("MODEL_DIR='x'", "TRAIN_STEPS=1", "TASK_FEATURE_LENGTHS={'speech': 1, 'inputs': 1, 'targets': 1}")

LINE = {
    "id": "a",
    "audio": "a.wav",
    "duration": 1.0,
    "language": "en",
    "text": "the quick fox",
    "translations": {"de": "der Fuchs"},
    "phrases": "fox",
    "context": "a dog",
    "answer": "fox",
    "keyword": "no",
    "cut": "0.5",
    "cut_words": "2",
}


@pytest.fixture
def folder(tmp_path, task_vocabulary, monkeypatch) -> Path:
    """What the page speaks of, in small."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "converted/mt0-large"
    model.mkdir(parents=True)
    shutil.copyfile(task_vocabulary, model / "spiece.model")
    (model / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        (tmp_path / f"data/{name}.jsonl").write_text(json.dumps(LINE))
    (tmp_path / "data/names.txt").write_text("\n".join(f"name{i}" for i in range(99)))
    tables = {
        "LibriSpeech/train-clean-100/1/2/1-2.trans.txt": "1-2-0 FOX\n1-2-1 DOG\n",
        "mls_german/train/transcripts.txt": "".join(f"1_2_{i}\tfox\n" for i in range(32)),
    }
    for language in ("de_de", "fr_fr", "en_us"):
        tables[f"fleurs/{language}/train.tsv"] = "5\t5.wav\tThe fox\tthe fox\tt h e\t16000\tMALE\n"
    for name, text in tables.items():
        path = tmp_path / "corpora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def block(name: str, folder: Path) -> Path:
    (text,) = re.findall(rf"^```gin\n(# {re.escape(name)}\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (folder / name).write_text(text)
    return folder / name


def register(path: Path) -> list[str]:
    bindings = [
        *REQUIRED,
        *([] if "MIXTURE_OR_TASK_NAME" in path.read_text() else ["MIXTURE_OR_TASK_NAME='m'"]),
    ]
    gin_config.parse(["runs/common.gin", str(path)], bindings)
    return [str(function()) for function in gin_config.build(DataConfig).register]


def test_families(folder):
    names = register(block("families.gin", folder))
    assert len(names) == 8
    found = {}
    for name in names:
        dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
        (row,) = dataset.as_numpy_iterator()
        found[name] = row["targets_pretokenized"].decode()
        if name == "my_asr":
            assert row["inputs_pretokenized"].startswith(b"{speech}")
    assert found == {
        "my_asr": "the quick fox",
        "my_ast_de": "der Fuchs",
        "my_biasing": "the quick fox",
        "my_questions": "fox",
        "my_continuation": "fox",
        "my_keywords": "no",
        "my_languages": "English",
        "my_text_de": "der Fuchs",
    }


def test_mixtures(folder):
    names = register(block("mixtures.gin", folder))
    assert names == ["librispeech_asr", "mls_de_asr", "fleurs_de_fr_en_ast", "asr", "asr_and_ast"]
    mixture = seqio.MixtureRegistry.get("asr_and_ast")
    share = 2 ** (1 / 5) / (2 ** (1 / 5) + 32 ** (1 / 5))
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == pytest.approx(
        {"librispeech_asr": 3 * share, "mls_de_asr": 3 * (1 - share), "fleurs_de_fr_en_ast": 1.0}
    )


def test_a_file_of_templates(folder):
    (text,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (folder / "mine.json").write_text(text)
    assert set(prompts.load_templates("mine.json")) == {"en", "de"}


def test_the_table_of_families_names_functions_and_sets(folder):
    rows = re.findall(r"^\| (?:`(\w+)\.(\w+)`|the same)[^|]*\|[^|]*\|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    assert len(rows) >= 15
    for module, function, sets in rows:
        if module:
            assert callable(getattr(__import__(f"slm_jax.tasks.{module}", fromlist=["x"]), function))
        assert set(re.findall(r"`(\w+)`", sets)) <= set(prompts.packaged_sets())
    listed = {name for *_, sets in rows for name in re.findall(r"`(\w+)`", sets)}
    assert listed == set(prompts.packaged_sets())


def test_the_recipe_on_public_corpora_registers_its_mixture(folder):
    bindings = [
        "MODEL_DIR='x'",
        "LIBRISPEECH_DIR='corpora/LibriSpeech'",
        "MLS_DIR='corpora/mls_german'",
        "COVOST2_DIR='corpora/covost'",
        "CLIPS_DIR='corpora/clips'",
        f"SPEECH_ENCODER_CHECKPOINT={foundation.speech_encoder()!r}",
        f"LLM_CHECKPOINT={foundation.llm()!r}",
        "VOCABULARY='converted/mt0-large'",
        "PROMPT_LANGUAGE='speech'",
    ]
    gin_config.parse(["recipes/public_corpora.gin"], bindings)
    run = gin_config.build(Run)
    names = [function() for function in run.data.register]
    assert names == ["librispeech_asr", "mls_de_asr", "covost2_de_en_ast", "public_corpora"]
    tasks = seqio.MixtureRegistry.get(run.data.mixture_or_task).tasks
    assert {task.name for task in tasks} == set(names[:3])
    assert all({"train", "validation", "test"} <= set(task.splits) for task in tasks)
