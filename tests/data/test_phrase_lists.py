"""Phrase lists: whose phrases they hold, in what numbers, and the same as columns and as a dataset."""

import numpy as np
import pytest

from slm_jax.data import biasing
from slm_jax.data.columnwise import Columns, buckets
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.sources import ManifestSource
from slm_jax.errors import UserError

SETTINGS = {"absent": 0.3, "salt": "task"}


def columns_of(rng: np.random.Generator, count: int, names: int = 40) -> Columns:
    own = [
        " ;".join(f"name {k}" for k in rng.choice(names, rng.integers(0, 4), replace=False))
        for _ in range(count)
    ]
    return {
        "id": np.array([f"é{rng.integers(10**9)}-{i}" for i in range(count)], object),
        "phrases": np.array(own, object),
        "samples": rng.integers(0, 100, count).astype(np.int32),
    }


def dataset_of(columns: Columns):
    return tf.data.Dataset.from_tensor_slices({name: tf.constant(v) for name, v in columns.items()})


@pytest.fixture
def pool(tmp_path) -> biasing.PhraseFile:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"name {i}" for i in range(60)) + "\n\nname 3\nNAME 1\n", encoding="utf-8")
    return biasing.PhraseFile(path)


def split(value: str) -> list[str]:
    return [phrase.strip() for phrase in value.split(";") if phrase.strip()]


def test_a_list_holds_the_phrases_of_the_example_and_as_many_others_as_are_asked_for(pool, rng):
    columns = columns_of(rng, 500)
    made = biasing.phrase_lists_on_columns(
        columns, pool=pool, distractors=(5, 9), joiner="|", phrases="phrases", **SETTINGS
    )
    absent, counts = 0, set()
    for own, listed in zip(map(split, columns["phrases"]), made["phrase_list"], strict=True):
        listed = listed.split("|")
        assert len({phrase.casefold() for phrase in listed} | {"name 1"}) >= len(listed) - 1
        assert len(listed) == len(set(listed))
        present = [phrase for phrase in listed if phrase in own]
        assert sorted(present) in (sorted(own), [])
        others = [phrase for phrase in listed if phrase not in own]
        # Those that are left out are made up for.
        assert 5 <= len(others) - (len(own) if not present else 0) <= 9
        counts.add(len(listed) - len(own))
        absent += bool(own) and not present
    assert counts == {5, 6, 7, 8, 9}
    with_phrases = sum(bool(value) for value in columns["phrases"])
    assert 0.15 < absent / with_phrases < 0.45


def test_the_order_of_a_list_does_not_tell_whose_phrases_they_are(pool, rng):
    columns = columns_of(rng, 600)
    made = biasing.phrase_lists_on_columns(
        columns, pool=pool, distractors=(9, 9), absent=0.0, salt="task", joiner="|"
    )
    places = [
        listed.split("|").index(split(own)[0])
        for own, listed in zip(columns["phrases"], made["phrase_list"], strict=True)
        if own
    ]
    assert set(places) >= set(range(10))
    assert 2.5 < np.mean(places) < 7.5


def test_each_phrase_of_the_pool_is_drawn_about_as_often(rng, tmp_path):
    path = tmp_path / "pool.txt"
    path.write_text("\n".join(map(str, range(20))))
    columns = columns_of(rng, 2000)
    made = biasing.phrase_lists_on_columns(
        columns, pool=biasing.PhraseFile(path), distractors=(4, 4), absent=0.0, salt="s", phrases="none"
    )
    drawn = np.bincount([int(number) for listed in made["phrase_list"] for number in listed.split(", ")])
    assert len(drawn) == 20 and drawn.min() > 300 and drawn.max() < 500


def test_draws_depend_on_the_example_and_the_salt_alone(pool, rng):
    columns = columns_of(rng, 300)
    settings = {"pool": pool, "distractors": (3, 6), "absent": 0.5}
    whole = biasing.phrase_lists_on_columns(columns, salt="a", **settings)["phrase_list"]
    order = rng.permutation(300)
    parts = [
        biasing.phrase_lists_on_columns(
            {name: values[some] for name, values in columns.items()}, salt="a", **settings
        )["phrase_list"]
        for some in np.split(order, [1, 120])
    ]
    assert np.concatenate(parts).tolist() == whole[order].tolist()
    other = biasing.phrase_lists_on_columns(columns, salt="b", **settings)["phrase_list"]
    assert (other != whole).mean() > 0.9


def test_many_distractors_are_drawn_in_pieces(pool, rng, monkeypatch):
    columns = columns_of(rng, 50)
    settings = {"pool": pool, "distractors": (10, 30), "absent": 0.5, "salt": "a"}
    whole = biasing.phrase_lists_on_columns(columns, **settings)["phrase_list"].tolist()
    monkeypatch.setattr(biasing, "_DRAWS", 64)
    assert biasing.phrase_lists_on_columns(columns, **settings)["phrase_list"].tolist() == whole


def test_a_small_pool_gives_all_it_has(tmp_path, rng):
    path = tmp_path / "pool.txt"
    path.write_text("a\nb\nname 1")
    columns = columns_of(rng, 20)
    columns["phrases"][:] = "name 1"
    made = biasing.phrase_lists_on_columns(
        columns, pool=biasing.PhraseFile(path), distractors=(10, 10), absent=0.0, salt="s"
    )
    assert {tuple(sorted(listed.split(", "))) for listed in made["phrase_list"]} == {("a", "b", "name 1")}
    empty = {name: values[:0] for name, values in columns.items()}
    none = biasing.phrase_lists_on_columns(
        empty, pool=biasing.PhraseFile(path), distractors=(0, 0), absent=0.0, salt="s"
    )
    assert none["phrase_list"].tolist() == []


def test_columns_and_datasets_are_given_the_same(pool, rng):
    columns = columns_of(rng, 1500)
    settings = {"pool": pool, "distractors": (0, 7), **SETTINGS}
    expected = biasing.phrase_lists_on_columns(columns, **settings)
    rows = list(biasing.phrase_lists(dataset_of(columns), **settings).as_numpy_iterator())
    assert [row["phrase_list"].decode() for row in rows] == expected["phrase_list"].tolist()
    assert [row["id"].decode() for row in rows] == columns["id"].tolist()
    assert [row["samples"] for row in rows] == columns["samples"].tolist()
    with pytest.raises(UserError, match="the phrase list reads field 'phrase'; did you mean 'phrases'"):
        biasing.phrase_lists(dataset_of(columns), **settings, phrases="phrase")


def test_rare_words_are_those_that_are_not_common(tmp_path, rng):
    path = tmp_path / "common.txt"
    path.write_text("the\nFox\nover")
    common = biasing.PhraseFile(path)
    columns: Columns = {
        "id": np.array(["a", "b", "c"], object),
        "text": np.array(["the quick FOX quick Brown", "over the", ""], object),
    }
    made = biasing.rare_words_on_columns(columns, common=common)
    assert made["phrases"].tolist() == ["quick;Brown", "", ""]
    rows = list(biasing.rare_words(dataset_of(columns), common=common).as_numpy_iterator())
    assert [row["phrases"].decode() for row in rows] == made["phrases"].tolist()
    assert ("FOX" in common, "quick" in common, len(common), list(common)) == (
        True,
        False,
        3,
        ["the", "Fox", "over"],
    )


def test_pools_tell_apart_what_they_hold(tmp_path, write_manifest):
    path = tmp_path / "pool.txt"
    path.write_text("a\nb")
    before = repr(biasing.PhraseFile(path))
    assert before == repr(biasing.PhraseFile(path)) and biasing.PhraseFile(path) == biasing.PhraseFile(path)
    path.write_text("a\nc")
    assert repr(biasing.PhraseFile(path)) != before

    lines = [{"text": "x", "phrases": "anna; bo"}, {"text": "y", "phrases": "bo;;carl"}, {"text": "z"}]
    pools = [
        biasing.SourcePhrases(ManifestSource({"train": write_manifest(lines)}), "train", "phrases", separator)
        for separator in (";", ";", ",")
    ]
    assert pools[0].phrases.tolist() == ["anna", "bo", "carl"]
    assert pools[0] == pools[1] != pools[2] and repr(pools[0]) == repr(pools[1]) != repr(pools[2])
    before = repr(pools[0])
    write_manifest([*lines, {"text": "more"}])
    assert repr(pools[0]) != before


def test_mistakes_in_a_pool(tmp_path, write_manifest):
    blank, latin = tmp_path / "blank.txt", tmp_path / "latin.txt"
    blank.write_text("\n \n")
    latin.write_bytes(b"a\n\xff")
    for path, told in (
        (tmp_path / "none.txt", "none.txt cannot be read: No such file"),
        (blank, "blank.txt holds no phrases"),
        (latin, "latin.txt is not UTF-8 text: byte 2"),
    ):
        with pytest.raises(UserError, match=told):
            _ = biasing.PhraseFile(path).phrases
    source = ManifestSource({"train": write_manifest([{"text": "x"}])})
    with pytest.raises(UserError, match="field 'phrases' of split 'train' holds no phrases"):
        _ = biasing.SourcePhrases(source, "train", "phrases", ";").phrases


def test_buckets_are_those_of_seqio_preprocessors(rng):
    values = np.array([f"ü{number}" for number in rng.integers(0, 10**9, 50)], object)
    expected = [
        int(tf.strings.to_hash_bucket_fast(tf.strings.join(["salt", value], "\n"), 7)) for value in values
    ]
    assert buckets("salt", values, 7).tolist() == expected
