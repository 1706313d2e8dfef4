"""What every source of references does; a new one is a file beside this one."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from slm_jax.data.host_tensorflow import Dataset, tf
from slm_jax.errors import UserError, nearest

# References that a chunk holds at most.
CHUNK = 16_384

# Field -> its values, [n] each: `samples` int32, every other field an object array of str.
Columns = dict[str, np.ndarray]

# Fields that every chunk has.
TEXT_FIELDS = ("id", "audio", "part", "language", "text")


class ReferenceSource(seqio.DataSource, abc.ABC):
    """References as columns, chunk by chunk, behind the interface of SeqIO.

    A chunk has the fields `id` (unique in the split), `audio` (path of a file, absolute, remote or relative
    to `audio_root`; empty in a text-only reference), `part` (which part of that file, as `audio_files` reads
    it; empty for the whole), `language`, `text`, `samples` (int32, at 16 kHz; 0 without audio and where the
    duration is not a positive number), and whatever else its references have: `translations.<language>` and
    other names. A field that no reference of a chunk has may be absent from it; a value that a reference
    lacks is the empty string.

    Args:
      splits: names of the splits.
    """

    def __init__(self, splits: Sequence[str]):
        super().__init__(splits=tuple(splits), caching_permitted=False)

    @abc.abstractmethod
    def chunks(self, split: str) -> Iterator[Columns]:
        """Yields the references of a split in its own order, at most `CHUNK` at a time; reads no audio.

        Raises:
          UserError: there is no such split, or something in it is wrong that makes the whole of it doubtful.
        """

    @abc.abstractmethod
    def content_fingerprint(self, split: str) -> str:
        """Returns a SHA-256 that changes with what `chunks` yields, as cheap as that can be had."""

    @abc.abstractmethod
    def definition(self) -> Any:
        """Returns JSON that is equal for sources of the same references: paths and settings."""

    def audio_root(self, split: str) -> str:
        """Returns the folder that audio paths of a split are relative to."""
        return ""

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name: the plan splits rows over hosts, so that SeqIO need not split references."""
        return [f"{type(self).__name__}/{split}"]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether shards beyond `list_shards` can be read; there is one shard."""
        return False

    def check_split(self, split: str) -> str:
        """Returns the name of a split; raises UserError where there is none of that name."""
        if split not in self.splits:
            raise UserError(f"there is no split {split!r}{nearest(split, self.splits)}")
        return split

    def columns(self, split: str) -> Columns:
        """Returns all references of a split, every field of any of them; raises UserError as `chunks`."""
        chunks = list(self.chunks(split))
        names = dict.fromkeys(name for chunk in chunks for name in chunk)
        return {name: np.concatenate([_column(chunk, name) for chunk in chunks]) for name in names}

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> Dataset:
        """Returns the references of a split as a dataset of scalars.

        Args:
          split: name of the split.
          shuffle: whether the order is drawn from `seed`; the plan asks for the source's own order.
          seed: of the shuffle.
          shard_info: must name the one shard there is.

        Raises:
          UserError: as `chunks`.
        """
        if shard_info and shard_info.num_shards > 1:
            raise ValueError("references are one shard; the plan splits rows over hosts")
        columns = self.columns(split)
        dataset = tf.data.Dataset.from_tensor_slices(
            {name: tf.constant(values) for name, values in columns.items()}
        )
        if shuffle:
            count = int(dataset.cardinality())
            dataset = dataset.shuffle(count, seed=seed, reshuffle_each_iteration=False)
        return dataset


def by_split(given: Any, what: str) -> dict[str, Any]:
    """Returns what a source was given for each split.

    Args:
      given: split -> anything.
      what: the argument, such as `ManifestSource.manifests`, for errors.

    Raises:
      UserError: it is no mapping, or an empty one.
    """
    if not isinstance(given, Mapping) or not given:
        instead = repr(str(given)) if isinstance(given, str | os.PathLike) else "..."
        raise UserError(f"{what} is {given!r}, expected splits and what each has, as {{'train': {instead}}}")
    return dict(given)


def count_of(columns: Mapping[str, np.ndarray]) -> int:
    """Returns how many references a chunk holds."""
    return len(columns["id"])


def _column(columns: Columns, name: str) -> np.ndarray:
    return columns[name] if name in columns else np.full(count_of(columns), "", object)
