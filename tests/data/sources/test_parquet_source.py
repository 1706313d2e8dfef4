"""Parquet files as Hugging Face's datasets write them, against pyarrow."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_jax.data import durations
from slm_jax.data.audio_files import load_audio
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import ParquetSource
from slm_jax.errors import BadExample, UserError


def table_of(clips: list[Any], **more: list[Any]) -> pa.Table:
    rows = [{"bytes": clip.path.read_bytes(), "path": clip.path.name} for clip in clips]
    return pa.table({"audio": rows, "sentence": [clip.text for clip in clips], **more})


TEXT = {"sentence": "text"}


@pytest.mark.parametrize("group", [1, 3, 100])
def test_shards_of_embedded_audio(tmp_path: Path, clips, check_audio, group: int):
    for i in range(2):
        name = tmp_path / "data" / f"train-{i:05d}-of-00002.parquet"
        name.parent.mkdir(exist_ok=True)
        pq.write_table(table_of(clips[i * 5 : i * 5 + 5]), name, row_group_size=group)
    expected = {f"train-{i // 5:05d}-of-00002-{i % 5}": clip.samples for i, clip in enumerate(clips)}
    for paths in ("data/train-*.parquet", "data", "data/train-{00000..00001}-of-00002.parquet"):
        source = ParquetSource({"train": tmp_path / paths}, columns=TEXT, language="en")
        check_audio(source, expected)
        assert source.columns("train")["text"].tolist() == [clip.text for clip in clips]


def test_fields_of_all_kinds(tmp_path: Path, clips):
    more = {
        "speaker": list(range(10)),
        "is_good": [True, False] * 5,
        "translation": [{"de": f"ja {i}", "fr": None} for i in range(10)],
        "id": [f"x{i}" for i in range(10)],
        "vectors": [[1.0, 2.0]] * 10,
    }
    pq.write_table(table_of(clips, **more), tmp_path / "a.parquet")
    columns = {"translation.de": "translations.de", "translation.fr": "translations.fr"} | TEXT
    found = ParquetSource({"train": tmp_path / "a.parquet"}, columns=columns).columns("train")
    assert found["id"].tolist() == more["id"]
    assert found["speaker"].tolist() == [str(i) for i in range(10)]
    assert found["is_good"].tolist() == ["true", "false"] * 5
    assert found["translations.de"].tolist() == [f"ja {i}" for i in range(10)]
    assert found["translations.fr"].tolist() == [""] * 10
    assert "vectors" not in found
    assert "" not in found


def test_durations_of_a_column(tmp_path: Path, clips, check_audio, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(durations, "count_samples", None)
    lengths = [clip.seconds * 1e3 for clip in clips]
    pq.write_table(table_of(clips, ms=lengths), tmp_path / "a.parquet")
    source = ParquetSource({"train": tmp_path / "a.parquet"}, columns={"ms": "duration_ms"} | TEXT)
    check_audio(source, {f"a-{i}": clip.samples for i, clip in enumerate(clips)})


def test_paths_in_place_of_bytes(tmp_path: Path, clips, check_audio):
    rows = [{"bytes": None, "path": f"clips/{clip.path.name}"} for clip in clips]
    rows[3]["bytes"] = clips[3].path.read_bytes()
    texts = [clip.text for clip in clips]
    pq.write_table(pa.table({"audio": rows, "text": texts}), tmp_path / "a.parquet", row_group_size=3)
    expected = {f"a-{i}": clip.samples for i, clip in enumerate(clips)}
    source = ParquetSource({"train": tmp_path / "a.parquet"})
    check_audio(source, expected)
    columns = source.columns("train")
    assert [bool(part) for part in columns["part"]] == [i == 3 for i in range(10)]


def test_a_struct_of_bytes_alone(tmp_path: Path, clips):
    rows = [{"bytes": clip.path.read_bytes()} for clip in clips[:2]] + [{"bytes": None}]
    pq.write_table(pa.table({"audio": rows}), tmp_path / "a.parquet")
    columns = ParquetSource({"train": tmp_path / "a.parquet"}).columns("train")
    assert columns["samples"][:2].all() and not columns["samples"][2]
    np.testing.assert_array_equal(load_audio(columns["audio"][1], part=columns["part"][1]), clips[1].samples)
    with pytest.raises(BadExample, match="missing_part"):
        load_audio(columns["audio"][2], part=columns["part"][2])


def test_a_column_of_plain_bytes_in_a_bucket(clips, check_audio):
    rows = [clip.path.read_bytes() for clip in clips]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"flac": rows, "text": [clip.text for clip in clips]}), buffer)
    tf.io.gfile.makedirs("ram://parquet")
    with tf.io.gfile.GFile("ram://parquet/a.parquet", "wb") as file:
        file.write(buffer.getvalue())
    source = ParquetSource({"train": "ram://parquet/*.parquet"}, audio="flac")
    check_audio(source, {f"a-{i}": clip.samples for i, clip in enumerate(clips)})


def test_texts_alone(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    columns = ParquetSource({"train": tmp_path / "a.parquet"}, audio=None).columns("train")
    assert columns["text"].tolist() == ["a", ""]
    assert columns["audio"].tolist() == ["", ""]
    assert columns["samples"].tolist() == [0, 0]


def test_the_fingerprint_follows_the_files(tmp_path: Path, clips):
    pq.write_table(table_of(clips), tmp_path / "a.parquet")
    source = ParquetSource({"train": tmp_path / "a.parquet"}, columns=TEXT)
    before = source.content_fingerprint("train")
    assert before == source.content_fingerprint("train")
    pq.write_table(table_of(clips[:5]), tmp_path / "a.parquet")
    assert before != source.content_fingerprint("train")
    assert source.num_input_examples("train") == 5
    part = source.columns("train")["part"][4]
    np.testing.assert_array_equal(load_audio(tmp_path / "a.parquet", part=part), clips[4].samples)


def test_the_fingerprint_sees_what_headers_of_other_files_say(tmp_path: Path, clips):
    rows = [{"bytes": None, "path": f"clips/{clip.path.name}"} for clip in clips]
    rows[3]["bytes"] = clips[3].path.read_bytes()
    lengths = [clip.seconds for clip in clips]
    pq.write_table(pa.table({"audio": rows, "length": lengths}), tmp_path / "a.parquet", row_group_size=3)
    source = ParquetSource({"train": tmp_path / "a.parquet"})
    written = ParquetSource({"train": tmp_path / "a.parquet"}, columns={"length": "duration"})
    before, fixed = source.content_fingerprint("train"), written.content_fingerprint("train")
    assert before == source.content_fingerprint("train")
    clips[0].path.unlink()
    assert before != source.content_fingerprint("train")
    assert fixed == written.content_fingerprint("train")


def test_the_fingerprint_of_audio_inside_reads_no_header(tmp_path: Path, clips, monkeypatch):
    pq.write_table(table_of(clips), tmp_path / "a.parquet")
    monkeypatch.setattr(durations, "count_samples", None)
    ParquetSource({"train": tmp_path / "a.parquet"}).content_fingerprint("train")


def test_mistakes(tmp_path: Path, clips):
    pq.write_table(table_of(clips), tmp_path / "a.parquet")
    pq.write_table(table_of(clips)[:0], tmp_path / "empty.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none PAR1")
    (tmp_path / "folder").mkdir()
    offsets, letters = pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ab\xff\xfe")
    broken = pa.StringArray.from_buffers(2, offsets, letters)
    pq.write_table(table_of(clips[:2], note=broken), tmp_path / "latin.parquet")
    for options, sentence in (
        ({"files": "b.parquet"}, "b.parquet does not exist; did you mean"),
        ({"files": "bad.parquet"}, "parquet file .*bad.parquet cannot be read"),
        ({"files": "empty.parquet"}, "hold no rows"),
        ({"files": "folder"}, r"folder .*folder holds no parquet file \(\*.parquet\)"),
        ({"files": "c*.parquet"}, r"no parquet file matches .*c\*.parquet"),
        ({"files": "latin.parquet"}, "latin.parquet: column 'note' is not UTF-8 text"),
        ({"audio": "adio"}, "has no column 'adio' of audio; did you mean 'audio'"),
        ({"audio": "sentence"}, "has no column 'sentence' of audio"),
        ({"columns": {"sentense": "text"}}, "has no column 'sentense'; did you mean 'sentence'"),
        (
            {"columns": {"sentence": "duration"}},
            r"a.parquet, row 0: field 'duration' is 'said .*', expected a number",
        ),
    ):
        settings = {"files": "a.parquet", **options}
        with pytest.raises(UserError, match=sentence) as error:
            ParquetSource({"train": tmp_path / settings.pop("files")}, **settings).columns("train")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=re.escape("no split 'tran'; did you mean 'train'?")):
        ParquetSource({"train": tmp_path / "a.parquet"}).columns("tran")
