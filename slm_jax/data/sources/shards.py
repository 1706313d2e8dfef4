"""References of speech shards, from their indices alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slm_jax import storage
from slm_jax.data import shards
from slm_jax.data.sources.base import CHUNK, Columns, ReferenceSource
from slm_jax.errors import UserError


class ShardSource(ReferenceSource):
    """References from a directory of speech shards, as `slm data prepare` writes it.

    The `part` of a reference is its record (`shards.record_parts`), so that a shard that is not the one of
    its index is found out.

    Args:
      directory: with `shards.json`; local or remote.

    Raises:
      UserError: it holds no finished shards.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = storage.absolute(directory).rstrip("/")
        self._entries = shards.read_description(self._directory)
        super().__init__(tuple(self._entries))

    def definition(self) -> Any:
        """Returns the directory."""
        return self._directory

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name, the directory: the plan splits rows over hosts."""
        return [self._directory]

    def audio_root(self, split: str) -> str:
        """Returns the directory."""
        return self._directory

    def entry(self, split: str) -> shards.SplitEntry:
        """Returns what `shards.json` says of a split; raises UserError where there is none of that name."""
        return self._entries[self.check_split(split)]

    def content_fingerprint(self, split: str) -> str:
        """Returns the fingerprint that `shards.json` has of the split."""
        return self.entry(split).fingerprint

    def num_input_examples(self, split: str) -> int:
        """Returns how many references a split holds, as `shards.json` says."""
        return self.entry(split).records

    def chunks(self, split: str) -> Iterator[Columns]:
        """As of `ReferenceSource`.

        Raises:
          UserError: a shard or an index is missing, damaged, or not the one that `shards.json` names.
        """
        for shard in self.entry(split).shards:
            index = shards.read_index(self._directory, shard.name)
            if index.fingerprint != shard.index:
                path = shards.index_path(self._directory, shard.name)
                raise UserError(f"index {path} is another one than {shards.SHARDS_FILE} names; prepare anew")
            for start in range(0, len(index.table), CHUNK):
                yield _columns(index.table.slice(start, CHUNK), f"{shard.name}.array_record")


def _columns(index: pa.Table, shard: str) -> Columns:
    """Returns rows of an index as references."""
    samples = index["samples"].to_numpy()
    columns = {name: _texts(index[name].to_pylist()) for name in index.column_names if _is_text(name)}
    # A record of text alone has no audio.
    spoken = samples > 0
    return columns | {
        "samples": samples,
        "audio": np.where(spoken, _texts([shard] * len(index)), ""),
        "part": np.where(spoken, _texts(shards.record_parts(index)), ""),
    }


def _is_text(column: str) -> bool:
    return column != "samples" and not column.startswith("@")


def _texts(values: list[str]) -> np.ndarray:
    texts = np.empty(len(values), object)
    texts[:] = values
    return texts
