"""Lengths from headers: those of the files, kept until a file changes."""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import soundfile

from slm_jax.data import durations
from slm_jax.data.audio_files import load_audio
from slm_jax.errors import BadExample


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator) -> tuple[list[tuple[str, str]], list[int]]:
    """Files of all kinds, with the lengths that soundfile tells."""
    wanted, lengths = [], []
    for i, suffix in enumerate(["wav", "flac", "ogg", "mp3"] * 3):
        path, rate = tmp_path / f"a{i}.{suffix}", int(rng.choice([8_000, 16_000, 44_100]))
        soundfile.write(path, 0.1 * rng.standard_normal(int(rng.integers(4_000, 20_000))), rate)
        wanted.append((str(path), ""))
        lengths.append(int(np.ceil(soundfile.info(path).frames * 16_000 / rate)))
    return wanted, lengths


def test_lengths_are_those_of_the_headers(corpus, tmp_path: Path):
    wanted, lengths = corpus
    found = durations.samples_of(wanted, tmp_path / "cache")
    assert found.dtype == np.int32
    assert found.tolist() == lengths
    for (path, _), samples in zip(wanted, lengths, strict=True):
        assert abs(len(load_audio(path)) - samples) <= 2


def test_a_second_look_opens_nothing(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, lengths = corpus
    durations.samples_of(wanted, tmp_path / "cache")
    opened: list[str] = []

    def count(path: str, part: str) -> int:
        opened.append(path)
        return 7

    monkeypatch.setattr(durations, "count_samples", count)
    assert durations.samples_of(wanted[::-1], tmp_path / "cache").tolist() == lengths[::-1]
    assert opened == []
    os.utime(wanted[2][0], ns=(1, 1))
    lengths[2] = 7
    assert durations.samples_of(wanted, tmp_path / "cache").tolist() == lengths
    assert opened == [wanted[2][0]]


def test_parts_have_lengths_of_their_own(tmp_path: Path, rng: np.random.Generator):
    path = tmp_path / "a.flac"
    soundfile.write(path, rng.integers(-9_000, 9_000, 32_000).astype(np.int16), 16_000)
    parts = ["", "t=0.5,1.5", "t=1.25", f"bytes=0,{path.stat().st_size}", "t=3,4", "bytes=1,9999999", "x=1"]
    found = durations.samples_of([(str(path), part) for part in parts], tmp_path / "cache")
    assert found.tolist() == [32_000, 16_000, 12_000, 32_000, 0, 0, 0]


def test_what_cannot_be_read_has_no_length(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "text.wav").write_text("this is no audio")
    wanted = [(str(tmp_path / name), "") for name in ("text.wav", "missing.wav")]
    with caplog.at_level(logging.INFO, durations.__name__):
        assert durations.samples_of(wanted, tmp_path / "cache").tolist() == [0, 0]
    assert "text.wav" in caplog.text
    assert "missing.wav" in caplog.text
    # A file that comes later is seen.
    soundfile.write(tmp_path / "missing.wav", np.zeros(160, np.int16), 16_000)
    assert durations.samples_of(wanted, tmp_path / "cache").tolist() == [0, 160]


def test_a_failure_is_not_kept(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, lengths = corpus

    def fail(path: str, part: str) -> int:
        raise BadExample("unreadable_audio", f"{path}: too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(durations, "count_samples", fail)
        assert not durations.samples_of(wanted, tmp_path / "cache").any()
    assert durations.samples_of(wanted, tmp_path / "cache").tolist() == lengths
    connection = sqlite3.connect(tmp_path / "cache" / durations.FILE_NAME)
    with contextlib.closing(connection), connection:
        connection.execute("UPDATE lengths SET samples = 0")
    assert durations.samples_of(wanted, tmp_path / "cache").tolist() == lengths


@pytest.mark.parametrize("harm", ["damaged", "a file"])
def test_a_cache_that_cannot_be_used_costs_only_time(corpus, tmp_path: Path, harm: str, caplog):
    wanted, lengths = corpus
    folder = tmp_path / "cache"
    if harm == "damaged":
        folder.mkdir()
        (folder / durations.FILE_NAME).write_bytes(b"no database " * 500)
    else:
        folder.write_text("")
    assert durations.samples_of(wanted, folder).tolist() == lengths
    assert "cannot be used" in caplog.text


def test_the_default_folder_is_the_environments(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, _ = corpus
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path / "mine"))
    durations.samples_of(wanted)
    with sqlite3.connect(tmp_path / "mine" / durations.FILE_NAME) as connection:
        assert connection.execute("SELECT COUNT(*) FROM lengths").fetchone() == (len(wanted),)
    connection.close()
