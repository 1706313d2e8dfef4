"""Prompt templates as data: packaged sets, files of a user's own, order of speech and text, mistakes."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from slm_jax.data.preprocessors import LANGUAGE_NAMES, template_fields
from slm_jax.errors import UserError
from slm_jax.tasks import templates as prompts


def test_packaged_sets_hold_templates_that_are_well_formed():
    sets = {name: prompts.load_templates(name) for name in prompts.packaged_sets()}
    assert {"asr", "ast", "biasing", "spoken_question", "text_translation"} <= set(sets)
    for name, by_language in sets.items():
        assert by_language["en"], name
        fields = {
            language: {field for template in some for field in template_fields(template)}
            for language, some in by_language.items()
        }
        # What is read in one language can be read in English as well.
        assert all(found <= fields["en"] for found in fields.values()), (name, fields)
        is_spoken = {("{speech}" in template) for some in by_language.values() for template in some}
        assert is_spoken == {not name.startswith("text_")}, name
    for name in ("asr", "ast"):
        assert set(sets[name]) == {"en", "de", "fr", "es"}
        assert all(len(some) >= 4 for some in sets[name].values())


def test_languages_have_names_in_every_language_of_the_prompts():
    for language in ("de", "fr", "es"):
        names = prompts.names_in(language)
        assert set(names) == set(LANGUAGE_NAMES)
        assert all(name.strip() == name != "" for name in names.values())
    assert prompts.names_in("en") is LANGUAGE_NAMES is prompts.names_in("xx")
    assert prompts.names_in("de-AT")["fr"] == "Französisch"


def test_a_file_a_list_and_a_mapping(tmp_path):
    sets = {"en": ["Say it: {speech}"], "pt-BR": ["Diga: {speech}", "{speech} Diga."]}
    expected = {language: tuple(some) for language, some in sets.items()}
    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps(sets))
    as_toml = tmp_path / "mine.toml"
    as_toml.write_text('en = ["Say it: {speech}"]\npt-BR = ["Diga: {speech}", "{speech} Diga."]\n')
    for given in (as_json, str(as_json), as_toml, sets):
        assert prompts.load_templates(given) == expected
    assert prompts.load_templates(["a {speech}"]) == {prompts.ANY: ("a {speech}",)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"en": ["a"', r"mine.json are no JSON \("),
        ('["a {speech}"]', "expected an object of language: list of templates"),
        ("{}", "hold no language"),
        ('{"english please": ["a"]}', "'english please' is no code of a language"),
        ('{"en": "a {speech}"}', r"'en': found 'a \{speech\}', expected a list of templates"),
        ('{"en": []}', "'en': the list of templates is empty"),
        ('{"en": [3]}', "'en': template 3 is no text"),
        ('{"en": ["a", "b", "a"]}', "'en': template 'a' stands twice"),
        ('{"en": ["a {speech"]}', r"'en': prompt template 'a \{speech': expected '\}'"),
        ('{"en": ["{speech} {speech}"]}', "stands twice, expected once at most"),
        ('{"en": ["{}"]}', "braces are empty"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, told):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        prompts.load_templates(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_mistakes_in_the_name_of_a_set_or_file(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "bad.toml").write_bytes(b"en = [")
    (tmp_path / "latin.json").write_bytes(b'{"en": ["\xff"]}')
    for given, told in (
        ("asrr", "no set of prompt templates 'asrr'.*did you mean 'asr'"),
        ("Transcribe: {speech}", "expected the name of a packaged one, a .json or .toml file, or a list"),
        (str(tmp_path / "mien.json"), "mien.json do not exist; did you mean 'mine.json'"),
        (Path(tmp_path / "mine.txt"), "mine.txt: expected a .json or .toml file"),
        (str(tmp_path / "bad.toml"), r"bad.toml are no TOML \("),
        (tmp_path / "latin.json", "latin.json are no JSON"),
        (3, "found 3, expected a list of templates"),
    ):
        with pytest.raises(UserError, match=told):
            prompts.load_templates(cast(Any, given))


def test_the_language_of_the_prompts_is_one_that_there_is():
    sets = {"de": ["a {speech}"], "en": ["b {speech}"], "fr": ["c {speech}"]}
    assert prompts.in_language(sets, "de") == ("a {speech}",)
    assert list(prompts.by_language(sets)) == ["en", "de", "fr"]
    with pytest.raises(
        UserError, match="prompt_language is 'dee', and there are no templates in it; did you"
    ):
        prompts.in_language(sets, "dee")
    with pytest.raises(UserError, match="needs templates by language"):
        prompts.by_language(prompts.load_templates(["a {speech}"]))
    assert prompts.in_language(prompts.load_templates(["a {speech}"]), "de") == ("a {speech}",)


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        ("Transcribe: {speech}", "{speech} Transcribe", "Transcribe: {speech}"),
        ("{speech} What follows?", "{speech} What follows?", "What follows? {speech}"),
        ("In this {speech} who speaks?", "{speech} In this who speaks?", "In this who speaks? {speech}"),
        ("List {x} of {speech} now", "{speech} List {x} of now", "List {x} of now: {speech}"),
        ("{speech}", "{speech}", "{speech}"),
        ("no speech {x}", "no speech {x}", "no speech {x}"),
    ],
)
def test_order_of_speech_and_text(template, first, last):
    assert prompts.in_order([template], "template") == (template,)
    assert prompts.in_order([template], "speech_first") == (first,)
    assert prompts.in_order([template], "speech_last") == (last,)


def test_an_unknown_order_is_refused():
    with pytest.raises(UserError, match=re.escape("order is 'speech_frist'; did you mean 'speech_first'?")):
        prompts.in_order(["{speech}"], "speech_frist")


def test_names_fill_templates_in_their_own_language():
    sets = {"en": ["Into {target_language}: {speech}"], "de": ["Auf {target_language}: {speech}"]}
    assert prompts.with_target_language(sets, "fr", "en") == {
        "en": ("Into French: {speech}",),
        "de": ("Auf Französisch: {speech}",),
    }
    # Templates without a language are in that of the prompt.
    assert prompts.with_target_language({"": ["{target_language}"]}, "de", "fr") == {"": ("allemand",)}
    assert prompts.filled({"en": ["{labels} {speech}"]}, "labels", "{a}, b") == {"en": ("{{a}}, b {speech}",)}
