"""Common Voice (Ardila et al. 2020) as its releases unpack: `cv-corpus-17.0-2024-03-15/de/train.tsv`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources.corpora.base import CorpusSource, Record, number, read_table

SPLITS = ("train", "dev", "test", "validated", "other", "invalidated")
DURATIONS = "clip_durations.tsv"


class CommonVoiceSource(CorpusSource):
    """Sentences read by volunteers; ids are the clips' names, such as `common_voice_de_17298952`.

    Lengths are those of `clip_durations.tsv`, which newer releases have, and of the headers where they are
    not in it. Fields: `speaker` (the client's id), `locale` as it is published, `gender`, `age` and `accent`.

    Args:
      directory: of one language, such as `cv-corpus-17.0-2024-03-15/de`.
      splits: further splits: name -> published ones; by default `validation` is `dev`.

    Raises:
      UserError: a split is unknown.
    """

    corpus = "Common Voice"

    def __init__(self, directory: str | Path, splits: Mapping[str, Sequence[str]] | None = None):
        super().__init__(directory, SPLITS, {"validation": ("dev",)} if splits is None else splits)

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        return [self.directory / f"{part}.tsv", *self._durations_files()]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        path = self.directory / f"{part}.tsv"
        milliseconds = self._milliseconds()
        for row in read_table(path, self.corpus, ("client_id", "path", "sentence")):
            # The first releases leave the ending out.
            clip = row["path"] if row["path"].endswith(".mp3") else f"{row['path']}.mp3"
            record: Record = {
                "id": clip.removesuffix(".mp3"),
                "audio": str(self.directory / "clips" / clip),
                "language": base_code(self.directory.name),
                "text": row["sentence"],
                "speaker": row["client_id"],
                "locale": self.directory.name,
                "gender": row.get("gender", ""),
                "age": row.get("age", ""),
                "accent": row.get("accents", row.get("accent", "")),
            }
            if clip in milliseconds:
                record["samples"] = round(milliseconds[clip] * SAMPLE_RATE / 1000)
            yield record

    def _durations_files(self) -> list[Path]:
        path = self.directory / DURATIONS
        return [path] if path.is_file() else []

    def _milliseconds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for path in self._durations_files():
            for row in read_table(path, self.corpus, ("clip", "duration[ms]")):
                found[row["clip"]] = number(row["duration[ms]"], path, self.corpus, "duration[ms]")
        return found
