"""Manifests: what they yield, and one sentence for each mistake in them."""

import re

import numpy as np
import pytest

from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import ManifestSource
from slm_jax.errors import UserError


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
