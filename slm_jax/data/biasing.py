"""Contextual biasing: lists of phrases in the prompt, some of which are said and most of which are not.

The list of an example holds its own phrases and distractors from a pool, in an order of its own; in a share
of the examples its own phrases are left out, so that a model does not learn that the list is always right.
All of it is drawn from a hash of the example's id. Le et al. 2021 (arXiv 2104.02194) bias LibriSpeech with
the rare words of the transcript, which `rare_words` finds.
"""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from slm_jax.data.columnwise import Columns, buckets, check_fields, over_columns, texts
from slm_jax.data.host_tensorflow import Dataset
from slm_jax.data.order import permute
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError

# Resolution of the share of examples whose own phrases are left out.
_SHARES = 1 << 30
_KEYS = (1 << 63) - 1
# Draws that are made at a time.
_DRAWS = 1 << 20


class PhrasePool(abc.ABC):
    """Where distractors, or common words, come from; its `repr` changes with what it holds."""

    @functools.cached_property
    def phrases(self) -> np.ndarray:
        """The phrases without repetition, object [m]; raises UserError where there are none."""
        found = list(dict.fromkeys(phrase.strip() for phrase in self._read() if phrase.strip()))
        if not found:
            raise UserError(f"{self._name()} holds no phrases")
        return np.array(found, object)

    @functools.cached_property
    def places(self) -> dict[str, list[int]]:
        """Where each phrase stands in `phrases`, whatever its case: by the phrase, case folded."""
        found: dict[str, list[int]] = {}
        for place, phrase in enumerate(self.phrases):
            found.setdefault(phrase.casefold(), []).append(place)
        return found

    def __contains__(self, phrase: object) -> bool:
        return isinstance(phrase, str) and phrase.casefold() in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.phrases)

    def __len__(self) -> int:
        return len(self.phrases)

    @abc.abstractmethod
    def _read(self) -> Iterable[str]: ...

    @abc.abstractmethod
    def _name(self) -> str: ...


class PhraseFile(PhrasePool):
    """Phrases of a text file, one a line; blank lines are passed over.

    Args:
      path: of the file.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path).absolute()

    @functools.cached_property
    def _bytes(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise UserError(f"{self._name()} cannot be read: {error.strerror or error}") from None

    def _read(self) -> Iterable[str]:
        try:
            return self._bytes.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._name()} is not UTF-8 text: byte {error.start} is {error.reason}"
            ) from None

    def _name(self) -> str:
        return f"phrase list {self._path}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PhraseFile) and self._path == other._path

    def __hash__(self) -> int:
        return hash(self._path)

    def __repr__(self) -> str:
        return f"PhraseFile({hashlib.sha256(self._bytes).hexdigest()})"


class SourcePhrases(PhrasePool):
    """The phrases of all examples of a split.

    Args:
      source: of the references.
      split: of the source.
      field: holds the phrases of an example.
      separator: stands between them.
    """

    def __init__(self, source: ReferenceSource, split: str, field: str, separator: str):
        self._source, self._split, self._field, self._separator = source, split, field, separator

    def _read(self) -> Iterable[str]:
        values = (value for chunk in self._source.chunks(self._split) for value in texts(chunk, self._field))
        return (phrase for value in values for phrase in value.split(self._separator))

    def _name(self) -> str:
        return f"field {self._field!r} of split {self._split!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SourcePhrases) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key()[2:])

    def _key(self) -> tuple[object, ...]:
        source = self._source
        return type(source), source.definition(), self._split, self._field, self._separator

    def __repr__(self) -> str:
        content = self._source.content_fingerprint(self._split)
        return f"SourcePhrases({content}, {self._field!r}, {self._separator!r})"


def phrase_lists(
    dataset: Dataset,
    *,
    pool: PhrasePool,
    distractors: tuple[int, int],
    absent: float,
    salt: str,
    phrases: str = "phrases",
    separator: str = ";",
    joiner: str = ", ",
) -> Dataset:
    """Adds the field `phrase_list`, what a prompt tells of phrases that may be said.

    Args:
      dataset: references with string fields.
      pool: what distractors are drawn from, without repetition and never one of the example's own.
      distractors: least and most of them in a list; how many is drawn per example. A pool that holds fewer
        gives all it has.
      absent: share of the examples whose own phrases are left out; as many more distractors take their
        places, so that the length of a list does not tell.
      salt: makes the draws differ between tasks; the task's name.
      phrases: field with the example's own phrases; an empty one has none.
      separator: stands between them.
      joiner: stands between the phrases of the list.

    Raises:
      UserError: there is no such field, or the pool cannot be read.
    """
    check_fields(dataset, [phrases], f"task {salt!r}: the phrase list")
    _ = pool.phrases  # A mistake in it is told here, and not by TensorFlow.
    step = functools.partial(
        phrase_lists_on_columns,
        pool=pool,
        distractors=distractors,
        absent=absent,
        salt=salt,
        phrases=phrases,
        separator=separator,
        joiner=joiner,
    )
    return over_columns(dataset, step, strings=["phrase_list"])


def phrase_lists_on_columns(
    columns: Columns,
    *,
    pool: PhrasePool,
    distractors: tuple[int, int],
    absent: float,
    salt: str,
    phrases: str = "phrases",
    separator: str = ";",
    joiner: str = ", ",
) -> Columns:
    """`phrase_lists` on columns."""
    ids = columns["id"]
    own = [_split(value, separator) for value in texts(columns, phrases)]
    least, most = distractors
    wanted = least + buckets(f"{salt}\ncount", ids, most - least + 1)
    left_out = buckets(f"{salt}\nabsent", ids, _SHARES) < absent * _SHARES
    said = np.array([len(names) for names in own], np.int64)
    wanted = wanted + np.where(left_out, said, 0)
    # Of so many different ones, as many as are wanted are none of the example's own.
    drawn = _draw(len(pool), wanted + said, buckets(f"{salt}\ndistractors", ids, _KEYS))
    lists: list[list[str]] = []
    for names, places, count, is_left_out in zip(own, drawn, wanted.tolist(), left_out, strict=True):
        mine = {place for name in names for place in pool.places.get(name.casefold(), ())}
        others = [place for place in places if place not in mine] if mine else places
        chosen = pool.phrases[others[:count]].tolist()
        lists.append(chosen if is_left_out else names + chosen)
    listed = [joiner.join(names) for names in _shuffle(lists, buckets(f"{salt}\norder", ids, _KEYS))]
    return columns | {"phrase_list": np.array(listed, object)}


def rare_words(dataset: Dataset, *, common: PhrasePool, text: str = "text", separator: str = ";") -> Dataset:
    """Adds the field `phrases`: the words of a text that are not common, each once.

    Args:
      dataset: references with string fields.
      common: words that are common; case does not count.
      text: field whose words they are.
      separator: stands between them.

    Raises:
      UserError: there is no such field, or the common words cannot be read.
    """
    check_fields(dataset, [text], "the search for rare words")
    _ = common.phrases
    step = functools.partial(rare_words_on_columns, common=common, text=text, separator=separator)
    return over_columns(dataset, step, strings=["phrases"])


def rare_words_on_columns(
    columns: Columns, *, common: PhrasePool, text: str = "text", separator: str = ";"
) -> Columns:
    """`rare_words` on columns."""
    found = [
        separator.join(dict.fromkeys(word for word in value.split() if word not in common))
        for value in texts(columns, text)
    ]
    return columns | {"phrases": np.array(found, object)}


def _split(value: str, separator: str) -> list[str]:
    return list(dict.fromkeys(phrase.strip() for phrase in value.split(separator) if phrase.strip()))


def _draw(size: int, counts: np.ndarray, keys: np.ndarray) -> list[list[int]]:
    """Returns so many different numbers of `range(size)` for each key: the start of a permutation."""
    counts = np.minimum(counts, size)
    drawn: list[list[int]] = []
    rows = max(1, _DRAWS // max(1, int(counts.max(initial=0))))
    for start in range(0, len(keys), rows):
        of = slice(start, start + rows)
        drawn += _permuted(counts[of], np.full(len(counts[of]), size), keys[of])
    return drawn


def _shuffle(lists: Sequence[list[str]], keys: np.ndarray) -> list[list[str]]:
    """Returns each list in an order that is drawn from its key."""
    counts = np.array([len(names) for names in lists], np.int64)
    orders = _permuted(counts, counts, keys)
    return [[names[place] for place in order] for names, order in zip(lists, orders, strict=True)]


def _permuted(counts: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> list[list[int]]:
    """Returns the first `counts` of a permutation of `range(sizes)` for each key, int64 [n] each."""
    row = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    place = np.arange(len(row)) - np.repeat(ends - counts, counts)
    values = permute(place, sizes[row], keys.astype(np.uint64)[row]).tolist()
    return [values[end - count : end] for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
