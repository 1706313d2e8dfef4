"""Preprocessors over columns: what each makes, and that datasets are given the same."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from slm_jax.data import continuation, labels, prompt_languages, same_language
from slm_jax.data.columns import ON_COLUMNS
from slm_jax.data.columnwise import Columns
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.preprocessors import LANGUAGE_NAMES, render_prompts
from slm_jax.errors import UserError

NAMES = {"en": LANGUAGE_NAMES, "de": {"en": "Englisch", "de": "Deutsch"}, "fr": {"en": "anglais"}}
TEMPLATES = {
    "en": ("Say {text}: {speech}", "{speech} in {language_name}", "{{x}} {speech}"),
    "de": ("Sage es auf {language_name}: {speech} {text}",),
    "fr": ("{speech}", "Dites: {speech}"),
}


def text(*values: str) -> np.ndarray:
    return np.array(values, object)


def rows_of(columns: Columns, step: Callable) -> list[dict]:
    """What the SeqIO preprocessor makes of the same references, decoded."""
    dataset = tf.data.Dataset.from_tensor_slices({name: tf.constant(v) for name, v in columns.items()})
    rows = step(dataset).as_numpy_iterator()
    return [
        {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
        for row in rows
    ]


def assert_same(columns: Columns, preprocessor: Callable, on_columns: Callable, **settings) -> Columns:
    made = on_columns(columns, **settings)
    rows = rows_of(columns, functools.partial(preprocessor, **settings))
    assert set(rows[0]) == set(made)
    for name, values in made.items():
        assert [row[name] for row in rows] == values.tolist(), name
    return made


def spoken(rng: np.random.Generator, count: int) -> Columns:
    return {
        "id": text(*(f"ß{rng.integers(10**9)}-{i}" for i in range(count))),
        "language": rng.choice(text("en", "de", "fr", "de-AT", "xx", ""), count),
        "text": rng.choice(text("grün", "{x} {speech}", ""), count),
    }


def test_prompts_follow_the_language_of_the_speech(rng):
    columns = spoken(rng, 400)
    named = assert_same(
        columns, prompt_languages.name_languages, prompt_languages.name_languages_on_columns, names=NAMES
    )
    expected = {
        "en": ("en", "English"),
        "de": ("de", "Deutsch"),
        "fr": ("fr", "fr"),
        "de-AT": ("de", "Deutsch"),
    }
    for language, prompt, name in zip(
        columns["language"], named["prompt_language"], named["language_name"], strict=True
    ):
        # A language without templates is asked about in the first.
        assert (prompt, name) == expected.get(language, ("en", language))
    made = assert_same(
        named,
        prompt_languages.choose_prompts,
        prompt_languages.choose_prompts_on_columns,
        templates=TEMPLATES,
        salt="task",
    )
    asked = {language: set() for language in TEMPLATES}
    for i, language in enumerate(made["prompt_language"]):
        filled = {name: made[name][i] for name in ("text", "language_name")}
        possible = [template.format(**filled, speech="\0") for template in TEMPLATES[language]]
        found = f"{made['prompt_head'][i]}\0{made['prompt_tail'][i]}"
        assert found in possible
        asked[language].add(possible.index(found))
        if not filled["language_name"]:
            # A prompt would say "in " and nothing.
            assert found != "\0 in "
    assert {language: len(numbers) for language, numbers in asked.items()} == {"en": 3, "de": 1, "fr": 2}


def test_a_reference_of_unknown_language_has_no_prompt_that_names_it(rng):
    columns = spoken(rng, 200)
    columns["language_name"] = np.where(columns["language"] == "en", "English", "").astype(object)
    settings = {"templates": TEMPLATES["en"], "target": "{text}", "salt": "task"}
    rows = rows_of(columns, functools.partial(render_prompts, **settings))
    made = ON_COLUMNS[render_prompts](columns, **settings)
    for name in ("prompt_before", "prompt_after", "targets_pretokenized"):
        assert [row[name] for row in rows] == made[name].tolist()
    names = {(row["language_name"], row["prompt_after"].startswith(" in ")) for row in rows}
    assert names == {("English", True), ("English", False), ("", False)}
    # Where every prompt names it, there is no other.
    alone = rows_of(
        columns, functools.partial(render_prompts, **settings | {"templates": TEMPLATES["en"][1:2]})
    )
    assert {row["prompt_after"] for row in alone} == {" in English", " in "}


def test_a_prompt_is_chosen_and_joined_as_without_languages(rng):
    columns = spoken(rng, 100) | {"language": text(*["en"] * 100)}
    templates = TEMPLATES["en"]
    plain = rows_of(
        columns | {"language_name": text(*["English"] * 100)},
        functools.partial(render_prompts, templates=templates, target="{text}", salt="task"),
    )
    named = prompt_languages.name_languages_on_columns(columns, names=NAMES)
    chosen = prompt_languages.choose_prompts_on_columns(named, templates={"en": templates}, salt="task")
    joined = rows_of(
        chosen,
        functools.partial(
            render_prompts, templates=(prompt_languages.PROMPT_TEMPLATE,), target="{text}", salt="task"
        ),
    )
    for field in ("prompt_before", "prompt_after", "inputs_pretokenized", "targets_pretokenized"):
        assert [row[field] for row in joined] == [row[field] for row in plain]


def test_mistakes_in_prompts_by_language(rng):
    named = prompt_languages.name_languages_on_columns(spoken(rng, 3), names=NAMES)
    for templates, told in (
        (
            {"en": ["{texd} {speech}"]},
            "prompt template '{texd} {speech}' reads field 'texd'; did you mean 'text'",
        ),
        ({"en": ["{speech}"], "de": ["kein Platz"]}, "'kein Platz' has no {speech} and '{speech}' has"),
    ):
        choose = functools.partial(prompt_languages.choose_prompts, templates=templates, salt="t")
        with pytest.raises(UserError) as error:
            rows_of(named, choose)
        assert told in str(error.value)


def test_speech_is_cut_where_the_manifest_says():
    columns: Columns = {
        "id": text(*"abcdefgh"),
        "samples": np.array([32_000] * 8, np.int32),
        "part": text("", "t=3.5,5.5", "bytes=4,9&t=1.0", "row=2&column=a", "", "", "", "t=a"),
        "text": text(*["one two three four"] * 8),
        "reject": text(*[""] * 5, "unknown_language", "", ""),
        "cut": text("0.5", "1.25", "1", "1.5", "2.0", "x", "-1", "1"),
        "said": text("2", "1", "3", "4", "2", "2", "2", "0"),
    }
    made = assert_same(
        columns, continuation.cut_speech, continuation.cut_speech_on_columns, cut="cut", words="said"
    )
    assert made["part"].tolist()[:4] == [
        "t=0.0,0.5", "t=3.5,4.75", "bytes=4,9&t=1.0,2.0", "row=2&column=a&t=0.0,1.5",
    ]  # fmt: skip
    assert made["samples"].tolist() == [8_000, 20_000, 16_000, 24_000, 32_000, 32_000, 32_000, 16_000]
    assert made["text_before"].tolist()[:3] == ["one two", "one", "one two three"]
    assert made["continuation"].tolist()[:3] == ["three four", "two three four", "four"]
    # All words before the cut, a cut at the end, no number, before the start, no word before the cut.
    bad = ["", "", "", "bad_cut", "bad_cut", "unknown_language", "bad_cut", "bad_cut"]
    assert made["reject"].tolist() == bad
    alone = assert_same(columns, continuation.cut_speech, continuation.cut_speech_on_columns, cut="cut")
    assert "continuation" not in alone
    assert alone["reject"].tolist() == ["", "", "", "", "bad_cut", "unknown_language", "bad_cut", ""]
    with pytest.raises(UserError, match="the cut of the speech reads field 'cat'; did you mean 'cut'"):
        rows_of(columns, functools.partial(continuation.cut_speech, cut="cat"))


def test_labels_that_are_not_known_are_rejected():
    columns: Columns = {
        "id": text(*"abcd"),
        "label": text("yes", "no", "YES", ""),
        "reject": text("", "unknown_language", "", ""),
    }
    made = assert_same(
        columns, labels.reject_labels, labels.reject_labels_on_columns, field="label", labels=("yes", "no")
    )
    assert made["reject"].tolist() == ["", "unknown_language", "unknown_label", "unknown_label"]
    del columns["reject"]
    made = assert_same(
        columns, labels.reject_labels, labels.reject_labels_on_columns, field="label", labels=("no",)
    )
    assert made["reject"].tolist() == ["unknown_label", "", "unknown_label", "unknown_label"]


def test_speech_in_the_language_of_the_translation_is_transcribed():
    columns: Columns = {
        "id": text(*"abcd"),
        "language": text("en", "en-US", "de", "en"),
        "text": text("hi", "hello", "hallo", "hey"),
        "translations.en": text("", "", "hello", "given"),
    }
    settings = {"language": "en"}
    pair = (same_language.transcribe_same_language, same_language.transcribe_same_language_on_columns)
    made = assert_same(columns, *pair, **settings)
    assert made["translations.en"].tolist() == ["hi", "hello", "hello", "given"]
    del columns["translations.en"]
    made = assert_same(columns, *pair, **settings)
    assert made["translations.en"].tolist() == ["hi", "hello", "", "hey"]
