"""FLEURS (Conneau et al. 2022) as it is published: `de_de/train.tsv`, without header, and `de_de/audio/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.base import CorpusSource, Record, number, read_table
from slm_jax.errors import UserError

SPLITS = ("train", "dev", "test")
# `sentence` is the same in every language; `characters` spells `transcription`.
COLUMNS = (
    "sentence", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender",
)  # fmt: skip
# Where the published code is not the one that the language has elsewhere.
CODES = {"cmn": "zh"}


def language_code(published: str) -> str:
    """Returns the code of a language of FLEURS: `de` of `de_de`, `zh` of `cmn_hans_cn`."""
    code = base_code(published)
    return CODES.get(code, code)


class FleursSource(CorpusSource):
    """The same sentences read in many languages, so that each is the translation of the others.

    Ids are `<language>/<file name>` with the published language, as in `de_de/10004088536354799741`. The
    text is the one with case and marks; further fields are `normalized_text`, `sentence` (the published id,
    the same in all languages), `locale` and `gender`, and `translations.<code>` of the languages asked for.

    Args:
      directory: holds a folder for each language.
      languages: published names of the languages of the speech, such as `("de_de", "fr_fr")`.
      translations: published names of the languages whose texts are given as translations; a sentence that
        one of them lacks has none.
      splits: further splits: name -> published ones; by default `validation` is `dev`.

    Raises:
      UserError: there are no languages, or a split is unknown.
    """

    corpus = "FLEURS"

    def __init__(
        self,
        directory: str | Path,
        languages: Sequence[str],
        translations: Sequence[str] = (),
        splits: Mapping[str, Sequence[str]] | None = None,
    ):
        for field, value in (("languages", languages), ("translations", translations)):
            if isinstance(value, str) or (field == "languages" and not value):
                raise UserError(f"FLEURS: {field} is {value!r}, expected a list such as ['de_de']")
        self._languages, self._translations = tuple(languages), tuple(translations)
        super().__init__(
            directory,
            SPLITS,
            {"validation": ("dev",)} if splits is None else splits,
            languages=self._languages,
            translations=self._translations,
        )

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        asked = dict.fromkeys([*self._languages, *self._translations])
        return [self._table(language, part) for language in asked]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        texts = {language: self._sentences(language, part) for language in self._translations}
        for language in self._languages:
            path = self._table(language, part)
            for row in read_table(path, self.corpus, COLUMNS, header=False):
                translated = {
                    f"translations.{language_code(other)}": texts[other].get(row["sentence"], "")
                    for other in self._translations
                    if other != language
                }
                yield {
                    "id": f"{language}/{row['file_name'].removesuffix('.wav')}",
                    "audio": str(self._audio(language, part) / row["file_name"]),
                    "samples": int(number(row["num_samples"], path, self.corpus, "num_samples")),
                    "language": language_code(language),
                    "text": row["raw_transcription"],
                    "normalized_text": row["transcription"],
                    "sentence": row["sentence"],
                    "locale": language,
                    "gender": row["gender"].lower(),
                } | translated

    def _table(self, language: str, part: str) -> Path:
        return self.directory / language / f"{part}.tsv"

    def _audio(self, language: str, part: str) -> Path:
        return self.directory / language / "audio" / part

    def _sentences(self, language: str, part: str) -> dict[str, str]:
        rows = read_table(self._table(language, part), self.corpus, COLUMNS, header=False)
        return {row["sentence"]: row["raw_transcription"] for row in rows}
