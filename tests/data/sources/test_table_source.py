"""Tables: columns become fields, whatever they are called."""

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from slm_jax.data import durations
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import TableSource
from slm_jax.errors import UserError

COMMON_VOICE = {"path": "audio", "sentence": "text", "locale": "language"}


def write(path: Path, header: list[str], rows: list[list[str]], separator: str = "\t") -> Path:
    path.write_text("\n".join(separator.join(cells) for cells in [header, *rows]) + "\n", "utf-8")
    return path


def test_a_table_in_the_way_of_common_voice(tmp_path: Path, clips, check_audio):
    rows = [["c1", clip.path.name, clip.text, "", "de"] for clip in clips]
    path = write(tmp_path / "train.tsv", ["client_id", "path", "sentence", "age", "locale"], rows)
    source = TableSource({"train": path}, columns=COMMON_VOICE, audio_folder=tmp_path / "clips")
    check_audio(source, {str(i): clip.samples for i, clip in enumerate(clips, 2)})
    columns = source.columns("train")
    assert columns["text"].tolist() == [clip.text for clip in clips]
    assert set(columns["language"]) == {"de"}
    assert columns["client_id"].tolist() == ["c1"] * len(clips)
    assert columns["age"].tolist() == [""] * len(clips)


@pytest.mark.parametrize(
    ("field", "unit"), [("duration", 1.0), ("duration_ms", 1e3), ("duration_samples", 44_100.0)]
)
def test_durations_in_a_column(tmp_path: Path, clips, check_audio, field: str, unit: float, monkeypatch):
    monkeypatch.setattr(durations, "count_samples", None)
    rows = [[clip.name, f"clips/{clip.path.name}", f"{clip.seconds * unit:.3f}", "x"] for clip in clips]
    path = write(tmp_path / "train.csv", ["id", "audio", "length", "text"], rows, ",")
    source = TableSource({"train": path}, columns={"length": field}, sample_rate=44_100, language="en")
    check_audio(source, {clip.name: clip.samples for clip in clips})
    assert set(source.columns("train")["language"]) == {"en"}


def test_stretches_in_columns(tmp_path: Path, clips, load_all):
    flac = next(clip for clip in clips if clip.path.suffix == ".flac")
    rows = [["a", "clips/" + flac.name, "0.1", "0.25", "x"], ["b", "clips/" + flac.name, "", "0.2", "y"]]
    path = write(tmp_path / "t.tsv", ["id", "audio", "from", "to", "text"], rows)
    columns = {"from": "start", "to": "end"}
    source = TableSource({"train": path}, columns=columns, audio_suffix=".flac")
    assert source.columns("train")["samples"].tolist() == [2_400, 0]
    write(path, ["id", "audio", "from", "to", "text"], rows[:1])
    reference, samples = load_all(source)["a"]
    assert reference.part == "t=0.1,0.25"
    if flac.rate == 16_000:
        np.testing.assert_array_equal(samples, flac.samples[1_600:4_000])
    assert len(samples) == 2_400


def test_values_in_quotes(tmp_path: Path):
    cells = [["a", 'He said "no, never"'], ["b", "two\n\nlines"], ["c", ""]]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *cells])
    found = TableSource({"train": tmp_path / "t.csv"}).columns("train")
    assert [list(pair) for pair in zip(found["id"], found["text"], strict=True)] == cells
    # Tables with tabs have no quotes: Common Voice has texts with one.
    write(tmp_path / "t.tsv", ["id", "text"], [["a", '"open']])
    assert TableSource({"train": tmp_path / "t.tsv"}).columns("train")["text"].tolist() == ['"open']


def test_remote_and_gzipped_tables(tmp_path: Path):
    data = b"id\ttext\r\na\tone\r\n\r\nb\ttwo\r\n"
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(data))
    tf.io.gfile.makedirs("ram://tables")
    with tf.io.gfile.GFile("ram://tables/t.tsv", "wb") as file:
        file.write(data)
    for path in (tmp_path / "t.tsv.gz", "ram://tables/t.tsv"):
        source = TableSource({"train": path})
        assert source.columns("train")["text"].tolist() == ["one", "two"]
        assert source.num_input_examples("train") == 2
    assert TableSource({"train": "ram://tables/t.tsv"}).audio_root("train") == "ram://tables"


def test_the_fingerprint_sees_what_headers_say(tmp_path: Path, clips):
    rows = [[clip.path.name, clip.text] for clip in clips]
    path = write(tmp_path / "clips" / "t.tsv", ["audio", "text"], rows)
    source = TableSource({"train": path})
    before = source.content_fingerprint("train")
    assert before == TableSource({"train": path}).content_fingerprint("train")
    assert before != TableSource({"train": path}, language="de").content_fingerprint("train")
    clips[0].path.write_bytes(
        next(clip for clip in clips[1:] if clip.seconds != clips[0].seconds).path.read_bytes()
    )
    assert before != source.content_fingerprint("train")


@pytest.mark.parametrize(
    ("text", "columns", "sentence"),
    [
        ("", {}, "holds no references"),
        ("id\ttext\n", {}, "holds no references"),
        ("id\ttext\na\tb\n", {"sentense": "text"}, "has no column 'sentense'; choose from id, text"),
        ("id\tsentence\na\tb\n", {"sentense": "text"}, "column 'sentense'; did you mean 'sentence'?"),
        ("id\ttext\na\tb\nc\n", {}, "line 3: found 1 columns, expected 2"),
        ("id\tid\na\tb\n", {}, "the header names a column twice"),
        ("id\tduration\na\tlong\n", {}, "line 2: column 'duration' is 'long', expected a number"),
        ("a\tb\nx\ty\n", {"a": "text", "b": "text"}, "two columns of table"),
        ("id\tfrom\na\t1\n", {"from": "start"}, "line 2: column 'from' stands without a column for 'end'"),
        ("id\tsamples\na\t1\n", {}, "give column 'samples' another name"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, text: str, columns: dict[str, str], sentence: str):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        TableSource({"train": tmp_path / "t.tsv"}, columns=columns).columns("train")
    assert "\n" not in str(error.value)


def test_files_that_are_no_table(tmp_path: Path):
    write(tmp_path / "train.tsv", ["id"], [["a"]])
    (tmp_path / "t.csv").write_text('id,text\na,"open\n')
    for path, sentence in (
        (tmp_path / "trian.tsv", r"table .*trian.tsv does not exist; did you mean 'train.tsv'\?"),
        (tmp_path, "cannot be read"),
        (tmp_path / "t.csv", r"t.csv, line \d: unexpected end of data"),
    ):
        with pytest.raises(UserError, match=sentence):
            TableSource({"train": path}).columns("train")
