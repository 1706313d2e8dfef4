"""Audio inside other files is the audio of the files that went in."""

import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from slm_jax import storage
from slm_jax.data import containers, parts
from slm_jax.data.audio_files import count_samples, decode, load_audio, load_utterance
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import BadExample, RemoteError

FORMATS = {
    "wav": {}, "flac": {}, "ogg": {}, "mp3": {}, "opus": {"format": "OGG", "subtype": "OPUS"},
}  # fmt: skip
GFile = tf.io.gfile.GFile


def reference(path: Any, part: str, samples: int) -> Reference:
    return Reference("a", str(path), samples, np.array([SPEECH]), np.array([1]), "t", "en", part=part)


def reason_of(call: Callable[[], Any]) -> str:
    with pytest.raises(BadExample) as error:
        call()
    return error.value.reason


@pytest.fixture
def clips(tmp_path: Path, rng: np.random.Generator) -> dict[str, Path]:
    """An audio file of each format, of 1 to 3 s."""
    found = {}
    for suffix, options in FORMATS.items():
        found[suffix] = tmp_path / f"clip.{suffix}"
        wave = 0.1 * rng.standard_normal(int(rng.integers(16_000, 48_000)))
        soundfile.write(found[suffix], wave, 16_000, **options)
    return found


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on disk, and one in TensorFlow's file system in memory."""
    if request.param == "local":
        yield str(tmp_path)
    else:
        name = f"ram://{abs(hash(request.node.name))}"
        tf.io.gfile.makedirs(name)
        yield name
        tf.io.gfile.rmtree(name)


def put(folder: str, name: str, data: bytes) -> str:
    with GFile(f"{folder}/{name}", "wb") as file:
        file.write(data)
    return f"{folder}/{name}"


def tar_of(clips: dict[str, Path]) -> tuple[bytes, dict[str, str]]:
    """A tar archive of files, and the part of each as tarfile places it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in clips.values():
            archive.add(path, path.name)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        places = {info.name: parts.byte_range(info.offset_data, info.size) for info in archive}
    return buffer.getvalue(), {suffix: places[path.name] for suffix, path in clips.items()}


def parquet_of(clips: dict[str, Path], **options: Any) -> bytes:
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in clips.values()]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"clip & co": rows, "n": list(range(len(rows)))}), buffer, **options)
    return buffer.getvalue()


def test_members_of_a_tar_archive(folder: str, clips: dict[str, Path]):
    data, places = tar_of(clips)
    path = put(folder, "clips.tar", data)
    for suffix, clip in clips.items():
        np.testing.assert_array_equal(load_audio(path, part=places[suffix]), load_audio(clip))
        assert count_samples(path, places[suffix]) == count_samples(clip)
        samples = len(load_audio(clip))
        np.testing.assert_array_equal(
            load_utterance(reference(path, places[suffix], samples)).samples, load_audio(clip)
        )


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_rows_of_a_parquet_file(folder: str, clips: dict[str, Path], rows: int):
    path = put(folder, "clips.parquet", parquet_of(clips, row_group_size=rows))
    for row, clip in enumerate(clips.values()):
        part = parts.parquet_row(row, "clip & co")
        np.testing.assert_array_equal(load_audio(path, part=part), load_audio(clip))
        assert count_samples(path, part) == count_samples(clip)


def test_whole_remote_files(folder: str, clips: dict[str, Path]):
    for clip in clips.values():
        path = put(folder, f"again-{clip.name}", clip.read_bytes())
        np.testing.assert_array_equal(load_audio(path), load_audio(clip))
        assert count_samples(path) == count_samples(clip)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("inside", ["file", "tar"])
def test_a_stretch_is_that_stretch(folder: str, clips, suffix: str, inside: str, rng):
    whole = load_audio(clips[suffix])
    if inside == "tar":
        data, places = tar_of(clips)
        path, first = put(folder, "clips.tar", data), [places[suffix]]
    else:
        path, first = put(folder, f"b.{suffix}", clips[suffix].read_bytes()), []
    for _ in range(5):
        start, end = np.sort(rng.choice(len(whole), 2, replace=False)).tolist()
        part = "&".join([*first, parts.seconds(start / 16_000, end / 16_000)])
        # Opus predicts over frames: what comes before the stretch counts for a while.
        tolerance = {"mp3": 1, "opus": 32}.get(suffix, 0)
        np.testing.assert_allclose(load_audio(path, part=part), whole[start:end], atol=tolerance)
        assert count_samples(path, part) == end - start
    part = "&".join([*first, parts.seconds(0.5)])
    assert count_samples(path, part) == len(whole) - 8_000


def test_only_the_stretch_is_decoded(tmp_path: Path, rng, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "long.flac"
    wave = rng.integers(-9_000, 9_000, 16_000 * 60).astype(np.int16)
    soundfile.write(path, wave, 16_000)
    decoded: list[int] = []
    read = soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int = -1, *args: Any, **options: Any) -> np.ndarray:
        found = read(self, frames, *args, **options)
        decoded.append(len(found))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    audio = load_utterance(reference(path, "t=40,42.5", 40_000))
    np.testing.assert_array_equal(audio.samples, wave[640_000:680_000])
    assert sum(decoded) == 40_000


def test_little_of_a_remote_file_is_read_for_a_stretch(rng, monkeypatch: pytest.MonkeyPatch):
    folder = "ram://stretch"
    tf.io.gfile.makedirs(folder)
    buffer = io.BytesIO()
    wave = rng.integers(-9_000, 9_000, 16_000 * 300).astype(np.int16)
    soundfile.write(buffer, wave, 16_000, format="WAV")
    path = put(folder, "long.wav", buffer.getvalue())
    lengths: list[int] = []
    read_at = storage.SharedFile.read_at

    def counting(self: storage.SharedFile, offset: int, length: int) -> bytes:
        lengths.append(length)
        return read_at(self, offset, length)

    monkeypatch.setattr(storage.SharedFile, "read_at", counting)
    np.testing.assert_array_equal(load_audio(path, part="t=200,201"), wave[3_200_000:3_216_000])
    assert sum(lengths) < len(buffer.getvalue()) / 3


def test_the_rules_of_durations_hold_for_the_part(tmp_path: Path, rng: np.random.Generator):
    path = tmp_path / "a.wav"
    soundfile.write(path, rng.integers(-9_000, 9_000, 32_000).astype(np.int16), 16_000)
    assert load_utterance(reference(path, "t=0.5,1.5", 16_000)).trimmed == 0
    assert load_utterance(reference(path, "t=0.5,1.505", 16_000)).trimmed == 80
    long = reason_of(lambda: load_utterance(reference(path, "t=0.5,1.6", 16_000)))
    short = reason_of(lambda: load_utterance(reference(path, "t=1.5,3", 24_000)))
    assert (long, short) == ("longer_than_reference", "shorter_than_reference")
    assert reason_of(lambda: decode(path, 15_999, "t=0.5,1.5")) == "too_long"


def test_what_is_not_in_a_container_has_a_reason(tmp_path: Path, clips: dict[str, Path]):
    data, places = tar_of(clips)
    offset, length = map(int, places["flac"].removeprefix("bytes=").split(","))
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    whole.write_bytes(data)
    cut.write_bytes(data[: offset + length // 2])
    parquet, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_bytes(parquet_of(clips))
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": "x.wav"}, {"bytes": b"no audio"}]}), other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    for path, part, expected in (
        (cut, places["flac"], "truncated_part"),
        (cut, places["opus"], "missing_part"),
        (whole, "bytes=0,0", "empty_audio"),
        (whole, "bytes=7", "bad_part"),
        (whole, "byte=7,8", "bad_part"),
        (whole, "bytes=7,8&row=1", "bad_part"),
        (whole, "bytes=7,8&column=a", "bad_part"),
        (tmp_path / "no.tar", places["flac"], "missing_file"),
        (parquet, "row=5&column=clip %26 co", "missing_part"),
        (parquet, "row=0&column=audio", "missing_part"),
        (parquet, "row=0&column=n", "missing_part"),
        (parquet, "row=x&column=n", "bad_part"),
        (other, "row=0&column=audio", "missing_part"),
        (other, "row=1&column=audio", "unreadable_audio"),
        (broken, "row=1&column=audio", "damaged_container"),
        (tmp_path / "no.parquet", "row=1&column=audio", "missing_file"),
        (clips["wav"], "t=3.1,4", "past_the_end"),
        (clips["mp3"], "t=4", "past_the_end"),
    ):
        assert reason_of(lambda p=path, q=part: load_audio(p, part=q)) == expected, (path.name, part)
        assert reason_of(lambda p=path, q=part: count_samples(p, q)) == expected, (path.name, part)
    half = f"bytes={offset},{length // 2}"
    assert reason_of(lambda: load_audio(whole, part=half)) == "unreadable_audio"
    assert count_samples(whole, half) == count_samples(clips["flac"])


def test_a_remote_file_that_stays_away_is_no_bad_example(clips, monkeypatch: pytest.MonkeyPatch, capfd):
    folder = "ram://away"
    tf.io.gfile.makedirs(folder)
    data, places = tar_of(clips)
    tar, wav = put(folder, "clips.tar", data), put(folder, "a.wav", clips["wav"].read_bytes())
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.0)
    calls = [
        lambda: load_audio(tar, part=places["flac"]),
        lambda: count_samples(tar, places["flac"]),
        lambda: load_audio(tar, part=f"{places['flac']}&t=0.5,0.7"),
        lambda: load_audio(wav),
        lambda: load_audio(wav, part="t=0.5,0.7"),
        lambda: count_samples(wav),
    ]

    attempts: list[int] = []

    def away(self: storage.SharedFile, *unused: int) -> bytes:
        attempts.append(1)
        raise tf.errors.UnavailableError(None, None, "the network is down")

    def gone(path: str) -> bytes:
        attempts.append(1)
        raise tf.errors.UnavailableError(None, None, "the network is down")

    monkeypatch.setattr(storage.SharedFile, "_read_remote", away)
    monkeypatch.setattr(storage, "_remote_open", gone)
    for call in calls:
        attempts.clear()
        with pytest.raises(RemoteError, match=r"cannot read ram://away/.* attempts: the network is down"):
            call()
        # However often a decoder asks.
        assert len(attempts) == storage.ATTEMPTS
    assert "Traceback" not in capfd.readouterr().err


def test_a_container_that_was_replaced_is_read_anew(tmp_path: Path, rng: np.random.Generator):
    path = tmp_path / "a.tar"
    for _ in range(2):
        clip = tmp_path / "clip.wav"
        soundfile.write(
            clip, rng.integers(-9_000, 9_000, int(rng.integers(900, 9_000))).astype(np.int16), 16_000
        )
        data, places = tar_of({"wav": clip})
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        np.testing.assert_array_equal(load_audio(path, part=places["wav"]), load_audio(clip))


def test_threads_share_containers(tmp_path: Path, clips: dict[str, Path], rng, monkeypatch):
    monkeypatch.setattr(containers._ROW_GROUPS, "_capacity", 1)
    data, places = tar_of(clips)
    tar, parquet = tmp_path / "a.tar", tmp_path / "a.parquet"
    tar.write_bytes(data)
    parquet.write_bytes(parquet_of(clips, row_group_size=1))
    expected = {suffix: load_audio(clip) for suffix, clip in clips.items()}

    def load(pick: int) -> None:
        suffix = list(clips)[pick % len(clips)]
        row = parts.parquet_row(pick % len(clips), "clip & co")
        np.testing.assert_array_equal(load_audio(tar, part=places[suffix]), expected[suffix])
        np.testing.assert_array_equal(load_audio(parquet, part=row), expected[suffix])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, rng.integers(0, 100, 60).tolist()))
    assert len(containers._ROW_GROUPS) <= len(clips)
