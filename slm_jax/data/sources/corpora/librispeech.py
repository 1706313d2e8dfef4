"""LibriSpeech (Panayotov et al. 2015) as OpenSLR 12 unpacks: `train-clean-100/19/198/19-198-0000.flac`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slm_jax.data.sources.corpora.base import CorpusSource, Record, check_case, in_case, read_lines
from slm_jax.errors import UserError, nearest

# The last two are Mini LibriSpeech's, OpenSLR 31.
SPLITS = (
    "train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean",
    "test-other", "train-clean-5", "dev-clean-2",
)  # fmt: skip
JOINED = {"train": SPLITS[:3], "validation": ("dev-clean",), "test": ("test-clean",)}


class LibriSpeechSource(CorpusSource):
    """Read English; ids such as `19-198-0000`, with the fields `speaker` and `chapter`.

    Args:
      directory: the folder `LibriSpeech`.
      splits: further splits: name -> published ones. By default `train` is the 960 hours, `validation`
        is `dev-clean` and `test` is `test-clean`.
      case: `published` is upper case, or `lower`.

    Raises:
      UserError: a split or the case is unknown.
    """

    corpus = "LibriSpeech"

    def __init__(
        self,
        directory: str | Path,
        splits: Mapping[str, Sequence[str]] | None = None,
        case: str = "published",
    ):
        self._case = check_case(case, self.corpus)
        super().__init__(directory, SPLITS, JOINED if splits is None else splits, case=case)

    def metadata_files(self, part: str) -> list[Path]:
        """As of `CorpusSource`."""
        folder = self.directory / part
        if not folder.is_dir():
            here = [path.name for path in self.directory.glob("*-*") if path.is_dir()]
            raise UserError(f"{self.corpus}: there is no folder {folder}{nearest(part, here)}")
        return sorted(folder.glob("*/*/*.trans.txt"))

    def records(self, part: str) -> Iterator[Record]:
        """As of `CorpusSource`."""
        for path in self.metadata_files(part):
            for line in filter(None, read_lines(path, self.corpus)):
                id_, _, text = line.partition(" ")
                speaker, _, rest = id_.partition("-")
                yield {
                    "id": id_,
                    "audio": str(path.with_name(f"{id_}.flac")),
                    "language": "en",
                    "text": in_case(text, self._case),
                    "speaker": speaker,
                    "chapter": rest.partition("-")[0],
                }
