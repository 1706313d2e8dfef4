"""Invented names: no split knows another's, no sentence knows any, and misheard they sound alike."""

import random

import numpy as np

from slm_jax.demo import corpus, names, sentences


def test_splits_share_no_name_and_words_are_none():
    drawn = {split: set(names.invented_names(split, 100)) for split in sentences.SPLITS}
    assert all(len(found) == 100 for found in drawn.values())
    assert not drawn["train"] & drawn["dev"] and not drawn["train"] & drawn["test"]
    assert not drawn["dev"] & drawn["test"]
    assert not set().union(*drawn.values()) & sentences.words()
    assert names.invented_names("test", 20) == names.invented_names("test", 100)[:20]


def test_what_is_misheard_differs_but_not_much(rng: np.random.Generator):
    seed, found = int(rng.integers(2**31)), set()
    for number, name in enumerate(names.invented_names("train", 200)):
        heard = names.misheard(name, random.Random(f"{seed}/{number}"))
        different = sum(a != b for a, b in zip(heard, name, strict=True))
        found.add(different)
    assert found == {0, 1, 2}


def test_a_list_holds_the_name_once_among_others(rng: np.random.Generator):
    others = names.invented_names("dev", 50)
    places = set()
    for number in range(60):
        listed = names.listed(others[number % 50], others, random.Random(int(rng.integers(2**31)))).split(
            ", "
        )
        assert len(set(listed)) == names.LISTED and listed.count(others[number % 50]) == 1
        places.add(listed.index(others[number % 50]))
    assert places == {0, 1, 2}


def test_one_sentence_of_seven_in_training_has_an_invented_name():
    drawn = corpus.draw("train", 140, 0)
    named = [
        number for number, sentence in enumerate(drawn) if set(sentence.text.split()) - sentences.words()
    ]
    assert named == list(range(0, 140, 7))
    assert corpus.draw("train", 70, 0) == drawn[:70]
    for split in ("dev", "test"):
        assert not [s for s in corpus.draw(split, 100, 0) if set(s.text.split()) - sentences.words()]
        invented = {s.slots["person"] for s in corpus.draw_named(split, 60, 0)}
        assert len(invented) == 60 and invented <= set(names.invented_names(split, 100))
