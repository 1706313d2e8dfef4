"""Manifests: what they yield, and one sentence for each mistake in them."""

import codecs
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import sources
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import ManifestSource, NemoSource, TableSource, text_files
from slm_jax.errors import UserError


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (sources.ManifestSource, "manifests"),
        (sources.TableSource, "tables"),
        (sources.KaldiSource, "directories"),
        (sources.NemoSource, "manifests"),
        (sources.ParquetSource, "files"),
        (sources.WebDatasetSource, "shards"),
    ],
)
@pytest.mark.parametrize("given", ["data/train.jsonl", {}, None, 3, ["a"]])
def test_what_is_no_mapping_of_splits_is_one_sentence(kind, argument, given):
    with pytest.raises(
        UserError, match=rf"{kind.__name__}.{argument} is .*expected splits and what each has"
    ):
        kind(given)


def test_fields_of_a_manifest(write_manifest):
    path = write_manifest(
        [
            {"id": "a", "audio": "x/a.wav", "duration": 1.5, "language": "en", "text": "hör\u2028zu"},
            "",
            {"text": "only text", "translations": {"de": "nur Text"}, "topic": "t"},
            {"audio": "b.wav", "duration": -1, "text": ""},
        ]
    )
    source = ManifestSource({"train": path})
    rows = list(source.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert [row["id"] for row in rows] == [b"a", b"3", b"4"]
    assert [row["samples"] for row in rows] == [24_000, 0, 0]
    assert [row["text"].decode() for row in rows] == ["hör\u2028zu", "only text", ""]
    assert [row["translations.de"] for row in rows] == [b"", b"nur Text", b""]
    assert [row["topic"] for row in rows] == [b"", b"t", b""]
    assert source.num_input_examples("train") == 3
    assert source.audio_root("train") == str(path.parent)


@pytest.mark.parametrize("duration", [0, -2, float("nan"), float("inf")])
def test_durations_that_are_no_length_have_no_samples(write_manifest, duration: float):
    path = write_manifest([{"audio": "a.wav", "duration": duration, "text": "x"}])
    assert ManifestSource({"train": path}).columns("train")["samples"].tolist() == [0]


names = st.sampled_from(["text", "id", "audio", "duration", "language", "topic", "translations", "part"])
texts = st.text(max_size=8) | st.sampled_from(["null", "2024-01-31", "1.5", "true", "a\\u2028b", "}\\n{"])
values = {
    "duration": st.floats(allow_nan=True) | st.integers(-5, 10**400),
    "translations": st.dictionaries(st.sampled_from(["de", "fr"]), texts, max_size=2),
    "id": texts | st.integers(),
}
any_value = texts | st.none() | st.booleans() | st.integers() | st.lists(st.integers(), max_size=1)


@st.composite
def record(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(st.lists(names, unique=True, max_size=6))
    odd = draw(st.integers(0, 60)) == 0
    return {name: draw(any_value if odd else values.get(name, texts)) for name in fields}


def outcome(path: Path) -> Any:
    """What a manifest yields, or the sentence that says why nothing."""
    try:
        columns = ManifestSource({"train": path}).columns("train")
    except UserError as error:
        return str(error)
    columns = {name: values.tolist() for name, values in columns.items()}
    # A field that no reference has may be absent.
    return {name: values for name, values in columns.items() if name == "samples" or any(values)}


@settings(max_examples=200, deadline=None)
@given(records=st.lists(record(), min_size=1, max_size=5))
def test_blocks_that_arrow_reads_come_out_as_python_reads_them(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("manifest") / "train.jsonl"
    lines = [json.dumps(fields, ensure_ascii=len(records) % 2 == 0) for fields in records]
    path.write_text("\n".join(lines), "utf-8")
    plain = outcome(path)
    # A space at the end of a line is enough for Python's parser.
    path.write_text(" \n".join(lines) + " ", "utf-8")
    assert plain == outcome(path)


def test_a_manifest_longer_than_a_block(tmp_path: Path, rng: np.random.Generator, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 1000)
    lengths = rng.integers(1, 100, 300)
    lines = [json.dumps({"text": "ü" * int(length)}, ensure_ascii=False) for length in lengths]
    for blank in rng.integers(0, 300, 3):
        lines[blank] = ""
    expected = {str(i): json.loads(line)["text"] for i, line in enumerate(lines, 1) if line}
    data = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    tf.io.gfile.makedirs("ram://manifests")
    tf.io.gfile.copy(str(tmp_path / "a.jsonl"), "ram://manifests/a.jsonl", overwrite=True)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", "ram://manifests/a.jsonl"):
        source = ManifestSource({"train": path})
        chunks = list(source.chunks("train"))
        assert len(chunks) > 1
        columns = source.columns("train")
        assert dict(zip(columns["id"], columns["text"], strict=True)) == expected
        assert source.num_input_examples("train") == len(expected)
    assert source.audio_root("train") == "ram://manifests"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data)[:-20])
    with pytest.raises(UserError, match="is not a whole gzip file"):
        ManifestSource({"train": tmp_path / "a.jsonl.gz"}).columns("train")


@pytest.mark.parametrize("block", [2, 64, 4 << 20])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, monkeypatch, block: int):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    for name, text, source_of in (
        ("a.csv", "audio,duration,text\n0.wav,1,hello\n", TableSource),
        ("a.tsv", "audio\tduration\ttext\n0.wav\t1\thello\n", TableSource),
        ("a.jsonl", '{"audio": "0.wav", "duration": 1, "text": "hello"}\n', ManifestSource),
        ("a.json", '{"audio_filepath": "0.wav", "duration": 1, "text": "hello"}', NemoSource),
    ):
        (tmp_path / name).write_text(text, "utf-8-sig")
        columns = source_of({"train": tmp_path / name}).columns("train")
        assert columns["audio"][0].rpartition("/")[2] == "0.wav", name
        assert (columns["text"][0], columns["samples"][0]) == ("hello", 16_000), name


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_half_a_character_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes):
    monkeypatch.setattr(text_files, "_BLOCK", 64)
    good = mark + b'{"text": "abc"}\n' * 20
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=f"byte {len(good) + 10} is"):
        ManifestSource({"train": tmp_path / "a.jsonl"}).columns("train")


def test_shuffled_order_holds_the_same_references(write_manifest, rng: np.random.Generator):
    source = ManifestSource({"train": write_manifest([{"text": str(i)} for i in range(50)])})
    seed = int(rng.integers(1000))
    orders = [
        [row["id"] for row in source.get_dataset("train", seed=seed).as_numpy_iterator()] for _ in range(2)
    ]
    assert orders[0] == orders[1] != [str(i + 1).encode() for i in range(50)]
    assert len(set(orders[0])) == 50


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"text": "a"}', "{text}"], "train.jsonl, line 2: not JSON"),
        (["", '"text"'], "line 2: found str, expected an object"),
        ([{"text": 3}], "line 1: field 'text' is 3, expected a string"),
        ([{"text": None}], "line 1: field 'text' is null, expected a string"),
        ([{"audio": "a", "duration": "1 s"}], "field 'duration' is \"1 s\", expected a number of seconds"),
        ([{"audio": "a", "duration": True}], "field 'duration' is true, expected a number"),
        ([{"audio": "a"}], "line 1: field 'duration' is missing"),
        ([{"translations": {"de": 1}}], "field 'translations.de' is 1, expected a string"),
        ([{"translations": "de"}], "field 'translations' is \"de\", expected an object"),
        ([{"samples": "1"}], "line 1: field 'samples' is not for manifests; write 'duration'"),
        (['{"text": "\\ud800"}'], "line 1: half a surrogate pair"),
        ([{"id": ""}], "line 1: field 'id' is empty"),
        ([""], "holds no references"),
    ],
)
def test_mistakes_in_a_manifest(write_manifest, lines, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        ManifestSource({"train": write_manifest(lines)}).get_dataset("train")
    assert "\n" not in str(error.value)


def test_manifest_that_is_not_there(write_manifest, tmp_path):
    path = write_manifest([{"text": "a"}])
    with pytest.raises(UserError, match=r"trian.jsonl does not exist; did you mean 'train.jsonl'\?"):
        ManifestSource({"train": path.with_name("trian.jsonl")}).columns("train")
    with pytest.raises(UserError, match="cannot be read"):
        ManifestSource({"train": tmp_path}).columns("train")
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8 text"):
        ManifestSource({"train": path}).columns("train")
    with pytest.raises(UserError, match=r"no split 'tran'; did you mean 'train'\?"):
        ManifestSource({"train": path}).columns("tran")


def test_tensorflow_sees_no_accelerator():
    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}
