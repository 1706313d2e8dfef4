"""Templates, slots, splits and questions."""

import collections
import random
import re

import numpy as np
import pytest

from slm_jax.demo import sentences
from slm_jax.demo.lexicon import LEXICON, name

COUNTS = {"train": 12_000, "dev": 300, "test": 300}
SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[sentences.Sentence]]:
    return {
        "train": sentences.draw("train", 12_000, 0),
        **{s: sentences.draw(s, 300, 0) for s in ("dev", "test")},
    }


@pytest.mark.parametrize("template", sentences.TEMPLATES, ids=lambda template: template.en.replace(" ", "_"))
def test_templates_name_the_same_slots_once_in_every_language(template: sentences.Template):
    for text in (template.en, template.de, template.es):
        assert sorted(kind for kind, _ in SLOT.findall(text)) == sorted(template.kinds)
        for kind, form in SLOT.findall(text):
            for value in LEXICON[kind]:
                forms = value.de if text is template.de else value.es
                assert text is template.en or forms[form]
    assert len(set(template.kinds)) == len(template.kinds) >= 2


def test_articles_follow_gender_and_case():
    values = {kind: {value.en: value for value in LEXICON[kind]} for kind in LEXICON}
    by_text = {template.en: template for template in sentences.TEMPLATES}
    forgot = sentences.fill(
        by_text["{person} forgot the {item} in the {room}"],
        {
            "person": values["person"]["anna"],
            "item": values["item"]["key"],
            "room": values["room"]["kitchen"],
        },
    )
    assert forgot.translations == {
        "de": "anna hat den schlüssel in der küche vergessen",
        "es": "anna olvidó la llave en la cocina",
    }
    bring = sentences.fill(
        by_text["please bring {food} to the {room}"],
        {kind: values[kind][text] for kind, text in (("food", "soup"), ("room", "office"))},
    )
    assert bring.translations == {
        "de": "bitte bring suppe ins büro",
        "es": "por favor lleva sopa a la oficina",
    }
    at_one = sentences.fill(
        by_text["the {place} closes on {day} at {time}"],
        {
            "place": values["place"]["bank"],
            "day": values["day"]["sunday"],
            "time": values["time"]["one fifteen"],
        },
    )
    assert at_one.translations == {
        "de": "die bank schließt am sonntag um ein uhr fünfzehn",
        "es": "el banco cierra el domingo a la una y quince",
    }


def test_splits_share_no_sentence_and_no_combination_of_values(drawn):
    texts = {split: {sentence.text for sentence in drawn[split]} for split in drawn}
    combinations = {split: {tuple(sorted(s.slots.items())) for s in drawn[split]} for split in drawn}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not texts[one] & texts[other]
        assert not combinations[one] & combinations[other]
    assert {split: len(found) for split, found in texts.items()} == COUNTS


def test_training_has_seen_every_word(drawn):
    def words(split: str, language: str) -> set[str]:
        texts = [s.text if language == "en" else s.translations[language] for s in drawn[split]]
        return {word for text in texts for word in text.split()}

    for language in sentences.LANGUAGES:
        known = words("train", language)
        assert len(known) > 250
        assert words("dev", language) | words("test", language) <= known


def test_templates_and_values_are_balanced(drawn):
    kinds = collections.Counter(tuple(s.slots) for s in drawn["train"][:3600])
    expected = collections.Counter(template.kinds for template in sentences.TEMPLATES)
    for kind, templates in expected.items():
        assert kinds[kind] >= 0.9 * templates * 3600 / len(sentences.TEMPLATES)
    cities = collections.Counter(s.slots["city"] for s in drawn["train"] if "city" in s.slots)
    assert max(cities.values()) < 1.5 * min(cities.values())


def test_texts_are_in_normal_form(drawn):
    for sentence in drawn["dev"]:
        for text in (sentence.text, *sentence.translations.values()):
            assert text == sentences.normalize(text)
    assert sentences.normalize("  Don’t  GO—to Mu\u0308nchen! ") == "dont go to münchen"


def test_questions_ask_for_what_the_sentence_names(drawn, rng: np.random.Generator):
    random_numbers = random.Random(int(rng.integers(2**31)))
    kinds = {text: kind for kind, text in sentences.QUESTIONS.items()}
    assert len(kinds) == len(sentences.QUESTIONS) and kinds.keys() and set(kinds.values()) == set(LEXICON)
    without = 0
    for sentence in drawn["train"]:
        question, answer = sentences.question(sentence, random_numbers)
        if answer == sentences.NO_ANSWER:
            without += 1
            assert kinds[question] not in sentence.slots
        else:
            assert f" {answer} " in f" {sentence.text} "
            assert answer == sentence.slots[kinds[question]]
    assert 0.01 < without / len(drawn["train"]) < 0.05


def test_a_longer_draw_starts_with_the_shorter_one(rng: np.random.Generator):
    seed, count = int(rng.integers(2**31)), int(rng.integers(50, 200))
    assert sentences.draw("train", 2 * count, seed)[:count] == sentences.draw("train", count, seed)
    assert sentences.draw("train", count, seed) != sentences.draw("train", count, seed + 1)


def test_other_names_can_fill_the_slots():
    names = ("zorvik", "melumba", "tarquil", "ibrodan")
    invented = {**LEXICON, "person": tuple(name(text) for text in names)}
    templates = [template for template in sentences.TEMPLATES if "person" in template.kinds]
    drawn = sentences.draw("test", 30, 0, templates, invented)
    assert {sentence.slots["person"] for sentence in drawn} <= set(names)
    for sentence in drawn:
        assert all(sentence.slots["person"] in text.split() for text in sentence.translations.values())


def test_too_many_sentences_are_refused():
    with pytest.raises(ValueError, match="there are"):
        sentences.draw("dev", 5000, 0, sentences.TEMPLATES[:1])
