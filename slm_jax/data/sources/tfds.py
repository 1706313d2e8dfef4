"""Datasets that TensorFlow Datasets prepared, read by their records."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax import storage
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import fields
from slm_jax.data.sources.base import Columns, ReferenceSource
from slm_jax.data.sources.shard_tables import shard_columns, stats_of
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.data.tfds_examples import AudioFeature, array_records, tf_records
from slm_jax.errors import UserError, nearest

_WHAT = "TFDS shard"
_VERSION = 2


class TfdsSource(ReferenceSource):
    """References from a dataset that TFDS prepared, in TFRecord or ArrayRecord files.

    Features that are one text, number, truth value or label are fields of their own name, `/` between nested
    ones, or of the one that `columns` gives them; a label is its name. One pass over the records of a shard
    is kept in the cache folder, as TFDS keeps no lengths. Example ids are `<shard>-<record>` unless a column
    is `id`. ArrayRecord files are read from local paths alone.

    Args:
      directory: that holds `dataset_info.json`, such as `~/tensorflow_datasets/librispeech/2.1.1`, or the
        folder above it where it has one version.
      audio: name of the audio feature, such as `speech` of LibriSpeech.
      columns: feature -> field.
      splits: our split -> TFDS's, with its slices such as `train[:10%]`; by default those of the dataset.
      language: of examples that have none.
      sample_rate: of audio whose feature does not say it.
      bits: that a sample in whole numbers has; TFDS does not say it. 16 but for sources of 24 or 32 bits.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        audio: str = "audio",
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        language: str = "",
        sample_rate: int | None = None,
        bits: int = 16,
    ):
        self._directory = _dataset_folder(storage.absolute(_at_home(directory)))
        self._audio, self._columns = audio, dict(columns or {})
        self._language, self._rate, self._bits = language, sample_rate, bits
        if bits not in (16, 24, 32):
            raise UserError(f"bits is {bits!r}, expected 16, 24 or 32")
        known = list(self._builder.info.splits)
        self._tfds_splits = {split: split for split in known} if splits is None else dict(splits)
        super().__init__(tuple(self._tfds_splits))

    def definition(self) -> Any:
        """Returns paths and settings."""
        settings = [self._audio, self._columns, self._language, self._rate, self._bits]
        return [self._directory, self._tfds_splits, *settings]

    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 of sizes and times of the shards, and of the settings."""
        files = [instruction.filename for instruction in self._instructions(split)]
        settings = [repr(self.definition()[2:]), self._tfds_splits[split]]
        return fields.joined_fingerprint([*stats_of(files, _WHAT), *settings])

    def num_input_examples(self, split: str) -> int:
        """Returns how many examples a split has, from the dataset's own record of it."""
        return sum(instruction.take for instruction in self._instructions(split))

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a shard is missing or unreadable, or there is no such feature.
        """
        instructions = self._instructions(split)
        feature, names = self._feature, self._names
        settings = [_VERSION, feature, sorted(names.items()), self._file_format]
        files = [instruction.filename for instruction in instructions]
        for shard, first, columns in shard_columns(files, _WHAT, settings, self._scan):
            start = instructions[shard].skip - first
            stop = start + instructions[shard].take
            chunk = {name: values[max(0, start) : max(0, stop)] for name, values in columns.items()}
            if not len(chunk["part"]):
                continue
            numbers = range(first + max(0, start), first + max(0, start) + len(chunk["part"]))
            stem = files[shard].rpartition("/")[2]
            if "id" not in chunk or not chunk["id"].any():
                chunk["id"] = np.array([f"{stem}-{number}" for number in numbers], object)
            chunk["samples"] = fields.reread_samples(chunk, files[shard])
            chunk["audio"] = np.full(len(numbers), files[shard], object)
            yield fields.completed(chunk, self._language)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        with naming_mistakes(self._directory, "TFDS dataset"):
            return tfds.builder_from_directory(self._directory)

    @property
    def _file_format(self) -> str:
        return self._builder.info.file_format.value

    def _instructions(self, split: str) -> list[Any]:
        wanted = self._tfds_splits[self.check_split(split)]
        try:
            return list(self._builder.info.splits[wanted].file_instructions)
        except (KeyError, ValueError) as error:
            found = nearest(wanted.partition("[")[0], self._builder.info.splits)
            said = str(error).strip("'\"").split("\n")[0]
            raise UserError(
                f"TFDS dataset {self._directory} has no split {wanted!r} ({said}){found}"
            ) from None

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Field of each feature that is one."""
        found = [name for name, feature in self._features.items() if feature.shape == ()]
        return fields.field_names(self._columns, found, f"TFDS dataset {self._directory}")

    @functools.cached_property
    def _features(self) -> dict[str, Any]:
        return dict(_flat(self._builder.info.features, ""))

    @functools.cached_property
    def _feature(self) -> AudioFeature:
        import tensorflow_datasets as tfds

        audio = {name: each for name, each in self._features.items() if isinstance(each, tfds.features.Audio)}
        where = f"TFDS dataset {self._directory}"
        if self._audio not in audio:
            raise UserError(f"{where} has no audio feature {self._audio!r}{nearest(self._audio, audio)}")
        feature: Any = audio[self._audio]
        rate = feature.sample_rate or self._rate
        if not rate:
            raise UserError(f"{where}: feature {self._audio!r} says no sample rate; give sample_rate")
        channels = feature.shape[1] if len(feature.shape) > 1 else 1
        content = feature.to_json_content()
        encoding = "none" if content.lazy_decode else str(content.encoding).lower()
        dtype = "" if encoding == "none" else np.dtype(feature.np_dtype).name
        return AudioFeature(self._audio, int(rate), channels, self._bits, dtype, encoding == "zlib")

    def _scan(self, path: str) -> Columns:
        from google.protobuf.message import DecodeError

        from slm_jax.data.host_tensorflow import tf

        records = []
        with naming_mistakes(path, _WHAT):
            try:
                for place, data in (array_records if self._file_format == "array_record" else tf_records)(
                    path
                ):
                    example = tf.train.Example.FromString(data)
                    records.append(self._record(example.features.feature, place, path))
            except (EOFError, RuntimeError, DecodeError) as error:
                raise UserError(f"{_WHAT} {path} is damaged: {error}") from None
        return fields.columns_of_records(records)

    def _record(self, values: Any, place: str, path: str) -> dict[str, str | int]:
        record: dict[str, str | int] = {
            field: _text(values[name], self._features[name]) for name, field in self._names.items()
        }
        part = self._feature.part(place)
        numbers = _numbers(values[self._feature.name])
        if numbers is None:
            samples = fields.samples_in_shard(path, part)
        else:
            samples = -(-numbers // self._feature.channels * SAMPLE_RATE // self._feature.rate)
        return record | {"part": part, "samples": min(samples, np.iinfo(np.int32).max)}


def _at_home(directory: str | os.PathLike[str]) -> str | os.PathLike[str]:
    return directory if storage.is_remote(directory) else Path(directory).expanduser()


def _dataset_folder(directory: str) -> str:
    """Returns the folder of a dataset's version."""
    with naming_mistakes(directory, "TFDS dataset"):
        names = storage.list_folder(directory)
        if "dataset_info.json" in names:
            return directory
        versions = [name for name in names if storage.is_folder(f"{directory}/{name}")]
        with_info = [
            name for name in versions if "dataset_info.json" in storage.list_folder(f"{directory}/{name}")
        ]
    if len(with_info) == 1:
        return f"{directory}/{with_info[0]}"
    if with_info:
        raise UserError(f"TFDS dataset {directory} has several versions{nearest('', with_info)}")
    raise UserError(f"folder {directory} holds no dataset_info.json, expected a dataset that TFDS prepared")


def _flat(features: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the features of a dataset with their full names."""
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flat(feature, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", feature


def _text(value: Any, feature: Any) -> str:
    import tensorflow_datasets as tfds

    kind = value.WhichOneof("kind")
    if kind is None or not len(getattr(value, kind).value):
        return ""
    found = getattr(value, kind).value[0]
    if isinstance(found, bytes):
        return found.decode("utf-8", "replace")
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(found) if found >= 0 else ""
    return str(bool(found)).lower() if feature.np_dtype == np.bool_ else str(found)


def _numbers(value: Any) -> int | None:
    """Returns how many numbers a feature holds; None where it holds bytes."""
    kind = value.WhichOneof("kind")
    return None if kind == "bytes_list" else len(getattr(value, kind).value) if kind else 0
