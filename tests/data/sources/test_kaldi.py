"""Kaldi data directories."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from slm_jax.data import durations
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import KaldiSource
from slm_jax.errors import UserError


def write(folder: Path, **files: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_recordings_as_utterances(tmp_path: Path, clips, check_audio):
    folder = write(
        tmp_path / "data",
        wav_scp=[f"{clip.name} {clip.path}" for clip in clips],
        text=[f"{clip.name} {clip.text}" for clip in clips],
        utt2spk=[f"{clip.name} speaker-{i % 3}" for i, clip in enumerate(clips)],
        utt2lang=[f"{clip.name} de" for clip in clips[::2]],
    )
    source = KaldiSource({"train": folder}, language="en")
    check_audio(source, {clip.name: clip.samples for clip in clips})
    columns = source.columns("train")
    assert columns["text"].tolist() == [clip.text for clip in clips]
    assert columns["speaker"].tolist() == [f"speaker-{i % 3}" for i in range(len(clips))]
    assert columns["language"].tolist() == ["de", "en"] * (len(clips) // 2)


@pytest.mark.parametrize("file", ["utt2dur", "reco2dur"])
def test_durations_that_are_written(tmp_path: Path, clips, check_audio, file: str, monkeypatch):
    folder = write(
        tmp_path / "data",
        wav_scp=[f"{clip.name} ../clips/{clip.path.name}" for clip in clips],
        text=[f"{clip.name} x" for clip in clips],
        **{file: [f"{clip.name} {clip.seconds:.4f}" for clip in clips]},
    )
    monkeypatch.setattr(durations, "count_samples", None)
    check_audio(KaldiSource({"train": folder}), {clip.name: clip.samples for clip in clips})


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"utt2dur": ["a 0.1"]},
        {"reco2dur": ["a 0.1"]},
        {"segments": ["a a 0 0.1", "b b 0.05 -1"], "utt2dur": ["a 0.1", "b 0.1"]},
    ],
)
def test_the_fingerprint_sees_what_headers_say(tmp_path: Path, files: dict[str, list[str]]):
    source = KaldiSource({"train": write(tmp_path, wav_scp=["a a.wav", "b b.wav"], **files)})
    before = source.content_fingerprint("train")
    for samples in (1_600, 3_200):
        soundfile.write(tmp_path / "b.wav", np.zeros(samples, np.int16), 16_000)
        assert before != (before := source.content_fingerprint("train"))
    assert before == source.content_fingerprint("train")


def test_the_fingerprint_of_lengths_that_are_written_reads_no_header(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(durations, "count_samples", None)
    directory = write(tmp_path, wav_scp=["a a.wav"], segments=["a a 0 0.1"])
    KaldiSource({"train": directory}).content_fingerprint("train")


def test_segments_are_stretches(tmp_path: Path, rng: np.random.Generator, load_all):
    waves = {name: rng.integers(-9_000, 9_000, 64_000).astype(np.int16) for name in ("r1", "r2")}
    for name, wave in waves.items():
        soundfile.write(tmp_path / f"{name}.flac", wave, 16_000)
    segments, expected = [], {}
    for i in range(20):
        name = f"r{rng.integers(1, 3)}"
        start, end = np.sort(rng.choice(6_400, 2, replace=False)).tolist()
        segments.append(f"{name}-{i:02d} {name} {start / 1600:.7g} {end / 1600:.7g}")
        expected[f"{name}-{i:02d}"] = waves[name][start * 10 : end * 10]
    segments.append("r2-99 r2 3.5 -1")
    expected["r2-99"] = waves["r2"][56_000:]
    folder = write(
        tmp_path / "data",
        wav_scp=["r1 ../r1.flac", "r2 ../r2.flac"],
        segments=sorted(segments),
        text=[f"{id_} said" for id_ in sorted(expected)],
    )
    loaded = load_all(KaldiSource({"train": folder}))
    assert loaded.keys() == expected.keys()
    for id_, (reference, samples) in loaded.items():
        np.testing.assert_array_equal(samples, expected[id_])
        assert reference.samples == len(samples)
    assert set(KaldiSource({"train": folder}).columns("train")["recording"]) == {"r1", "r2"}


def test_a_directory_in_a_bucket(clips):
    tf.io.gfile.makedirs("ram://kaldi/data")
    for name, text in (("wav.scp", "a a.wav\nb b.wav\n"), ("text", "b two\n"), ("utt2dur", "a 1\nb 2\n")):
        with tf.io.gfile.GFile(f"ram://kaldi/data/{name}", "w") as file:
            file.write(text)
    source = KaldiSource({"train": "ram://kaldi/data"})
    columns = source.columns("train")
    assert columns["text"].tolist() == ["", "two"]
    assert columns["samples"].tolist() == [16_000, 32_000]
    assert source.audio_root("train") == "ram://kaldi/data"


GOOD = {"wav_scp": ["a a.wav", "b b.wav"], "text": ["a x", "b y"], "utt2dur": ["a 1", "b 2"]}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"wav_scp": ["a sph2pipe -f wav a.sph |"]},
            "wav.scp, line 1: 'sph2pipe -f wav a.sph |' is a command",
        ),
        ({"wav_scp": ["a x.ark:17"]}, "line 1: 'x.ark:17' lies in a Kaldi archive"),
        ({"wav_scp": ["a"]}, "line 1: a path is missing"),
        ({"wav_scp": ["b b.wav", "a a.wav"]}, "wav.scp, line 2: 'a' comes before the line above"),
        ({"wav_scp": ["a a.wav", "a b.wav"]}, "line 2: 'a' stands twice"),
        ({"text": ["b y", "a x"]}, "text, line 2: 'a' comes before the line above"),
        ({"utt2dur": ["a one", "b 2"]}, "the duration of 'a' is 'one', expected seconds"),
        ({"segments": ["s c 0 1"]}, "segments, line 1: recording 'c' does not stand in"),
        ({"segments": ["s a 0"]}, "line 1: found 'a 0', expected a recording, its start and its end"),
        ({"segments": ["s a 2 1"]}, "line 1: from 2 s to 1 s, expected an end after the start"),
        ({"wav_scp": [""]}, "holds no utterances"),
    ],
)
def test_mistakes_in_a_directory(tmp_path: Path, files: dict[str, list[str]], sentence: str):
    folder = write(tmp_path / "data", **(GOOD | files))
    with pytest.raises(UserError, match=re.escape(sentence)):
        KaldiSource({"train": folder}).columns("train")


def test_directories_that_are_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"Kaldi directory .*data does not exist"):
        KaldiSource({"train": tmp_path / "data"}).columns("train")
    with pytest.raises(UserError, match=r"has no wav\.scp"):
        KaldiSource({"train": tmp_path}).columns("train")
