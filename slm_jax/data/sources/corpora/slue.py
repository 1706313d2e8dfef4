"""SLUE (Shon et al. 2022) as its archives unpack: `slue-voxpopuli_dev.tsv` beside `dev/`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data import parts
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources.corpora.base import CorpusSource, Record, number, read_table
from slm_jax.errors import UserError, nearest

SPLITS = ("fine-tune", "dev", "test")
JOINED = {"train": ("fine-tune",), "validation": ("dev",)}
SENTIMENTS = ("Positive", "Neutral", "Negative")

# The seven classes that are scored, and the published ones that each holds.
COMBINED = {
    "WHEN": ("DATE", "TIME"),
    "QUANT": ("CARDINAL", "ORDINAL", "QUANTITY", "MONEY", "PERCENT"),
    "PLACE": ("GPE", "LOC"),
    "NORP": ("NORP",),
    "ORG": ("ORG",),
    "LAW": ("LAW",),
    "PERSON": ("PERSON",),
}
_CLASS_OF = {tag: name for name, tags in COMBINED.items() for tag in tags}
TAGS = ("combined", "published")


class _SlueSource(CorpusSource):
    prefix: str

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        # The labels of the test are not published with the audio.
        blind = self.directory / f"{self.prefix}_{part}_blind.tsv"
        path = self.directory / f"{self.prefix}_{part}.tsv"
        return [blind if blind.is_file() and not path.is_file() else path]


class SlueVoxPopuliSource(_SlueSource):
    """Speech of the European Parliament with named entities; the field `entities` names them in their order.

    `entities` is such as `LAW: article twenty one; WHEN: today`, `none` where there are none, and empty where
    they are not published. Further fields are `raw_text` and `speaker`.

    Args:
      directory: the folder `slue-voxpopuli`.
      splits: further splits: name -> published ones; by default `train` is `fine-tune` and `validation` is
        `dev`.
      tags: `combined`, the seven classes that SLUE scores, or `published`, all eighteen.

    Raises:
      UserError: a split is unknown, or `tags` is neither.
    """

    corpus = "SLUE-VoxPopuli"
    prefix = "slue-voxpopuli"

    def __init__(
        self,
        directory: str | Path,
        splits: Mapping[str, Sequence[str]] | None = None,
        tags: str = "combined",
    ):
        if tags not in TAGS:
            raise UserError(f"{self.corpus}: tags is {tags!r}{nearest(tags, TAGS)}")
        self._tags = tags
        super().__init__(directory, SPLITS, JOINED if splits is None else splits, tags=tags)

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        (path,) = self.metadata_files(part)
        for row in read_table(path, self.corpus, ("id", "normalized_text"), quoted=True):
            yield {
                "id": row["id"],
                "audio": str(self.directory / part / f"{row['id']}.ogg"),
                "language": "en",
                "text": row["normalized_text"],
                "raw_text": row.get("raw_text", ""),
                "speaker": row.get("speaker_id", ""),
                "entities": self._entities(row, path),
            }

    def _entities(self, row: Mapping[str, str], path: Path) -> str:
        listed = row.get("normalized_ner", "")
        if not listed:
            return ""
        text = row["normalized_text"]
        try:
            found = [] if listed == "None" else ast.literal_eval(listed)
            spans = sorted((int(start), int(length), str(tag)) for tag, start, length in found)
        except (ValueError, TypeError, SyntaxError):
            raise UserError(
                f"{self.corpus}: {path}, {row['id']}: normalized_ner is {listed!r}, expected a list of "
                "[tag, start, length]"
            ) from None
        named = [
            (tag if self._tags == "published" else _CLASS_OF.get(tag), text[start : start + length])
            for start, length, tag in spans
        ]
        return "; ".join(f"{tag}: {phrase}" for tag, phrase in named if tag) or "none"


class SlueVoxCelebSource(_SlueSource):
    """Interviews with celebrities and the sentiment of what they say; each is a stretch of a longer file.

    Fields: `sentiment` as it is published, which is one of `SENTIMENTS` for most and none of them where the
    annotators did not agree, and `speaker`.

    Args:
      directory: the folder `slue-voxceleb`.
      splits: further splits: name -> published ones; by default `train` is `fine-tune` and `validation` is
        `dev`.

    Raises:
      UserError: a split is unknown.
    """

    corpus = "SLUE-VoxCeleb"
    prefix = "slue-voxceleb"

    def __init__(self, directory: str | Path, splits: Mapping[str, Sequence[str]] | None = None):
        super().__init__(directory, SPLITS, JOINED if splits is None else splits)

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        (path,) = self.metadata_files(part)
        columns = ("id", "normalized_text", "start_second", "end_second")
        for row in read_table(path, self.corpus, columns, quoted=True):
            start, end = (
                number(row[column], path, self.corpus, column) for column in ("start_second", "end_second")
            )
            yield {
                "id": row["id"],
                "audio": str(self.directory / f"{part}_raw" / f"{row['id']}.flac"),
                "part": parts.seconds(start, end),
                "samples": max(0, round((end - start) * SAMPLE_RATE)),
                "language": "en",
                "text": row["normalized_text"],
                "sentiment": row.get("sentiment", ""),
                "speaker": row.get("speaker_id", ""),
            }
