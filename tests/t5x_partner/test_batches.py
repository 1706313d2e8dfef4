"""Rows that T5X reads, against slm_jax's own batch of the same examples; T5X itself is not needed."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import soundfile

from slm_jax.data.audio_files import load_utterance
from slm_jax.data.batch import BatchShape, Placed, collate
from slm_jax.data.index import build_index
from slm_jax.demo import foundation
from slm_jax.errors import UserError
from slm_jax.t5x_partner.batches import BadShare, SpeechFeatureConverter, array_dtypes
from slm_jax.t5x_partner.tasks import for_t5x
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.registration import register_mixture

LENGTHS = {"speech": 9000, "inputs": 24, "targets": 20}
SHAPE = BatchShape.from_feature_lengths(LENGTHS, rows=1, samples_per_position=2560)
COUNT = 6


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator, clean_registries) -> Path:
    """Two speech tasks, of which one has its manifest elsewhere, and a mixture of both."""
    for task in ("one", "two"):
        folder = tmp_path / task
        (folder / "audio").mkdir(parents=True)
        lines = []
        for number in range(COUNT):
            samples = rng.integers(-3000, 3000, int(rng.integers(3000, LENGTHS["speech"])), np.int16)
            soundfile.write(folder / "audio" / f"{number}.wav", samples, 16_000)
            text = " ".join(rng.choice(["the", "train", "leaves", "at", "nine"], 4))
            seconds = len(samples) / 16_000
            lines.append(
                {"audio": f"audio/{number}.wav", "duration": seconds, "language": "en", "text": text}
            )
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def register(corpus: Path, *tasks: str) -> None:
    vocabulary = str(Path(foundation.directory()) / "text.model")
    for task in tasks:
        register_asr(task, manifests={"train": corpus / task / "train.jsonl"}, vocabulary=vocabulary)


def converter(**settings: Any) -> SpeechFeatureConverter:
    return SpeechFeatureConverter(feature_lengths=LENGTHS, samples_per_position=2560, **settings)


def rows_of(
    name: str, lengths: Any = None, seed: int | None = None, **settings: Any
) -> list[dict[str, np.ndarray]]:
    dataset = seqio.get_dataset(
        name,
        lengths or LENGTHS,
        converter(**settings),
        "train",
        num_epochs=1,
        seed=seed,
        trim_output_features=False,
    )
    return list(dataset.as_numpy_iterator())


def own_rows(task: str, cache: Path) -> list[dict[str, np.ndarray]]:
    table = build_index(task, "train", LENGTHS, cache)
    batches = [
        collate([[Placed(reference)]], SHAPE, lambda reference: load_utterance(reference).samples)
        for reference in table.references()
    ]
    return [{name: array[0] for name, array in batch.items()} for batch in batches]


def same(row: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> bool:
    assert row.keys() == own.keys()
    return all(row[name].dtype == own[name].dtype and np.array_equal(row[name], own[name]) for name in own)


def test_rows_of_a_task_are_those_of_slm_jax(corpus, tmp_path):
    register(corpus, "one")
    rows, own = rows_of(for_t5x("one")), own_rows("one", tmp_path / "cache")
    assert len(rows) == COUNT and rows[0]["speech"].any()
    assert all(same(*pair) for pair in zip(rows, own, strict=True))
    assert all(array_dtypes()[name] == array.dtype for name, array in rows[0].items())


def test_rows_of_a_mixture_come_from_both_corpora(corpus, tmp_path):
    register(corpus, "one", "two")
    name = for_t5x("both", [functools.partial(register_mixture, "both", {"one": 1.0, "two": 3.0})])
    assert name == for_t5x("both")
    mixture = seqio.MixtureRegistry.get(name)
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {"one_t5x": 1.0, "two_t5x": 3.0}
    own = {task: own_rows(task, tmp_path / "cache") for task in ("one", "two")}
    rows = rows_of(name, seed=3)
    assert all(any(same(row, one) for one in own["one"] + own["two"]) for row in rows)
    # In SeqIO's own order of the plain mixture.
    plain = seqio.MixtureRegistry.get("both").get_dataset(None, "train", num_epochs=1, shuffle=False, seed=3)
    targets = [example["targets"] for example in plain.as_numpy_iterator()]
    assert len(rows) == len(targets) > COUNT
    for row, expected in zip(rows, targets, strict=True):
        np.testing.assert_array_equal(row["targets"][: len(expected)], expected)


def test_lengths_that_a_dataset_does_not_say_are_the_converters(corpus):
    register(corpus, "one")
    # What SeqIO's evaluator finds: the longest of each feature that has tokens.
    row = rows_of(for_t5x("one"), {"inputs": 21, "targets": 17})[0]
    assert {name: row[name].shape[-1] for name in ("speech", "inputs", "targets")} == {
        "speech": 10_240,
        "inputs": 21,
        "targets": 17,
    }


def test_an_example_that_cannot_be_used_leaves_its_row_empty(corpus, caplog):
    register(corpus, "one")
    (corpus / "one" / "audio" / "2.wav").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        rows = rows_of(for_t5x("one"))
    assert [bool(row["loss_weights"].any()) for row in rows] == [True, True, False, True, True, True]
    assert not rows[2]["speech_segments"].any() and (rows[2]["layout"] == -1).all()
    assert "empty_audio" in caplog.text and "one/" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not any(row["loss_weights"].any() for row in rows_of(for_t5x("one"), {"targets": 1}))
    assert caplog.text.count("targets_too_long") == COUNT


def test_too_many_of_them_stop_the_reading():
    lenient, strict = BadShare(0.06), BadShare(0.05)
    for number in range(99):
        for share in (lenient, strict):
            if number % 17 == 0:
                share.add(f"task/{number}", "empty_audio")
            share.seen()
    lenient.seen()
    with pytest.raises(
        UserError, match=r"6 of 100 examples cannot be used, .* at most 0\.05 .*max_bad_share"
    ):
        strict.seen()


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("one", {}, "no id|no task, .*for_t5x"),
        ("one_t5x", {"pack": True}, "DatasetConfig.pack is True, expected False"),
    ],
)
def test_what_cannot_be_read_is_refused(corpus, name, settings, sentence):
    register(corpus, "one")
    for_t5x("one")
    with pytest.raises(UserError, match=sentence):
        rows_of(name, **settings)


def test_a_mistyped_name_is_answered_with_the_nearest(corpus):
    register(corpus, "one")
    with pytest.raises(UserError, match="no task or mixture 'oen' is registered; did you mean 'one'"):
        for_t5x("oen")


def test_rows_of_text_alone_are_those_of_slm_jax(tmp_path, monkeypatch, clean_registries):
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"id": "a", "text": "the train", "language": "en"}) + "\n"
    )
    vocabulary = str(Path(foundation.directory()) / "text.model")
    manifests = {"train": tmp_path / "text.jsonl"}
    register_asr("text", manifests=manifests, vocabulary=vocabulary, text_only=True)
    lengths = {"inputs": 24, "targets": 20}
    monkeypatch.setitem(globals(), "LENGTHS", lengths)
    shape = BatchShape.from_feature_lengths(lengths, rows=1, samples_per_position=2560)
    monkeypatch.setitem(globals(), "SHAPE", shape)
    (row,), (own,) = rows_of(for_t5x("text")), own_rows("text", tmp_path / "cache")
    assert same(row, own) and row["inputs_said"].any()
