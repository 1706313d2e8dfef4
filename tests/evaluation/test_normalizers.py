"""The declared normalisers against texts written out by hand, and properties that hold for any text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.errors import UserError
from slm_jax.evaluation.normalizers import NORMALIZERS, normalizer


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Hello,  World!", "en", "hello world"),
        ("Don\u2019t 'quote' rock 'n' roll", "en", "don't quote rock n roll"),
        ("Don't", "de", "don t"),
        ("L'\u00e9t\u00e9 \u2014 \u00e0 50\u00a0\u20ac", "fr", "l'\u00e9t\u00e9 \u00e0 50"),
        ("Stra\u00dfe nach K\u00d6LN", "de", "stra\u00dfe nach k\u00f6ln"),
        ("\u00bfD\u00f3nde est\u00e1?", "es", "d\u00f3nde est\u00e1"),
        ("ISPARTA \u0130zmir", "tr", "\u0131sparta izmir"),
        ("\u0130zmir", "en", "izmir"),
        ("\uff21\uff22\uff11", "", "ab1"),
        ("\u4f60\u597d\uff0cABC", "zh", "\u4f60 \u597d abc"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947!", "hi", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("Stra\u00dfe", "de-AT", "stra\u00dfe"),
        (" . ", "en", ""),
    ],
)
def test_basic_writes_what_was_said(text: str, language: str, expected: str):
    assert normalizer("basic")(text, language) == unicodedata.normalize("NFKC", expected)


def test_cased_and_none_keep_what_they_declare():
    text = "Hello,  \uff37orld!"
    assert normalizer("cased")(text, "en") == "Hello, World!"
    assert normalizer("none")(text, "en") == "Hello, \uff37orld!"


@settings(deadline=None)
@given(st.text(), st.sampled_from(["", "de", "en", "ja", "tr"]), st.sampled_from(sorted(NORMALIZERS)))
def test_a_normalised_text_stays_as_it_is(text: str, language: str, name: str):
    once = normalizer(name)(text, language)
    assert normalizer(name)(once, language) == once
    assert once == " ".join(once.split())


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(UserError, match="no text normaliser 'basics'; did you mean 'basic'"):
        normalizer("basics")


def test_the_description_names_every_step():
    assert normalizer("basic").describe() == (
        "basic: NFKC, lower-case, no punctuation, unspaced languages by character, single spaces"
    )
    assert normalizer("none").describe() == "none: single spaces"
