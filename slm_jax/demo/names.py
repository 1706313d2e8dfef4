"""Invented names: words that no vocabulary knows, said aloud, misheard, and listed among others."""

import functools
import hashlib
import random
from collections.abc import Sequence

from slm_jax.demo.lexicon import LEXICON

# Names in one phrase list: the one that is spoken, and others.
LISTED = 3

_FIRST = (
    "b",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gr",
    "tr",
)
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "", "", "n", "r", "l")
_LAST = ("a", "o", "i", "an", "en", "in", "on", "us", "as", "is", "or", "el")
# Letters that are heard for one another.
_ALIKE = {
    "a": "eo", "e": "ia", "i": "eu", "o": "ua", "u": "oi", "b": "pd", "p": "bt", "d": "tb", "t": "dk",
    "g": "kd", "k": "gt", "v": "fb", "f": "vs", "z": "sj", "s": "zf", "m": "nl", "n": "ml", "l": "rn",
    "r": "lv", "h": "fk", "j": "zg",
}  # fmt: skip
# Tenths of all names, as of all combinations of slot values.
_TENTHS = {"test": (0,), "dev": (1,), "train": tuple(range(2, 10))}


@functools.cache
def invented_names(split: str, count: int) -> tuple[str, ...]:
    """Returns `count` distinct names of `split`; no name is in two splits.

    Args:
      split: `train`, `dev` or `test`.
      count: how many; more of them start with the same names.
    """
    rng = random.Random("names")
    known = {value.en for values in LEXICON.values() for value in values}
    names: dict[str, None] = {}
    while len(names) < count:
        drawn = rng.choice(_FIRST)
        for _ in range(rng.choice((1, 1, 2))):
            drawn += rng.choice(_VOWELS) + rng.choice(_CODAS) + rng.choice(_ONSETS)
        drawn += rng.choice(_LAST)
        if drawn not in known and hashlib.sha256(drawn.encode()).digest()[0] % 10 in _TENTHS[split]:
            names[drawn] = None
    return tuple(names)


def misheard(word: str, rng: random.Random) -> str:
    """Returns `word` with one to three letters that sound otherwise, are lost, or are said twice."""
    letters = list(word)
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        at = rng.randrange(len(letters))
        kind = rng.random()
        if kind < 0.8:
            letters[at] = rng.choice(_ALIKE.get(letters[at], letters[at]))
        elif kind < 0.9 and len(letters) > 3:
            del letters[at]
        else:
            letters.insert(at, letters[at])
    return "".join(letters)


def listed(word: str, others: Sequence[str], rng: random.Random) -> str:
    """Returns a phrase list in random order: `word` and `LISTED - 1` of `others`, parted by commas."""
    drawn = [word, *rng.sample([other for other in others if other != word], LISTED - 1)]
    rng.shuffle(drawn)
    return ", ".join(drawn)
