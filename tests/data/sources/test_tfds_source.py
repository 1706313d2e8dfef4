"""Datasets that TFDS prepared, sample for sample as TFDS reads them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import tensorflow_datasets

from slm_jax import storage
from slm_jax.data import tfds_examples
from slm_jax.data.audio_files import decode, load_utterance
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.references import SPEECH, Reference
from slm_jax.data.sources import TfdsSource, shard_tables
from slm_jax.data.sources import tfds as tfds_source
from slm_jax.data.tfds_examples import AudioFeature, audio_file
from slm_jax.errors import BadExample, UserError

# Its modules are lazy, which type checkers do not see through.
tfds: Any = tensorflow_datasets

pytestmark = [
    # TFDS's own way of writing.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

AUDIO = tfds.features.Audio
# Features of published builders, by their names: audio, its rate, text.
FEATURES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "librispeech": (
        "speech", 16_000, "text",
        {"speech": AUDIO(sample_rate=16_000), "text": tfds.features.Text(), "speaker_id": np.int64,
         "chapter_id": np.int64, "id": np.str_},
    ),
    "common_voice": (
        "voice", 48_000, "sentence",
        {"client_id": tfds.features.Text(), "upvotes": tfds.features.Scalar(np.int32),
         "gender": tfds.features.ClassLabel(names=["male", "female", "other"]),
         "sentence": tfds.features.Text(), "voice": AUDIO()},
    ),
    "fleurs": (
        "audio", 16_000, "transcription",
        {"id": tfds.features.Scalar(np.int32), "num_samples": tfds.features.Scalar(np.int32),
         "audio": AUDIO(sample_rate=16_000), "transcription": tfds.features.Text(),
         "gender": tfds.features.ClassLabel(names=["male", "female", "other"]),
         "language": tfds.features.Text()},
    ),
    "voxpopuli": (
        "audio", 16_000, "normalized_text",
        {"audio_id": tfds.features.Text(), "language": tfds.features.ClassLabel(names=["en", "de"]),
         "audio": AUDIO(file_format="wav", sample_rate=16_000), "normalized_text": tfds.features.Text(),
         "is_gold_transcript": np.bool_},
    ),
    "floats": (
        "nested/sound", 16_000, "nested/words",
        {"nested": tfds.features.FeaturesDict(
            {"sound": AUDIO(sample_rate=16_000, dtype=np.float32), "words": tfds.features.Text()})},
    ),
    "stereo": (
        "audio", 16_000, "text",
        {"audio": AUDIO(sample_rate=16_000, shape=(None, 2), dtype=np.int16), "text": tfds.features.Text()},
    ),
}  # fmt: skip
OTHERS = {"speaker_id": 7, "chapter_id": 8, "upvotes": 1, "gender": "female", "num_samples": 5,
          "language": "de", "client_id": "c", "audio_id": "q", "is_gold_transcript": True}  # fmt: skip


def prepare(folder: Path, name: str, waves: list[Any], file_format: str) -> str:
    """Prepares a dataset of waves with TFDS itself; returns its folder."""
    audio, _, text, features = FEATURES[name]

    def example(i: int, wave: Any) -> dict[str, Any]:
        if name == "floats":
            return {"nested": {"sound": wave, "words": f"said {i}"}}
        values = {key: value for key, value in OTHERS.items() if key in features}
        if "id" in features:
            values["id"] = i if name == "fleurs" else f"utt-{i}"
        return values | {audio: wave, text: f"said {i}"}

    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            name = "mini"
            pkg_dir_path = folder

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                for i, wave in enumerate(waves):
                    yield i, example(i, wave)

    builder = Builder(data_dir=folder, file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    return str(builder.data_dir)


def waves_of(name: str, rng: np.random.Generator, count: int = 12) -> list[np.ndarray]:
    lengths = rng.integers(1_000, 9_000, count)
    if name == "floats":
        return [0.1 * rng.standard_normal(n).astype(np.float32) for n in lengths]
    kind = np.int16 if name == "stereo" else np.int64
    shape = (2,) if name == "stereo" else ()
    return [rng.integers(-20_000, 20_000, (n, *shape)).astype(kind) for n in lengths]


def plain(name: str, wave: np.ndarray) -> np.ndarray:
    """int16 at 16 kHz of what TFDS gives."""
    sound = wave.astype(np.float32) if name == "floats" else wave.astype(np.float32) / 32_768
    sound = sound.mean(1, dtype=np.float32) if sound.ndim > 1 else sound
    rate = FEATURES[name][1]
    if rate != 16_000:
        sound = soxr.resample(sound, rate, 16_000)
    return np.clip(np.rint(sound * 32_768), -32_768, 32_767).astype(np.int16)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize("name", FEATURES)
def test_samples_are_those_that_tfds_reads(tmp_path: Path, rng, name: str, file_format: str, check_audio):
    folder = prepare(tmp_path, name, waves_of(name, rng), file_format)
    audio, rate, text, _ = FEATURES[name]
    columns = {text: "text"} | ({"id": "id"} if name == "librispeech" else {})
    source = TfdsSource(folder, audio=audio, columns=columns, sample_rate=rate)
    builder = tfds.builder_from_directory(folder)
    if file_format == "array_record":
        examples = list(builder.as_data_source("train"))
    else:
        examples = list(tfds.as_numpy(builder.as_dataset("train", shuffle_files=False)))

    def value(example: Any, path: str) -> Any:
        for key in path.split("/"):
            example = example[key]
        return example

    found = source.columns("train")
    texts = [value(example, text) for example in examples]
    assert found["text"].tolist() == [t.decode() if isinstance(t, bytes) else t for t in texts]
    expected = {
        id_: plain(name, value(example, audio)) for id_, example in zip(found["id"], examples, strict=True)
    }
    check_audio(source, expected)
    if name == "common_voice":
        assert set(found["gender"]) == {"female"}
    if name == "voxpopuli":
        assert set(found["language"]) == {"de"}
        assert set(found["is_gold_transcript"]) == {"true"}


@pytest.mark.filterwarnings("ignore:Using lazy encoding")
def test_audio_that_tfds_keeps_as_files(tmp_path: Path, clips, check_audio, unreadable, monkeypatch):
    audio = AUDIO(lazy_decode=True, sample_rate=16_000)
    monkeypatch.setitem(FEATURES, "files", ("audio", 0, "text", {"audio": audio, "text": np.str_}))
    folder = prepare(tmp_path / "tfds", "files", [str(clip.path) for clip in clips], "tfrecord")
    source = TfdsSource(folder)
    # What cannot be read now may be at the next look.
    with unreadable():
        assert not source.columns("train")["samples"].any()
    order = [int(text.removeprefix("said ")) for text in source.columns("train")["text"]]
    ids = source.columns("train")["id"]
    check_audio(source, {id_: clips[i].samples for id_, i in zip(ids, order, strict=True)})


@pytest.mark.parametrize("split", ["train[:25%]", "train[3:9]", "train[-2:]+train[:1]", "train[50%:]"])
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_slices_of_splits(tmp_path: Path, rng, split: str, file_format: str):
    folder = prepare(tmp_path, "fleurs", waves_of("fleurs", rng, 17), file_format)
    source = TfdsSource(folder, columns={"transcription": "text"}, splits={"part": split})
    builder = tfds.builder_from_directory(folder)
    if file_format == "array_record":
        examples = list(builder.as_data_source(split))
    else:
        examples = list(tfds.as_numpy(builder.as_dataset(split, shuffle_files=False)))
    expected = [example["transcription"].decode() for example in examples]
    assert source.columns("part")["text"].tolist() == expected
    assert source.num_input_examples("part") == len(expected)
    assert list(source.splits) == ["part"]


def test_a_shard_is_passed_over_once(tmp_path: Path, rng, monkeypatch: pytest.MonkeyPatch, cache: Path):
    folder = prepare(tmp_path, "fleurs", waves_of("fleurs", rng), "tfrecord")
    first = TfdsSource(Path(folder).parent, columns={"transcription": "text"}).columns("train")
    monkeypatch.setattr(tfds_source, "tf_records", None)
    source = TfdsSource(folder, columns={"transcription": "text"})
    again = source.columns("train")
    assert {name: values.tolist() for name, values in again.items()} == {
        name: values.tolist() for name, values in first.items()
    }
    assert len(list((cache / shard_tables.FOLDER).iterdir())) == 3
    before = source.content_fingerprint("train")
    assert before != TfdsSource(folder, columns={"transcription": "words"}).content_fingerprint("train")


def load(path: str, part: str) -> Any:
    ids = np.array([SPEECH])
    return load_utterance(Reference("x", path, 9_000, ids, ids, "t", "en", part=part))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_records_that_cannot_be_read_have_a_reason(tmp_path: Path, rng, file_format: str):
    folder = prepare(tmp_path, "fleurs", waves_of("fleurs", rng), file_format)
    columns = TfdsSource(folder, columns={"transcription": "text"}).columns("train")
    path, part = columns["audio"][0], columns["part"][0]
    place = re.sub(r"example=([\d,]+).*", r"\1", part)
    beyond = "99999999,5" if "," in place else "99"
    for wrong, reason in (
        (part.replace(f"example={place}", f"example={beyond}"), "missing_part"),
        (part.replace("feature=audio", "feature=sound"), "empty_audio"),
        (part.replace("feature=audio", "feature=transcription"), "unreadable_audio"),
        (part.replace("rate=16000", "rate=0"), "bad_sample_rate"),
        (part.replace("rate=16000", "rate=x"), "bad_part"),
        (f"{part}&channels=1000000", "unreadable_audio"),
        (f"{part}&bits=12&t=99", "unreadable_audio"),
        (f"{part}&t=99", "past_the_end"),
    ):
        with pytest.raises(BadExample) as error:
            load(path, wrong)
        assert error.value.reason == reason, wrong
    with pytest.raises(BadExample) as error:
        load(path + "x", part)
    assert error.value.reason == "missing_file"
    data = bytearray(Path(path).read_bytes())
    data[20 : len(data) // 2] = bytes(len(data) // 2 - 20)
    Path(path).write_bytes(data)
    with pytest.raises(BadExample) as error:
        load(path, part)
    assert error.value.reason in ("damaged_container", "missing_part")
    with pytest.raises(UserError, match=r"TFDS shard .* is damaged"):
        TfdsSource(folder, columns={"transcription": "text"}).columns("train")


def test_the_size_of_a_file_is_asked_for_once(tmp_path: Path, monkeypatch):
    path = str(tmp_path / "a.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for i in range(50):
            writer.write(bytes(i))
    asked: list[str] = []
    stat = storage.stat
    monkeypatch.setattr(storage, "stat", lambda path: (asked.append(path), stat(path))[1])
    assert [data for _, data in tfds_examples.tf_records(path)] == [bytes(i) for i in range(50)]
    assert asked == [path]


def test_a_shard_that_breaks_off(tmp_path: Path, rng):
    folder = prepare(tmp_path, "fleurs", waves_of("fleurs", rng), "tfrecord")
    path = Path(TfdsSource(folder).columns("train")["audio"][0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged: it breaks off in the record at byte"):
        TfdsSource(folder).columns("train")


def test_kinds_of_values(tmp_path: Path, rng):
    wave = rng.integers(-8_388_608, 8_388_607, 500)
    (tmp_path / "a.wav").write_bytes(audio_file(wave, AudioFeature("a", 16_000, bits=24), "x"))
    # The highest values have no 16-bit value next to them but the highest.
    np.testing.assert_allclose(decode(tmp_path / "a.wav").samples, np.minimum(wave / 256, 32767), atol=0.51)
    assert audio_file(b"any file", AudioFeature("a", 16_000), "x") == b"any file"
    with pytest.raises(BadExample, match="more than 16 bits"):
        audio_file(wave, AudioFeature("a", 16_000), "x")
    with pytest.raises(BadExample, match="incorrect header check"):
        audio_file(b"no zlib", AudioFeature("a", 16_000, dtype="int16", is_zlib=True), "x")
    wave = wave.astype(np.int16)
    for encoding in ("zlib", "bytes"):
        packed = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=encoding).encode_example(wave)
        feature = AudioFeature("a", 16_000, dtype="int16", is_zlib=encoding == "zlib")
        (tmp_path / "b.wav").write_bytes(audio_file(packed, feature, "x"))
        np.testing.assert_array_equal(decode(tmp_path / "b.wav").samples, wave)
    assert AudioFeature("a&b", 8_000, 2, 24, "int16", True).part("3") == (
        "example=3&feature=a%26b&rate=8000&channels=2&bits=24&dtype=int16&zlib=1"
    )


def test_mistakes(tmp_path: Path, rng):
    folder = prepare(tmp_path / "cv", "common_voice", waves_of("common_voice", rng, 3), "tfrecord")
    for options, sentence in (
        ({"audio": "voise", "sample_rate": 1}, "has no audio feature 'voise'; did you mean 'voice'"),
        ({"audio": "voice"}, "feature 'voice' says no sample rate; give sample_rate"),
        ({"columns": {"sentense": "text"}}, "has no column 'sentense'; did you mean 'sentence'"),
        ({"splits": {"train": "trian"}}, "has no split 'trian'.*did you mean 'train'"),
        ({"bits": 12}, "bits is 12, expected 16, 24 or 32"),
        ({"directory": tmp_path / "no"}, "TFDS dataset .*no does not exist"),
        ({"directory": tmp_path}, "holds no dataset_info.json"),
    ):
        settings: dict[str, Any] = {"directory": folder, "audio": "voice", "sample_rate": 48_000} | options
        if options == {"audio": "voice"}:
            del settings["sample_rate"]
        with pytest.raises(UserError, match=sentence) as error:
            TfdsSource(**settings).columns("train")
        assert "\n" not in str(error.value)
