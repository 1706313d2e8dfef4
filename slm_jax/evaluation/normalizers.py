"""Text normalisers: declared by name, so that a score says what was done to both sides before counting."""

import dataclasses
import itertools
import unicodedata

from slm_jax.errors import UserError, nearest

# Elision and contraction: the apostrophe belongs to the word.
_APOSTROPHE_LANGUAGES = frozenset({"ca", "en", "fr", "ga", "it", "oc", "uk"})
# No spaces between words: "words" are characters, so that WER does not depend on a segmenter.
_UNSPACED_LANGUAGES = frozenset({"bo", "ja", "km", "lo", "my", "th", "yue", "zh"})
_DOTTED_I_LANGUAGES = frozenset({"az", "tr"})
_APOSTROPHES = "'\u2019\u02bc\uff07"


@dataclasses.dataclass(frozen=True)
class TextNormalizer:
    """What is done to a text before words or characters are counted.

    Attributes:
      name: recorded with every score.
      unicode_form: a form of Unicode normalisation, such as NFKC, or "" for none.
      lower: folds case, by the rules of the language.
      remove_punctuation: replaces punctuation and symbols by spaces; marks that belong to a letter stay.
      split_unspaced: puts spaces between the characters of languages written without them.
    """

    name: str
    unicode_form: str = "NFKC"
    lower: bool = True
    remove_punctuation: bool = True
    split_unspaced: bool = True

    def __call__(self, text: str, language: str = "") -> str:
        """Returns `text` normalised, with single spaces; `language` is an ISO 639 code or a BCP 47 tag."""
        language = language.replace("_", "-").split("-")[0].lower()
        if self.unicode_form:
            text = unicodedata.normalize(self.unicode_form, text)  # pyright: ignore[reportArgumentType]
        if self.lower:
            text = _lower(text, language)
        if self.remove_punctuation:
            text = _without_punctuation(text, language in _APOSTROPHE_LANGUAGES)
        if self.split_unspaced and language in _UNSPACED_LANGUAGES:
            text = _spaced(text)
        return " ".join(text.split())

    def describe(self) -> str:
        """Returns the declaration in one line, such as `basic: NFKC, lower-case, no punctuation`."""
        steps = [
            self.unicode_form,
            "lower-case" * self.lower,
            "no punctuation" * self.remove_punctuation,
            "unspaced languages by character" * self.split_unspaced,
            "single spaces",
        ]
        return f"{self.name}: {', '.join(step for step in steps if step)}"


NORMALIZERS = {
    normalizer.name: normalizer
    for normalizer in (
        TextNormalizer("basic"),
        TextNormalizer("cased", lower=False, remove_punctuation=False),
        TextNormalizer("none", unicode_form="", lower=False, remove_punctuation=False, split_unspaced=False),
    )
}


def normalizer(name: str) -> TextNormalizer:
    """Returns the declared normaliser of that name.

    Raises:
      UserError: no such normaliser.
    """
    if name not in NORMALIZERS:
        raise UserError(f"normalizer: no text normaliser {name!r}{nearest(name, NORMALIZERS)}")
    return NORMALIZERS[name]


def _lower(text: str, language: str) -> str:
    if language in _DOTTED_I_LANGUAGES:
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    # Lowering a dotted capital leaves a combining dot, which is not a letter of any other language.
    return text.lower().replace("i\u0307", "i")


def _without_punctuation(text: str, keep_apostrophes: bool) -> str:
    kept = []
    for position, letter in enumerate(text):
        category = unicodedata.category(letter)[0]
        if category not in "PSCZ":
            kept.append(letter)
        elif keep_apostrophes and letter in _APOSTROPHES and _inside_a_word(text, position):
            kept.append("'")
        else:
            kept.append(" ")
    return "".join(kept)


def _inside_a_word(text: str, position: int) -> bool:
    around = text[max(position - 1, 0) : position] + text[position + 1 : position + 2]
    return len(around) == 2 and around.isalnum()


def _spaced(text: str) -> str:
    """Parts every two characters, but not a mark from its letter, nor Latin letters and digits in a run."""
    spaced = text[:1]
    for before, letter in itertools.pairwise(text):
        mark = unicodedata.category(letter)[0] == "M"
        run = before.isascii() and letter.isascii() and before.isalnum() and letter.isalnum()
        spaced += letter if mark or run else f" {letter}"
    return spaced
