"""GigaSpeech (Chen et al. 2021) as it is published: `GigaSpeech.json` and long Opus files with segments."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data import parts
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources.corpora.base import CorpusSource, Record, check_case, in_case, opened
from slm_jax.errors import UserError

SPLITS = ("XS", "S", "M", "L", "XL", "DEV", "TEST")
JOINED = {"train": ("XL",), "validation": ("DEV",), "test": ("TEST",)}
MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
# What stands in place of a transcript where there is no speech.
GARBAGE = frozenset({"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"})

_MARK = re.compile(r"\s*(" + "|".join(MARKS) + ")")
_AUDIOS = re.compile(r'"audios"\s*:\s*\[')
_BLOCK = 1 << 22


class GigaSpeechSource(CorpusSource):
    """English of audiobooks, podcasts and videos; ids such as `POD0000000025_S0000103`.

    Each reference is a stretch of a long file. Segments without speech have the reason `garbage_utterance`.
    Further fields are `speaker` and `title`.

    Args:
      directory: holds `GigaSpeech.json` and `audio/`.
      splits: further splits: name -> subsets; by default `train` is `XL`, `validation` is `DEV` and `test`
        is `TEST`.
      case: `published` is upper case, or `lower`.
      marks: whether the tags of punctuation become marks; they are left out where not.

    Raises:
      UserError: a split or the case is unknown.
    """

    corpus = "GigaSpeech"

    def __init__(
        self,
        directory: str | Path,
        splits: Mapping[str, Sequence[str]] | None = None,
        case: str = "published",
        marks: bool = True,
    ):
        self._case, self._marks = check_case(case, self.corpus), marks
        super().__init__(directory, SPLITS, JOINED if splits is None else splits, case=case, marks=marks)

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        return [self.directory / "GigaSpeech.json"]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        (path,) = self.metadata_files(part)
        for number, audio in enumerate(_audios(path)):
            try:
                yield from self._segments(audio, part)
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"GigaSpeech: {path}: audio {number} is not as published ({error!r})"
                ) from None

    def _segments(self, audio: Mapping[str, Any], part: str) -> Iterator[Record]:
        for segment in audio["segments"]:
            if f"{{{part}}}" not in segment["subsets"]:
                continue
            start, end = float(segment["begin_time"]), float(segment["end_time"])
            text = segment["text_tn"]
            yield {
                "id": segment["sid"],
                "audio": str(self.directory / audio["path"]),
                "part": parts.seconds(start, end),
                "samples": round((end - start) * SAMPLE_RATE),
                "language": "en",
                "text": in_case(self._written(text), self._case),
                "speaker": segment.get("speaker", ""),
                "title": audio.get("title", ""),
                "reject": "garbage_utterance" if GARBAGE & set(text.split()) else "",
            }

    def _written(self, text: str) -> str:
        return _MARK.sub(lambda found: MARKS[found[1]] if self._marks else "", text).strip()


def _audios(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the entries of `audios` one at a time: the whole file takes tens of gigabytes of memory.

    Raises:
      UserError: the file cannot be read, or breaks off.
    """
    decoder = json.JSONDecoder()
    try:
        with opened(path, "GigaSpeech") as binary, io.TextIOWrapper(binary, encoding="utf-8") as file:
            text = file.read(_BLOCK)
            while not (start := _AUDIOS.search(text)):
                block = file.read(_BLOCK)
                if not block:
                    raise UserError(f"GigaSpeech: {path} has no list 'audios'")
                text += block
            text = text[start.end() :]
            while True:
                text = text.lstrip(" \t\r\n,")
                if text.startswith("]"):
                    return
                try:
                    entry, end = decoder.raw_decode(text)
                except json.JSONDecodeError as error:
                    block = file.read(max(_BLOCK, len(text)))
                    if not block:
                        raise UserError(
                            f"GigaSpeech: {path} breaks off or is no JSON ({error.msg} in its last "
                            f"{len(text)} characters)"
                        ) from None
                    text += block
                else:
                    yield entry
                    text = text[end:]
    except UnicodeDecodeError as error:
        raise UserError(f"GigaSpeech: {path} is not UTF-8 text: {error.reason}") from None
