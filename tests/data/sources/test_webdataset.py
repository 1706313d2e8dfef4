"""Tar shards of WebDataset, against tarfile."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_jax.data.audio_files import count_samples, load_utterance
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.index import build_index
from slm_jax.data.prepare import prepare
from slm_jax.data.references import SPEECH, Reference
from slm_jax.data.sources import WebDatasetSource, shard_tables, webdataset
from slm_jax.errors import BadExample, UserError
from slm_jax.tasks.asr import register_asr


def tar_of(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def in_order(function: Any, jobs: Any) -> None:
    for job in jobs:
        function(job)


def members_of(clips: list[Any]) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for clip in clips:
        members[f"./some.dir/{clip.name}{clip.path.suffix}"] = clip.path.read_bytes()
        members[f"./some.dir/{clip.name}.txt"] = f"{clip.text}\n".encode()
        members[f"./some.dir/{clip.name}.json"] = json.dumps({"speaker": 3, "language": "en"}).encode()
        members[f"./some.dir/{clip.name}.npy"] = bytes(10)
    return members


@pytest.fixture
def shards(tmp_path: Path, clips) -> dict[str, Any]:
    """Two shards, and the samples of each example."""
    for i in range(2):
        (tmp_path / f"shard-{i:03d}.tar").write_bytes(tar_of(members_of(clips[i * 5 : i * 5 + 5])))
    return {f"shard-{i // 5:03d}/some.dir/{clip.name}": clip.samples for i, clip in enumerate(clips)}


@pytest.mark.parametrize("pattern", ["shard-{000..001}.tar", "shard-*.tar", "."])
def test_examples_of_shards(tmp_path: Path, clips, shards, check_audio, pattern: str):
    source = WebDatasetSource({"train": tmp_path / pattern})
    check_audio(source, shards)
    columns = source.columns("train")
    assert columns["text"].tolist() == [clip.text for clip in clips]
    assert columns["speaker"].tolist() == ["3"] * 10
    assert set(columns["language"]) == {"en"}


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path: Path, clips, check_audio, format_: int):
    folder = "d" * 90
    members = {}
    for clip in clips:
        members[f"{folder}/{clip.name}{clip.path.suffix}"] = clip.path.read_bytes()
        members[f"{folder}/{clip.name}.txt"] = b"x"
    (tmp_path / "a.tar").write_bytes(tar_of(members, format=format_))
    source = WebDatasetSource({"train": tmp_path / "a.tar"})
    check_audio(source, {f"a/{folder}/{clip.name}": clip.samples for clip in clips})


def test_shards_in_a_bucket(clips, check_audio):
    tf.io.gfile.makedirs("ram://wds")
    with tf.io.gfile.GFile("ram://wds/a.tar", "wb") as file:
        file.write(tar_of(members_of(clips)))
    source = WebDatasetSource({"train": "ram://wds/*.tar"})
    check_audio(source, {f"a/some.dir/{clip.name}": clip.samples for clip in clips})


def test_a_shard_is_passed_over_once(tmp_path: Path, shards, monkeypatch: pytest.MonkeyPatch, cache: Path):
    source = WebDatasetSource({"train": tmp_path / "shard-*.tar"})
    first = source.columns("train")
    scanned: list[str] = []
    members = webdataset.tar_members

    def counting(path: str) -> Any:
        scanned.append(path)
        return members(path)

    monkeypatch.setattr(webdataset, "tar_members", counting)
    again = WebDatasetSource({"train": tmp_path / "shard-*.tar"}).columns("train")
    assert {name: values.tolist() for name, values in again.items()} == {
        name: values.tolist() for name, values in first.items()
    }
    assert again["samples"].dtype == np.int32
    assert scanned == []
    assert len(list((cache / shard_tables.FOLDER).iterdir())) == 2
    before = source.content_fingerprint("train")
    path = tmp_path / "shard-001.tar"
    path.write_bytes(path.read_bytes() + bytes(10_240))
    assert source.content_fingerprint("train") != before
    source.columns("train")
    assert scanned == [str(path)]


def test_a_header_that_could_not_be_read_is_read_again(tmp_path: Path, clips, shards, unreadable):
    source = WebDatasetSource({"train": tmp_path / "shard-*.tar"})
    with unreadable():
        assert not source.columns("train")["samples"].any()
    assert source.columns("train")["samples"].tolist() == [count_samples(clip.path) for clip in clips]


def test_fields_and_durations_from_json(tmp_path: Path, clips):
    clip = clips[0]
    members = {
        "a.wav": clip.path.read_bytes(), "a.json": b'{"transcript": "one", "duration": 1.5, "id": "q"}',
        "b.wav": clip.path.read_bytes(), "b.json": b'{"transcript": "two"}', "b.prompt.txt": b"say",
        "c.txt": b"no audio",
    }  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    columns = {"transcript": "text", "prompt.txt": "prompt", "txt": "note"}
    found = WebDatasetSource({"train": tmp_path / "a.tar"}, columns=columns).columns("train")
    assert found["text"].tolist() == ["one", "two", ""]
    assert found["prompt"].tolist() == ["", "say", ""]
    assert found["note"].tolist() == ["", "", "no audio"]
    assert found["samples"].tolist() == [24_000, count_samples(clip.path), 0]
    assert found["audio"].tolist() == [str(tmp_path / "a.tar")] * 2 + [""]


def test_a_shard_that_breaks_off_has_examples_up_to_there(tmp_path: Path, clips, caplog):
    data = tar_of({clip.name + clip.path.suffix: clip.path.read_bytes() for clip in clips})
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        last = archive.getmembers()[-1]
    (tmp_path / "a.tar").write_bytes(data[: last.offset_data + last.size // 2])
    columns = WebDatasetSource({"train": tmp_path / "a.tar"}).columns("train")
    assert len(columns["id"]) == 10
    assert f"breaks off after {last.name}" in caplog.text
    assert np.abs(columns["samples"][:9] - [len(clip.samples) for clip in clips[:9]]).max() <= 2
    assert columns["samples"][9] == 0
    ids = np.array([SPEECH])
    cut = Reference("x", str(tmp_path / "a.tar"), 99, ids, ids, "t", "en", part=columns["part"][9])
    with pytest.raises(BadExample) as error:
        load_utterance(cut)
    assert error.value.reason == "truncated_part"


@pytest.mark.parametrize("suffix", ["txt", "json", "npy"])
def test_a_shard_that_breaks_off_in_a_text(tmp_path: Path, clips, caplog, suffix: str, vocabulary_path):
    data = tar_of(members_of(clips))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        cut = archive.getmember(f"./some.dir/{clips[7].name}.{suffix}")
    (tmp_path / "a.tar").write_bytes(data[: cut.offset_data + 1])
    source = WebDatasetSource({"train": tmp_path / "a.tar"}, language="en")
    for _ in range(2):
        caplog.clear()
        columns = source.columns("train")
        assert f"a.tar breaks off after {cut.name}" in caplog.text
        assert columns["id"].tolist() == [f"a/some.dir/{clip.name}" for clip in clips[:8]]
        assert not any(name.startswith("@") for name in columns)
    # What is cut and is not read does no harm.
    reasons = {} if suffix == "npy" else {"truncated_part": 1}
    register_asr("t", source=source, vocabulary=vocabulary_path, templates=("{speech}",))
    lengths = {"speech": 99_999, "inputs": 40, "targets": 400}
    assert build_index("t", "train", lengths, tmp_path / "index").report.rejected == reasons
    entry = prepare(source, "train", tmp_path / "to", in_order, max_bad_share=1)
    assert (entry.records, entry.rejected) == (8 - len(reasons), reasons)


def test_names_that_are_not_utf8(tmp_path: Path):
    members = {f"a{letter}.txt": b"x" for letter in ("\udcfe", "\udcff")}
    data = tar_of(members, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    (tmp_path / "a.tar").write_bytes(data)
    source = WebDatasetSource({"train": tmp_path / "a.tar"})
    assert [source.columns("train")["id"].tolist() for _ in range(2)] == [[r"a/a\xfe", r"a/a\xff"]] * 2


def test_a_text_alone_that_is_cut(tmp_path: Path):
    data = tar_of({"a.txt": b"whole", "b.txt": "ü".encode() * 600})
    (tmp_path / "a.tar").write_bytes(data[: 512 * 3 + 101])
    source = WebDatasetSource({"train": tmp_path / "a.tar"})
    assert source.columns("train")["reject"].tolist() == ["", "truncated_part"]
    entry = prepare(source, "train", tmp_path / "to", in_order, max_bad_share=1)
    assert (entry.records, entry.rejected) == (1, {"truncated_part": 1})


def test_mistakes(tmp_path: Path, clips):
    good = members_of(clips)
    (tmp_path / "a.tar").write_bytes(tar_of(good))
    (tmp_path / "gz.tar").write_bytes(gzip.compress(tar_of(good)))
    (tmp_path / "none.tar").write_bytes(b"")
    (tmp_path / "bare.tar").write_bytes(tar_of({"README": b"x"}))
    (tmp_path / "json.tar").write_bytes(tar_of({"a.json": b"[1]"}))
    (tmp_path / "text.tar").write_bytes(tar_of({"a.txt": b"\xff"}))
    (tmp_path / "half.tar").write_bytes(tar_of({"a.json": b'{"text": "a\\ud83d"}'}))
    (tmp_path / "word.tar").write_bytes(tar_of({"a.json": b'{"duration": "long"}'}))
    for name, columns, sentence in (
        ("b.tar", {}, "tar shard .*b.tar does not exist; did you mean"),
        ("gz.tar", {}, "tar shard .*gz.tar is no plain tar archive"),
        ("none.tar", {}, "tar shard .*none.tar (is no plain tar archive|holds no examples)"),
        ("bare.tar", {}, "tar shard .*bare.tar holds no examples"),
        ("json.tar", {}, "json.tar, member a.json: found list, expected an object"),
        ("text.tar", {}, "text.tar, member a.txt is not UTF-8 text"),
        ("half.tar", {}, "half.tar, member a.json: half a surrogate pair stands in it, expected Unicode"),
        ("word.tar", {}, "word.tar, example a: field 'duration' is 'long', expected a number"),
        ("a.tar", {"speeker": "text"}, "has no suffix or field 'speeker'; did you mean 'speaker'"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            WebDatasetSource({"train": tmp_path / name}, columns=columns).columns("train")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=re.escape("no tar shard matches")):
        WebDatasetSource({"train": tmp_path / "q*.tar"})
