"""Invented names: words that no vocabulary knows, said aloud, misheard, and listed among others."""

import functools
import random
from collections.abc import Sequence

from slm_jax.demo.lexicon import LEXICON
from slm_jax.demo.sentences import split_of_key

# Names in one phrase list: the one that is spoken, and others.
LISTED = 3

# Syllables of two letters, spoken as they are written: a g before e or i would be soft, and a last e silent.
_SYLLABLES = tuple(
    consonant + vowel
    for consonant in "bdfgklmnprstvz"
    for vowel in "aeiou"
    if consonant + vowel not in ("ge", "gi")
)
# Letters that are heard for one another.
_ALIKE = {
    "a": "eo", "e": "ia", "i": "eu", "o": "ua", "u": "oi", "b": "pd", "p": "bt", "d": "tb", "t": "dk",
    "g": "kd", "k": "gt", "v": "fb", "f": "vs", "z": "st", "s": "zf", "m": "nl", "n": "ml", "l": "rn",
    "r": "lv",
}  # fmt: skip


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
        drawn = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 3))))
        if drawn not in known and drawn[-1] != "e" and split_of_key(drawn) == split:
            names[drawn] = None
    return tuple(names)


def misheard(name: str, rng: random.Random) -> str:
    """Returns an invented name as it may be heard: with none, one or two letters that sound otherwise."""
    letters = list(name)
    for at in rng.sample(range(len(letters)), rng.choice((0, 1, 2))):
        letters[at] = rng.choice(_ALIKE[letters[at]])
    return "".join(letters)


def listed(word: str, others: Sequence[str], rng: random.Random) -> str:
    """Returns a phrase list in random order: `word` and `LISTED - 1` of `others`, parted by commas."""
    different = [other for other in rng.sample(others, LISTED) if other != word]
    drawn = [word, *different[: LISTED - 1]]
    rng.shuffle(drawn)
    return ", ".join(drawn)
