"""Building the corpus: the same bytes, whole or not at all."""

import dataclasses
import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from slm_jax.demo import corpus, names, sentences
from slm_jax.errors import UserError

TINY = corpus.preset("tiny")
QUESTION_KINDS = {text: kind for kind, text in sentences.QUESTIONS.items()}


def quiet(line: str) -> None:
    del line


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_the_same_parameters_give_the_same_bytes(tiny_corpus: Path, tmp_path: Path):
    again = corpus.build_corpus(tmp_path / "again", TINY, processes=2, report=lambda line: None)
    assert files(again) == files(tiny_corpus)
    _, different, missing = filecmp.cmpfiles(tiny_corpus, again, files(again), shallow=False)
    assert not different and not missing


def test_manifests_describe_the_audio(tiny_corpus: Path):
    for split in sentences.SPLITS:
        records = read(tiny_corpus / f"{split}.jsonl")
        assert len(records) == getattr(TINY, split)
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            samples, rate = soundfile.read(tiny_corpus / record["audio"], dtype="int16")
            assert rate == 16_000 and samples.ndim == 1
            assert record["duration"] == len(samples) / rate
            assert 1 < record["duration"] < 5
            level = 20 * np.log10(np.sqrt(np.mean((samples / 32768) ** 2)))
            # The root mean square of the whole is lower than that of the speech, by the silence around it.
            assert -36 < level < -17
            assert record["language"] == "en" and set(record["translations"]) == {"de", "es"}


def test_questions_and_slots_agree_with_the_sentence(tiny_corpus: Path):
    named = ("names_dev", "names_test", "text_names_train")
    records = [
        r
        for name in ("train", "dev", "test", "text_train", *named)
        for r in read(tiny_corpus / f"{name}.jsonl")
    ]
    for record in records:
        slots = dict(pair.split(": ") for pair in record["slots"].split("; "))
        assert all(f" {value} " in f" {record['text']} " for value in slots.values())
        assert record["answer"] == slots.get(QUESTION_KINDS[record["question"]], sentences.NO_ANSWER)


def test_a_phrase_list_holds_the_name_that_is_said_and_what_is_heard_is_near_it(tiny_corpus: Path):
    for name, split in (("names_dev", "dev"), ("names_test", "test"), ("text_names_train", "train")):
        records = read(tiny_corpus / f"{name}.jsonl")
        assert len(records) == (4 if name.startswith("names") else 2 * TINY.text)
        for record in records:
            phrases = record["phrases"].split(", ")
            (said,) = [phrase for phrase in phrases if f" {phrase} " in f" {record['text']} "]
            assert set(phrases) <= {said, *names.invented_names(split, 500)}
            words, heard = record["text"].split(), record["heard"].split()
            assert [w for w in words if w != said] == [
                h for h, w in zip(heard, words, strict=True) if w != said
            ]


def test_no_name_of_the_text_is_known_for_being_listed_and_not_said(tiny_corpus: Path):
    records = read(tiny_corpus / "text_names_train.jsonl")
    said = {dict(pair.split(": ") for pair in record["slots"].split("; "))["person"] for record in records}
    assert len(said) == len(records)
    assert {phrase for record in records for phrase in record["phrases"].split(", ")} == said


def test_splits_are_disjoint_and_text_covers_what_is_spoken(tiny_corpus: Path):
    texts = {path.stem: {r["text"] for r in read(path)} for path in tiny_corpus.glob("*.jsonl")}
    assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"]
    assert texts["train"] <= texts["text_train"]
    assert not texts["text_train"] & (texts["dev"] | texts["test"])
    assert len(texts["text_train"]) == TINY.text


def test_voices_of_dev_and_test_are_not_heard_in_training(rng: np.random.Generator):
    planned = {
        split: {
            corpus.plan_utterance("x", split, "x", f"{rng.integers(2**31)}").voice.name for _ in range(300)
        }
        for split in sentences.SPLITS
    }
    assert len(planned["train"]) > 30 and len(planned["dev"]) >= 3 and len(planned["test"]) >= 5
    assert not planned["train"] & (planned["dev"] | planned["test"])
    assert not planned["dev"] & planned["test"]


def test_noise_lies_below_the_speech_by_the_stated_ratio(rng: np.random.Generator):
    utterance = corpus.plan_utterance(
        "x", "train", "the lamp in the kitchen is red", str(rng.integers(2**31))
    )
    quiet = dataclasses.replace(utterance, level_db=-24.0, snr_db=90.0, silence=(0.2, 0.2))
    noisy = dataclasses.replace(quiet, snr_db=20.0)
    difference = (corpus.render(noisy).astype(float) - corpus.render(quiet)) / 32768
    assert abs(20 * np.log10(np.sqrt(np.mean(difference**2))) - (-44)) < 0.5


def test_a_complete_corpus_is_left_alone(tiny_corpus: Path):
    before = {name: (tiny_corpus / name).stat().st_mtime_ns for name in files(tiny_corpus)}
    lines: list[str] = []
    corpus.build_corpus(tiny_corpus, TINY, processes=1, report=lines.append)
    assert {name: (tiny_corpus / name).stat().st_mtime_ns for name in files(tiny_corpus)} == before
    assert len(lines) == 1 and "complete" in lines[0]


def test_an_interrupted_build_goes_on(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    render, spoken = corpus.render, []

    def interrupted(utterance: corpus.Utterance) -> np.ndarray:
        if len(spoken) == 20:
            raise KeyboardInterrupt
        spoken.append(utterance.path)
        return render(utterance)

    monkeypatch.setattr(corpus, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.build_corpus(tmp_path / "corpus", TINY, processes=1, report=quiet)
    assert not (tmp_path / "corpus").exists()
    monkeypatch.setattr(
        corpus, "render", lambda utterance: spoken.append(utterance.path) or render(utterance)
    )
    corpus.build_corpus(tmp_path / "corpus", TINY, processes=1, report=quiet)
    assert len(spoken) == len(set(spoken)) == 44
    assert files(tmp_path / "corpus") == files(tiny_corpus)
    _, different, _ = filecmp.cmpfiles(tiny_corpus, tmp_path / "corpus", files(tiny_corpus), shallow=False)
    assert not different
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_what_is_there_is_not_overwritten(tiny_corpus: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"train 24 \(asked for 25\)"):
        corpus.build_corpus(tiny_corpus, dataclasses.replace(TINY, train=25))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no demonstration corpus"):
        corpus.build_corpus(tmp_path, TINY)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_wrong_sizes_and_presets_are_named():
    with pytest.raises(UserError, match="dev is 0"):
        corpus.CorpusConfig(dev=0)
    with pytest.raises(UserError, match="text is 10"):
        corpus.CorpusConfig(train=20, text=10)
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        corpus.preset("tinny")


def test_progress_tells_the_rate(tmp_path: Path):
    lines: list[str] = []
    config = corpus.CorpusConfig(train=1, dev=1, test=1, names=1, text=1)
    corpus.build_corpus(tmp_path / "corpus", config, processes=1, report=lines.append)
    assert "5/5 utterances" in lines[-1] and "x real time" in lines[-1]


def test_only_training_is_warped_and_keeps_the_tempo(rng: np.random.Generator):
    keys = [str(rng.integers(2**31)) for _ in range(100)]
    assert {
        corpus.plan_utterance("x", split, "x", key).warp for split in ("dev", "test") for key in keys
    } == {1}
    planned = [corpus.plan_utterance("x", "train", "x", key) for key in keys]
    assert min(u.warp for u in planned) < 0.9 and max(u.warp for u in planned) > 1.1
    assert all(144 < u.warp * u.voice.speed < 196 for u in planned)
