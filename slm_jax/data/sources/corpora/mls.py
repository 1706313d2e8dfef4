"""Multilingual LibriSpeech (Pratap et al. 2020) as OpenSLR 94 unpacks: `mls_german/train/transcripts.txt`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources.corpora.base import CorpusSource, Record, number, read_lines, read_table
from slm_jax.errors import UserError, nearest

SPLITS = ("train", "dev", "test")
LANGUAGES = {
    "dutch": "nl", "english": "en", "french": "fr", "german": "de", "italian": "it", "polish": "pl",
    "portuguese": "pt", "spanish": "es",
}  # fmt: skip
LENGTHS = ("headers", "segments")


class MLSSource(CorpusSource):
    """Read speech in eight languages; ids such as `4800_10003_000000`, with `speaker` and `book`.

    Args:
      directory: of one language, such as `mls_german` or `mls_german_opus`; the name tells the language and
        whether files are FLAC or Opus.
      splits: further splits: name -> published ones; by default `validation` is `dev`.
      lengths: where lengths come from: `headers` of the files, or the times in `segments.txt`, which needs
        no look at the files but is rounded.
      limited: the subset of `train` with labels for 10 hours that `limited_supervision` lists: all of it.

    Raises:
      UserError: the folder names no language, or a setting is unknown.
    """

    corpus = "MLS"

    def __init__(
        self,
        directory: str | Path,
        splits: Mapping[str, Sequence[str]] | None = None,
        lengths: str = "headers",
        limited: bool = False,
    ):
        words = Path(directory).absolute().name.split("_")
        language = words[1] if len(words) > 1 else ""
        if words[0] != "mls" or language not in LANGUAGES:
            names = [f"mls_{name}" for name in LANGUAGES]
            raise UserError(
                f"MLS: folder {directory} names no language{nearest(Path(directory).name, names)}"
            )
        if lengths not in LENGTHS:
            raise UserError(f"MLS: lengths is {lengths!r}{nearest(lengths, LENGTHS)}")
        self._language, self._ending = LANGUAGES[language], "opus" if words[2:] == ["opus"] else "flac"
        self._lengths, self._limited = lengths, limited
        joined = {"validation": ("dev",)} if splits is None else splits
        super().__init__(directory, SPLITS, joined, lengths=lengths, limited=limited)

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        folder = self.directory / part
        segments = [folder / "segments.txt"] if self._lengths == "segments" else []
        return [folder / "transcripts.txt", *segments, *self._handles(part)]

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        folder = self.directory / part
        path = folder / "transcripts.txt"
        samples = self._samples(folder / "segments.txt") if self._lengths == "segments" else {}
        lists = self._handles(part)
        chosen = {line.strip() for handles in lists for line in read_lines(handles, self.corpus)}
        for row in read_table(path, self.corpus, ("id", "text"), header=False):
            id_ = row["id"]
            if lists and id_ not in chosen:
                continue
            speaker, book, *_ = [*id_.split("_"), ""]
            record: Record = {
                "id": id_,
                "audio": str(folder / "audio" / speaker / book / f"{id_}.{self._ending}"),
                "language": self._language,
                "text": row["text"],
                "speaker": speaker,
                "book": book,
            }
            if self._lengths == "segments":
                if id_ not in samples:
                    raise UserError(f"MLS: {folder / 'segments.txt'} has no line for {id_!r} of {path.name}")
                record["samples"] = samples[id_]
            yield record

    def _handles(self, part: str) -> list[Path]:
        """Lists of the limited subset: nine hours, and six times ten minutes."""
        if not self._limited or part != "train":
            return []
        folder = self.directory / part / "limited_supervision"
        found = sorted(folder.rglob("handles.txt"))
        if not found:
            raise UserError(f"MLS: there is no handles.txt in {folder}")
        return found

    def _samples(self, path: Path) -> dict[str, int]:
        columns = ("id", "url", "start", "end")
        rows = read_table(path, self.corpus, columns, header=False)
        return {
            row["id"]: round(
                (number(row["end"], path, "MLS", "end") - number(row["start"], path, "MLS", "start"))
                * SAMPLE_RATE
            )
            for row in rows
        }
