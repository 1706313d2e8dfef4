"""CoVoST 2 (Wang et al. 2020): `covost_v2.de_en.train.tsv` and the clips of Common Voice 4."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.base import CorpusSource, Record, read_table

SPLITS = ("train", "dev", "test")
_ESCAPED = re.compile(r"\\(.)")


class CoVoST2Source(CorpusSource):
    """Speech of Common Voice with translations into or from English; ids are the clips' names.

    Fields: `text`, `speaker` (the client's id) and `translations.<code of the target language>`.

    Args:
      directory: of the tables that `get_covost_splits.py` of CoVoST writes.
      clips: the folder `clips` of Common Voice 4 in the source language.
      source_language: code of the speech as it is published, such as `de` or `zh-CN`.
      target_language: code of the translation as it is published.
      splits: further splits: name -> published ones; by default `validation` is `dev`.

    Raises:
      UserError: a split is unknown.
    """

    corpus = "CoVoST 2"

    def __init__(
        self,
        directory: str | Path,
        clips: str | Path,
        source_language: str,
        target_language: str,
        splits: Mapping[str, Sequence[str]] | None = None,
    ):
        self._clips = Path(clips).absolute()
        self._pair = (source_language, target_language)
        super().__init__(
            directory,
            SPLITS,
            {"validation": ("dev",)} if splits is None else splits,
            clips=str(self._clips),
            pair=self._pair,
        )

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        spoken, written = self._pair
        return [self.directory / f"covost_v2.{spoken}_{written}.{part}.tsv"]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        spoken, written = map(base_code, self._pair)
        (path,) = self.metadata_files(part)
        for row in read_table(path, self.corpus, ("path", "sentence", "translation", "client_id")):
            yield {
                "id": row["path"].removesuffix(".mp3"),
                "audio": str(self._clips / row["path"]),
                "language": spoken,
                "text": _unescaped(row["sentence"]),
                f"translations.{written}": _unescaped(row["translation"]),
                "speaker": row["client_id"],
            }


def _unescaped(text: str) -> str:
    # The script writes quotes and backslashes behind a backslash, and no quotes around values.
    return _ESCAPED.sub(r"\1", text)
