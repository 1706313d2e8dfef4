"""Registrations: what each family of tasks asks and expects, mixtures, metrics, clashes of names."""

import functools
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import seqio

from slm_jax.data.references import SPEECH
from slm_jax.errors import UserError
from slm_jax.evaluation.metrics import declaration
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.ast import register_ast
from slm_jax.tasks.instruction import register_instruction, register_span_corruption
from slm_jax.tasks.rates import number_of_references
from slm_jax.tasks.registration import (
    register_mixture,
    register_proportional_mixture,
)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = [
        {
            "id": str(i),
            "audio": f"{i}.wav",
            "duration": 1.0,
            "language": "en",
            "text": "the quick fox",
            "translations": {"de": "der Fuchs", "es": "el zorro"},
            "instruction": "judge the fox",
            "response": "quick",
        }
        for i in range(7)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def texts(name: str) -> list[tuple[str, str]]:
    """Prompt and target of each example, as text."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
    return [
        (row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())
        for row in dataset.as_numpy_iterator()
    ]


def test_recognition_asks_for_the_transcript(manifest, task_vocabulary):
    name = register_asr("asr", manifests={"train": manifest}, vocabulary=task_vocabulary)
    found = texts(name)
    assert {target for _, target in found} == {"the quick fox"}
    assert len({prompt for prompt, _ in found}) > 1
    assert all(prompt.count("{speech}") == 1 and "language" not in prompt for prompt, _ in found)


def test_the_folder_of_a_converted_t5_is_a_vocabulary(manifest, task_vocabulary, tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(Path(task_vocabulary).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 7}))
    register_asr("by_file", manifests={"train": manifest}, vocabulary=task_vocabulary)
    register_asr("by_folder", manifests={"train": manifest}, vocabulary=folder)
    # Again, as every command does.
    register_asr("by_folder", manifests={"train": manifest}, vocabulary=folder)
    file, of_folder = (
        seqio.get_mixture_or_task(name).output_features["inputs"].vocabulary
        for name in ("by_file", "by_folder")
    )
    assert of_folder.encode("the quick fox") == file.encode("the quick fox")
    assert of_folder.vocab_size == file.vocab_size + 7
    for extra_ids in (0, 3):
        register_instruction(
            f"with_{extra_ids}", manifests={"train": manifest}, vocabulary=folder, extra_ids=extra_ids
        )
        found = seqio.get_mixture_or_task(f"with_{extra_ids}").output_features["inputs"].vocabulary
        assert found.vocab_size == file.vocab_size + extra_ids
    with pytest.raises(UserError, match="has no vocabulary"):
        register_asr("by_nothing", manifests={"train": manifest}, vocabulary=tmp_path)


def test_translation_asks_in_the_name_of_the_language(manifest, task_vocabulary):
    register_ast("de", manifests={"train": manifest}, vocabulary=task_vocabulary, target_language="de")
    assert all("German" in prompt and target == "der Fuchs" for prompt, target in texts("de"))
    register_ast("fr", manifests={"train": manifest}, vocabulary=task_vocabulary, target_language="fr")
    with pytest.raises(UserError, match=re.escape("reads field 'translations.fr'")):
        texts("fr")


def test_instruction_has_its_own_question(manifest, task_vocabulary):
    register_instruction("ask", manifests={"train": manifest}, vocabulary=task_vocabulary)
    assert set(texts("ask")) == {("judge the fox {speech}", "quick")}


def test_text_only_and_span_corruption_hold_no_speech(manifest, task_vocabulary):
    given = {"manifests": {"train": manifest}, "vocabulary": task_vocabulary}
    register_asr("text", text_only=True, noise={"double": 0.5}, repeats=3, **given)
    register_span_corruption("spans", repeats=2, **given)
    for name, count in (("text", 21), ("spans", 14)):
        rows = list(seqio.get_mixture_or_task(name).get_dataset(None, "train", seed=0).as_numpy_iterator())
        assert len({row["id"] for row in rows}) == len(rows) == count
        assert all(SPEECH not in row["inputs"] for row in rows)
    with pytest.raises(UserError, match="noise is for text_only tasks"):
        register_asr("wrong", noise={"double": 0.5}, **given)


def test_rates_are_numbers_of_references(manifest, task_vocabulary, tmp_path):
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "fox"}\n\n{"text": "dog"}\n')
    register_asr("a", manifests={"train": manifest}, vocabulary=task_vocabulary)
    register_asr("b", manifests={"train": small, "test": manifest}, vocabulary=task_vocabulary)
    mixture = seqio.MixtureRegistry.get(register_proportional_mixture("mix", ["a", "b"]))
    assert [mixture.get_rate(task) for task in mixture.tasks] == [7.0, 2.0]
    outer = seqio.MixtureRegistry.get(register_mixture("outer", {"a": 2.0, "b": 0.5}))
    assert [outer.get_rate(task) for task in outer.tasks] == [2.0, 0.5]
    with pytest.raises(UserError, match=r"task 'a' has no split 'tst'; did you mean|choose"):
        number_of_references(seqio.TaskRegistry.get("a"), "tst")
    with pytest.raises(UserError, match=r"names unknown task 'aa'; did you mean 'a'\?"):
        register_proportional_mixture("wrong", ["aa"])
    with pytest.raises(UserError, match="mixture 'none' is empty"):
        register_proportional_mixture("none", [])


def test_rates_ask_for_no_manifest_until_they_are_used(task_vocabulary, tmp_path):
    register_asr("later", manifests={"train": tmp_path / "none.jsonl"}, vocabulary=task_vocabulary)
    mixture = seqio.MixtureRegistry.get(register_proportional_mixture("mix", ["later"]))
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        mixture.get_rate(mixture.tasks[0])


def test_registering_twice(manifest, task_vocabulary):
    again = functools.partial(register_asr, "a", manifests={"train": manifest}, vocabulary=task_vocabulary)
    assert again() == again() == "a"
    with pytest.raises(UserError, match="the name 'a' is taken"):
        again(templates=["{speech}"])
    mix = functools.partial(register_proportional_mixture, "mix", ["a"])
    assert mix() == mix() == "mix"
    with pytest.raises(UserError, match="the name 'mix' is taken"):
        register_mixture("mix", {"a": 3.0})
    with pytest.raises(UserError, match="task 'a b'"):
        register_asr("a b", manifests={"train": manifest}, vocabulary=task_vocabulary)


def test_metrics_are_found_by_name(manifest, task_vocabulary):
    def length(targets, predictions):
        return {"length": float(len(targets) + len(predictions))}

    register_asr(
        "a",
        manifests={"train": manifest},
        vocabulary=task_vocabulary,
        languages=["en"],
        metric_fns=["wer", "cer", length],
    )
    wer, cer, own = cast(Any, seqio.TaskRegistry.get("a").metric_fns)
    assert wer(["the quick fox"], ["the quick dog"])["wer"] == pytest.approx(100 / 3)
    assert cer(["fox"], ["fix"])["cer"] == pytest.approx(100 / 3)
    assert own is length
    assert declaration(wer).endswith("language en")


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("werr", r"there is no metric 'werr'; did you mean 'wer'\?"),
        ("tests_no_such_module:f", "there is no metric 'tests_no_such_module:f': No module named"),
    ],
)
def test_an_unknown_metric_is_refused_when_registered(manifest, task_vocabulary, metric, told):
    with pytest.raises(UserError, match=told):
        register_asr("b", manifests={"train": manifest}, vocabulary=task_vocabulary, metric_fns=[metric])


def test_languages_are_a_list(manifest, task_vocabulary):
    with pytest.raises(UserError, match=re.escape("languages is 'en', expected a list such as ['en']")):
        register_asr("t", manifests={"train": manifest}, vocabulary=task_vocabulary, languages="en")
