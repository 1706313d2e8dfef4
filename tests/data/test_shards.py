"""Speech shards: what is written comes back bit for bit, and what is out of step is found."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import shards
from slm_jax.data.audio_files import count_samples, load_utterance
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.references import Reference
from slm_jax.data.shards import Record, ShardEntry, SplitEntry
from slm_jax.data.sources import ShardSource
from slm_jax.errors import BadExample, UserError


def speech(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-32768, 32768, int(rng.integers(1, 6_000))).astype(np.int16)


def audio_record(name: str, samples: np.ndarray, codec: str = "flac", **fields: str) -> Record:
    return Record(name, "audio", len(samples), fields, shards.encode_speech(samples, codec), codec)


def write(directory: str, *groups: list[Record]) -> list[ShardEntry]:
    """Writes a split `train` of one shard a group, and the description."""
    entries = [
        shards.write_shard(directory, shards.shard_name("train", k, len(groups)), group)
        for k, group in enumerate(groups)
    ]
    shards.write_description(directory, {"train": SplitEntry("audio", "flac", {}, entries)})
    return entries


def references(source: ShardSource, split: str = "train") -> list[Reference]:
    columns, nothing = source.columns(split), np.zeros(0, np.int32)
    root = source.audio_root(split)
    return [
        Reference(id_, f"{root}/{audio}", int(samples), nothing, nothing, "t", language, part=part)
        for id_, audio, samples, language, part in zip(
            *(columns[name] for name in ("id", "audio", "samples", "language", "part")), strict=True
        )
    ]


@pytest.mark.parametrize("codec", shards.CODECS)
def test_speech_comes_back_bit_for_bit(tmp_path: Path, rng: np.random.Generator, codec: str):
    waves = [speech(rng) for _ in range(9)]
    records = [
        audio_record(f"u{i}", wave, codec, language="en", text=f"t{i}") for i, wave in enumerate(waves)
    ]
    write(str(tmp_path), records[:4], records[4:])
    found = references(ShardSource(tmp_path))
    assert [reference.id for reference in found] == [f"u{i}" for i in range(9)]
    for i in rng.permutation(9):
        np.testing.assert_array_equal(load_utterance(found[i]).samples, waves[i])
        assert count_samples(str(found[i].audio), found[i].part) == len(waves[i]) == found[i].samples


def test_threads_read_one_shard_at_the_same_time(tmp_path: Path, rng: np.random.Generator):
    waves = [speech(rng) for _ in range(40)]
    write(str(tmp_path), [audio_record(f"u{i}", wave) for i, wave in enumerate(waves)])
    found = references(ShardSource(tmp_path))
    asked = rng.integers(0, 40, 2_000).tolist()
    with ThreadPoolExecutor(8) as threads:
        for i, audio in zip(asked, threads.map(lambda i: load_utterance(found[i]), asked), strict=True):
            np.testing.assert_array_equal(audio.samples, waves[i])


@settings(max_examples=50, deadline=None)
@given(
    st.text(),
    st.dictionaries(st.text(), st.text()),
    st.binary(),
    st.lists(st.integers(0, 2**31), max_size=3),
)
def test_a_record_is_a_map_that_others_can_read(name, fields, data, shape):
    record = Record(name, "frames", 7, fields, data, "bfloat16", tuple(shape))
    assert Record.from_bytes(record.to_bytes()) == record
    backwards = Record(name, "frames", 7, dict(reversed(fields.items())), data, "bfloat16", tuple(shape))
    assert backwards.to_bytes() == record.to_bytes()


@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x80"])
def test_what_is_no_record_is_said(packed: bytes):
    with pytest.raises(ValueError, match="no record of a speech shard"):
        Record.from_bytes(packed)


def test_equal_records_give_equal_files(tmp_path: Path, rng: np.random.Generator):
    records = [audio_record(f"u{i}", speech(rng), text=str(i)) for i in range(20)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(str(tmp_path / name), records[:11], records[11:])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(
        ["shards.json"]
        + [f"train-0000{k}-of-00002.{end}" for k in (0, 1) for end in ("array_record", "parquet")]
    )
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_index_is_enough_to_plan(tmp_path: Path, rng: np.random.Generator):
    waves = [speech(rng) for _ in range(3)]
    write(
        str(tmp_path),
        [
            audio_record("a", waves[0], language="en", text="one"),
            Record("b", "text", 0, {"text": "two", "topic": "x"}),
            audio_record("c", waves[1], **{"translations.de": "drei"}),
        ],
        [],
        [audio_record("d", waves[2], question="what?")],
    )
    source = ShardSource(tmp_path)
    for path in tmp_path.glob("*.array_record"):
        size = path.stat().st_size
        path.write_bytes(b"\0" * size)
    columns = source.columns("train")
    assert columns["id"].tolist() == ["a", "b", "c", "d"]
    assert columns["samples"].tolist() == [len(waves[0]), 0, len(waves[1]), len(waves[2])]
    assert columns["samples"].dtype == np.int32
    assert columns["text"].tolist() == ["one", "two", "", ""]
    assert columns["topic"].tolist() == ["", "x", "", ""]
    assert columns["question"].tolist() == ["", "", "", "what?"]
    assert columns["translations.de"].tolist() == ["", "", "drei", ""]
    assert columns["audio"].tolist() == [
        "train-00000-of-00003.array_record", "", "train-00000-of-00003.array_record",
        "train-00002-of-00003.array_record",
    ]  # fmt: skip
    assert [part.partition("&")[0] for part in columns["part"]] == ["record=0", "", "record=2", "record=0"]
    assert source.num_input_examples("train") == 4
    rows = list(source.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert [row["id"] for row in rows] == [b"a", b"b", b"c", b"d"]


def test_the_fingerprint_follows_the_contents_and_not_the_place(tmp_path: Path, rng: np.random.Generator):
    wave = speech(rng)
    changed = wave.copy()
    changed[0] ^= 1
    fingerprints = []
    for name, record in (
        ("a", audio_record("u", wave, text="x")),
        ("b", audio_record("u", wave, text="x")),
        ("c", audio_record("u", wave, text="y")),
        ("d", audio_record("u", changed, text="x")),
    ):
        (tmp_path / name).mkdir()
        write(str(tmp_path / name), [record])
        fingerprints.append(ShardSource(tmp_path / name).content_fingerprint("train"))
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_frames_lie_in_shards_as_speech_does(tmp_path: Path, rng: np.random.Generator):
    frames_PD = rng.integers(0, 255, (5, 12)).astype(np.int8)
    record = Record("u", "frames", 3_000, {"text": "x"}, frames_PD.tobytes(), "int8", frames_PD.shape)
    write(str(tmp_path), [record])
    (found,) = references(ShardSource(tmp_path))
    assert found.samples == 3_000
    read = shards.read_record(str(found.audio), 0, found.part.rpartition("=")[2])
    np.testing.assert_array_equal(np.frombuffer(read.data, read.encoding).reshape(read.shape), frames_PD)
    with pytest.raises(BadExample, match="holds frames, expected audio") as error:
        load_utterance(found)
    assert error.value.reason == "missing_part"


def test_shards_in_a_bucket(tmp_path: Path, rng: np.random.Generator):
    wave = speech(rng)
    folder = f"ram://{tmp_path.name}/shards"
    shards.storage.make_folder(folder)
    write(folder, [audio_record("a", wave), audio_record("b", wave[::-1].copy())])
    found = references(ShardSource(folder))
    np.testing.assert_array_equal(load_utterance(found[1]).samples, wave[::-1])
    assert sorted(tf.io.gfile.listdir(folder))[0] == "shards.json"


# ---- out of step


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two shards of three records."""
    records = [audio_record(f"u{i}", speech(rng), text=str(i)) for i in range(6)]
    write(str(tmp_path), records[:3], records[3:])
    return tmp_path


def first(folder: Path, end: str) -> Path:
    return folder / f"train-00000-of-00002.{end}"


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ShardSource(folder).columns("train")


def test_a_directory_that_was_not_finished(folder: Path):
    (folder / "shards.json").unlink()
    refused(
        folder, r"has shards and no shards.json: they are unfinished; run slm data prepare or encode again"
    )


def test_a_directory_of_something_else(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    refused(tmp_path / "corpus", "corpus has no shards.json, expected a directory of speech shards")
    refused(tmp_path / "corpsu", r"corpsu does not exist; did you mean 'corpus'\?")
    (tmp_path / "corpus/shards.json").write_text("{")
    refused(tmp_path / "corpus", "shards.json cannot be read: ")
    (tmp_path / "corpus/shards.json").write_text("[]")
    refused(tmp_path / "corpus", 'does not describe speech shards: expected "format"')


def test_a_later_version(folder: Path):
    described = json.loads((folder / "shards.json").read_text())
    (folder / "shards.json").write_text(json.dumps(described | {"version": 2}))
    refused(folder, "shards.json has version 2, expected 1")


def test_a_description_that_is_damaged(folder: Path):
    described = json.loads((folder / "shards.json").read_text())
    for text, sentence in (
        ({"version": None}, "shards.json has version None, expected 1"),
        ({"splits": {"train": {}}}, "shards.json is damaged .KeyError"),
        ({"splits": ["train"]}, "shards.json is damaged .AttributeError"),
        ({"splits": {"train": {"shards": [{"name": "x"}]}}}, "shards.json is damaged .TypeError"),
    ):
        (folder / "shards.json").write_text(json.dumps(described | text))
        refused(folder, sentence)


def test_a_shard_or_an_index_that_is_missing(folder: Path):
    shard, index = (first(folder, end) for end in ("array_record", "parquet"))
    shard.rename(folder / "aside")
    refused(folder, "train-00000-of-00002.array_record is missing, and its index is there")
    (folder / "aside").rename(shard)
    index.unlink()
    refused(folder, "train-00000-of-00002.array_record has no index: .*00000-of-00002.parquet is missing")
    index.write_bytes(b"PAR1")
    refused(folder, "00000-of-00002.parquet is damaged: ")


def test_a_shard_that_is_cut_off(folder: Path):
    shard = first(folder, "array_record")
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refused(folder, rf"has {len(content) - 5} bytes, and its index says {len(content)}: it is cut off")


def test_an_index_that_is_another_one(folder: Path):
    for end in ("parquet", "array_record"):
        shutil.copy(folder / f"train-00001-of-00002.{end}", first(folder, end))
    refused(folder, "00000-of-00002.parquet is another one than shards.json names; prepare anew")


def test_records_that_are_others_than_the_index_says(folder: Path):
    found = references(ShardSource(folder))
    other = folder / "train-00001-of-00002.array_record"
    assert other.stat().st_size == first(folder, "array_record").stat().st_size
    shutil.copy(other, first(folder, "array_record"))
    with pytest.raises(BadExample, match="record 1 is another one than its index says") as error:
        load_utterance(found[1])
    assert error.value.reason == "out_of_step"
    with pytest.raises(BadExample, match="has 3 records, and its index speaks of 3") as error:
        shards.read_record(str(other), 3)
    assert error.value.reason == "out_of_step"


def test_a_shard_that_breaks_while_it_is_read(folder: Path):
    found = references(ShardSource(folder))
    content = bytearray(first(folder, "array_record").read_bytes())
    content[100] ^= 255
    first(folder, "array_record").write_bytes(content)
    for damage in (bytes(content), b"", bytes(70_000), bytes(content[: len(content) // 2])):
        first(folder, "array_record").write_bytes(damage)
        with pytest.raises(BadExample) as error:
            load_utterance(found[0])
        assert error.value.reason == "damaged_container"
    first(folder, "array_record").unlink()
    with pytest.raises(BadExample) as error:
        load_utterance(found[0])
    assert error.value.reason == "missing_file"


def test_nothing_half_written_has_a_name(tmp_path: Path, rng: np.random.Generator):
    def broken():
        yield audio_record("a", speech(rng))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        shards.write_shard(str(tmp_path), "train-00000-of-00001", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_field_with_the_name_of_a_column(tmp_path: Path, rng: np.random.Generator):
    record = audio_record("a", speech(rng), **{"@check": "1"})
    with pytest.raises(UserError, match="a field '@check', which is a column of every shard's index"):
        shards.write_shard(str(tmp_path), "train-00000-of-00001", [record])


def test_the_files_are_what_others_read(folder: Path):
    index = pq.read_table(first(folder, "parquet"))
    assert index.column_names == ["@record", "@check", "id", "samples", "language", "text"]
    record = shards.read_record(str(first(folder, "array_record")), 2)
    samples, rate = soundfile.read(io.BytesIO(record.data), dtype="int16")
    assert rate == 16_000 and len(samples) == index["samples"][2].as_py()
