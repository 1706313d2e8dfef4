"""VoxPopuli (Wang et al. 2021) as its tools write it: `transcribed_data/de/asr_train.tsv`, Ogg by year."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.base import CorpusSource, Record, read_table
from slm_jax.errors import UserError

SPLITS = ("train", "dev", "test")
_FIELDS = ("raw_text", "gender", "is_gold_transcript", "accent")


class VoxPopuliSource(CorpusSource):
    """Speech of the European Parliament with transcripts.

    The text is the normalised one; further fields are `raw_text`, `speaker`, `gender`, `accent` and
    `is_gold_transcript`.

    Args:
      directory: of one language, `transcribed_data/de` or `transcribed_data/en_accented`.
      splits: further splits: name -> published ones; by default `validation` is `dev`.

    Raises:
      UserError: a split is unknown.
    """

    corpus = "VoxPopuli"

    def __init__(self, directory: str | Path, splits: Mapping[str, Sequence[str]] | None = None):
        super().__init__(directory, SPLITS, {"validation": ("dev",)} if splits is None else splits)

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        return [self.directory / f"asr_{part}.tsv"]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        (path,) = self.metadata_files(part)
        for row in read_table(path, self.corpus, ("normalized_text", "speaker_id")):
            # Releases differ in the name of the first column.
            id_ = row.get("id_", row.get("id"))
            if not id_:
                raise UserError(f"{self.corpus}: {path} has no column 'id_' nor 'id' with the names of files")
            fields = {name: row[name] for name in _FIELDS if name in row}
            yield {
                "id": id_,
                "audio": str(self.directory / id_[:4] / f"{id_}.ogg"),
                "language": base_code(self.directory.name),
                "text": row["normalized_text"],
                "speaker": row["speaker_id"],
            } | fields
