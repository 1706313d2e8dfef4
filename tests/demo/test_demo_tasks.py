"""The demonstration's SeqIO tasks on a tiny corpus."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio

from slm_jax.data.index import IndexTable, build_index
from slm_jax.data.references import SPEECH
from slm_jax.demo import vocabulary
from slm_jax.errors import UserError
from slm_jax.tasks import demo

TEXT_TASKS = [*demo.TEXT_TASKS, *(f"{name}_noisy" for name in demo.TEXT_TASKS)]


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory) -> Iterator[Path]:
    # Of its own, as other tests look at what a corpus is before vocabularies are added.
    folder = shutil.copytree(tiny_corpus, tmp_path_factory.mktemp("tasks") / "corpus")
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    vocabulary.place_vocabularies(folder)
    assert demo.register(folder) == "demo_speech"
    yield folder
    # Other tests register other corpora under the same names.
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


def index(name: str, split: str, folder: Path) -> IndexTable:
    return build_index(name, split, {"speech": 92_160, "inputs": 64, "targets": 64}, folder)


def decode(name: str, tokens: np.ndarray, feature: str = "targets") -> str:
    pieces = seqio.TaskRegistry.get(name).output_features[feature].vocabulary
    return pieces.decode([int(token) for token in tokens if token not in (SPEECH, pieces.eos_id)])


def records(corpus: Path, name: str) -> dict[str, dict]:
    lines = (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        (name, split)
        for name in (*demo.SPEECH_TASKS, *demo.NAMES_TASKS, "demo_ctc")
        for split in ("train", "validation", "test")
        if name not in demo.NAMES_TASKS or split != "train"
    ],
)
def test_spoken_tasks_ask_for_what_the_manifest_holds(corpus: Path, tmp_path: Path, name: str, split: str):
    known = records(
        corpus, ("names_" if name in demo.NAMES_TASKS else "") + {"validation": "dev"}.get(split, split)
    )
    references = list(index(name, split, tmp_path).references())
    assert {reference.id for reference in references} == known.keys()
    for reference in references:
        record = known[reference.id]
        expected = {
            "demo_ast_de": record["translations"]["de"],
            "demo_ast_es": record["translations"]["es"],
            "demo_slots": record["answer"],
        }.get(name, record["text"])
        assert decode(name, reference.targets) == expected
        assert reference.inputs.tolist().count(SPEECH) == 1
        assert reference.samples == round(record["duration"] * 16_000)
        prompt = decode(name, reference.inputs, "inputs")
        if name == "demo_slots":
            assert record["question"].lower().rstrip("?") in prompt
        for phrase in record.get("phrases", "").split(", "):
            assert (phrase in prompt) == (name != "demo_names_unlisted" or not phrase)
        if name.startswith("demo_ast"):
            assert {"de": "german", "es": "spanish"}[name[-2:]] in prompt


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_text_tasks_hold_the_transcript_in_the_place_of_the_speech(corpus: Path, tmp_path: Path, name: str):
    listed = "names" in name
    known = records(corpus, "text_names_train" if listed else "text_train")
    references = list(index(name, "train", tmp_path).references())
    assert len(references) == len(known)
    heard = exact = 0
    for reference in references:
        record = known[reference.id]
        assert SPEECH not in reference.inputs and reference.samples == 0
        heard += decode(name, reference.inputs, "inputs").endswith(record["heard" if listed else "text"])
        if listed:
            assert decode(name, reference.targets) == record["text"]
        # What stands in place of the speech is marked, and the instruction is not.
        first, count = reference.said
        said = decode(name, reference.inputs[first : first + count], "inputs")
        exact += said == record["heard" if listed else "text"]
        assert first + count == len(reference.inputs) - 1
        asked = decode(name, reference.inputs[:first], "inputs")
        assert asked and all(phrase in asked for phrase in record.get("phrases", "").split(", "))
    if name.endswith("_noisy"):
        assert exact <= heard < 0.5 * len(known)
    else:
        assert exact == heard == len(known)


def test_spoken_and_text_tasks_share_their_prompts(corpus: Path, tmp_path: Path):
    for spoken, text in zip(demo.SPEECH_TASKS, demo.TEXT_TASKS[:4], strict=True):
        prompts = {
            decode(spoken, reference.inputs, "inputs").strip()
            for reference in index(spoken, "train", tmp_path).references()
        }
        asked = [decode(text, r.inputs, "inputs") for r in index(text, "train", tmp_path).references()]
        if spoken == "demo_slots":
            prompts = {prompt.removeprefix("answer the question ") for prompt in prompts}
        assert all(any(prompt in one for one in asked) for prompt in prompts)


def test_spans_are_named_by_sentinels(corpus: Path, tmp_path: Path):
    pieces = seqio.TaskRegistry.get(demo.SPANS_TASK).output_features["inputs"].vocabulary
    sentinels = set(pieces.encode("".join(vocabulary.SENTINELS)))
    references = list(index(demo.SPANS_TASK, "train", tmp_path).references())
    assert len(references) == len(records(corpus, "text_train"))
    assert all(sentinels & set(reference.inputs.tolist()) for reference in references)


def test_mixtures_hold_their_tasks(corpus: Path):
    names = {
        name: {task.name for task in seqio.MixtureRegistry.get(name).tasks}
        for name in ("demo_speech", "demo_scored", "demo_adapter", "demo_text")
    }
    assert names["demo_speech"] == set(demo.SPEECH_TASKS)
    assert names["demo_scored"] == {*demo.SPEECH_TASKS, *demo.NAMES_TASKS}
    assert names["demo_adapter"] == set(demo.ADAPTER_TASKS)
    assert names["demo_text"] == {*TEXT_TASKS, demo.SPANS_TASK}


def test_registering_again_changes_nothing_and_another_corpus_is_refused(corpus: Path, tmp_path: Path):
    assert demo.register(corpus) == "demo_speech"
    with pytest.raises(UserError, match=r"slm demo --to"):
        demo.register(tmp_path)
    (tmp_path / "copy").symlink_to(corpus)
    with pytest.raises(UserError, match="is taken by another"):
        demo.register(tmp_path / "copy")
