"""Preprocessors: prompts, tokens with the marker, noise and span corruption."""

import functools
import re
from collections import Counter

import numpy as np
import pytest
import seqio

from slm_jax.data import preprocessors as pre
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.references import SPEECH
from slm_jax.errors import UserError


def dataset_of(**columns):
    return tf.data.Dataset.from_tensor_slices(columns)


def listed(dataset) -> list[dict]:
    return list(dataset.as_numpy_iterator())


@pytest.fixture
def features(vocabulary):
    return {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}


def prompts(dataset, features, templates, target="{text}", speech=pre.SPEECH_MARKER, **options) -> list[dict]:
    rendered = pre.render_prompts(dataset, templates=templates, target=target, salt="task", speech=speech)
    return listed(pre.tokenize_prompts(rendered, features, **options))


def test_speech_stands_at_the_marker(vocabulary, features):
    data = dataset_of(id=["a"], text=["book a table"], language=["en"])
    templates = ["Transcribe the {language} {speech} for our hotel"]
    (found,) = prompts(data, features, templates)
    expected = [*vocabulary.encode("Transcribe the en"), SPEECH, *vocabulary.encode("for our hotel"), 1]
    assert found["inputs"].tolist() == expected
    assert found["targets"].tolist() == [*vocabulary.encode("book a table"), 1]
    assert found["inputs"].dtype == found["targets"].dtype == np.int32
    assert found["inputs_pretokenized"].decode() == "Transcribe the en {speech} for our hotel"
    typed = pre.prompt_tokens(vocabulary, "Transcribe the en {speech} for our hotel")
    assert typed.tolist() == expected


def test_typed_prompt_without_a_marker_ends_in_the_speech(vocabulary):
    tokens = pre.prompt_tokens(vocabulary, "book a table").tolist()
    assert tokens == [*vocabulary.encode("book a table"), SPEECH, 1]
    with pytest.raises(UserError, match="more than once"):
        pre.prompt_tokens(vocabulary, "{speech} {speech}")


def test_text_only_has_the_transcript_at_the_marker(vocabulary, features):
    data = dataset_of(id=["a"], text=["book a table"])
    (found,) = prompts(data, features, ["Was it {speech} ?"], speech="{text}")
    before, said, after = (vocabulary.encode(part) for part in ("Was it", "book a table", "?"))
    assert found["inputs"].tolist() == [*before, *said, *after, 1]
    where = found["inputs_speech"].tolist()
    assert where == [False] * len(before) + [True] * len(said) + [False] * (len(after) + 1)


def test_empty_target_stays_empty_and_eos_is_a_choice(features):
    data = dataset_of(id=["a", "b"], text=["  ", "book"])
    empty, full = prompts(data, features, ["{speech}"])
    assert empty["targets"].tolist() == [] and full["targets"][-1] == 1
    bare = prompts(data, features, ["{speech}"], targets_eos=False)[1]
    assert bare["targets"].tolist() == full["targets"][:-1].tolist()


def test_templates_are_chosen_by_id_alone(features, rng: np.random.Generator):
    ids = [f"utterance-{i}" for i in range(600)]
    templates = ["book {speech}", "call {speech}", "near {speech}"]
    data = dataset_of(id=ids, text=["at"] * 600)
    chosen = {row["id"]: row["inputs"].tolist() for row in prompts(data, features, templates)}
    order = rng.permutation(600)
    again = dataset_of(id=np.array(ids)[order], text=["at"] * 600)
    assert {row["id"]: row["inputs"].tolist() for row in prompts(again, features, templates)} == chosen
    counts = Counter(map(tuple, chosen.values()))
    # Each third of 600 has a standard deviation of 11.5.
    assert len(counts) == 3 and min(counts.values()) > 200 - 6 * 11.5


@pytest.mark.parametrize(
    ("templates", "target", "sentence"),
    [
        (["{txet} {speech}"], "{text}", "reads field 'txet'; did you mean 'text'?"),
        (["{speech}"], "{translations.de}", "reads field 'translations.de'"),
        (["{speech} {speech}"], "{text}", "stands twice"),
        (["{speech"], "{text}", "prompt template '{speech'"),
        (["{} {speech}"], "{text}", "braces are empty"),
        (["{speech}"], "{speech}", "expected text alone"),
        ([], "{text}", "has no prompt templates"),
    ],
)
def test_wrong_templates(features, templates: list[str], target: str, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        prompts(dataset_of(id=["a"], text=["b"]), features, templates, target)


def test_templates_have_a_fingerprint():
    prints = {pre.templates_fingerprint(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}
    assert len(prints) == 4
    assert pre.templates_fingerprint(["a", "b"]) == pre.templates_fingerprint(("a", "b"))


def test_languages(features):
    data = dataset_of(id=["a", "b", "c"], language=["de", "tlh", ""])
    names = [row["language_name"].decode() for row in listed(pre.add_language_names(data))]
    assert names == ["German", "tlh", ""]
    rejects = [row["reject"] for row in listed(pre.reject_languages(data, languages=["de"]))]
    assert rejects == [b"", b"unknown_language", b"unknown_language"]


def test_repeat_names_its_variants():
    rows = listed(pre.repeat(dataset_of(id=["a", "b"], text=["x", "y"]), times=2))
    assert [(row["id"], row["text"]) for row in rows] == [
        (b"a#0", b"x"),
        (b"a#1", b"x"),
        (b"b#0", b"y"),
        (b"b#1", b"y"),
    ]


def noisy(features, tokens: np.ndarray, speech: np.ndarray, seed: int = 0, **rates) -> list[dict]:
    data = dataset_of(inputs=tokens, inputs_speech=speech)
    with seqio.utils.map_seed_manager(seed):
        return listed(pre.token_noise(data, features, **rates))


def test_token_noise_has_its_rates_and_leaves_the_rest_alone(vocabulary, features, rng: np.random.Generator):
    rows, length = 200, 60
    tokens = rng.integers(13, vocabulary.vocab_size, (rows, length)).astype(np.int32)
    speech = np.ones((rows, length), bool)
    speech[:, :20] = False
    tokens[:, -1], tokens[:, -2], tokens[:, -3] = 1, SPEECH, vocabulary.tokenizer.piece_to_id("<extra_id_0>")
    touched = rows * 37
    for name, rate in (("drop", 0.1), ("double", 0.2), ("unknown", 0.15), ("replace", 0.25)):
        found = noisy(features, tokens, speech, seed=int(rng.integers(1000)), **{name: rate})
        for row, before in zip(found, tokens, strict=True):
            assert row["inputs"][:20].tolist() == before[:20].tolist()
            assert row["inputs"][-3:].tolist() == before[-3:].tolist()
            assert len(row["inputs_speech"]) == len(row["inputs"])
        lengths = sum(len(row["inputs"]) for row in found) - rows * length
        changed = sum(
            int((row["inputs"] != before).sum()) if len(row["inputs"]) == length else 0
            for row, before in zip(found, tokens, strict=True)
        )
        unknown = sum(int((row["inputs"] == 2).sum()) for row in found)
        measured = {"drop": -lengths, "double": lengths, "unknown": unknown, "replace": changed}[name]
        deviation = np.sqrt(touched * rate * (1 - rate))
        # A replacement is the token itself now and then.
        expected = touched * rate * (1 - (name == "replace") / (vocabulary.vocab_size - 3))
        assert abs(measured - expected) < 6 * deviation


def test_noise_repeats_with_its_seed_and_differs_between_examples(features, vocabulary):
    tokens = np.tile(np.arange(13, vocabulary.vocab_size, dtype=np.int32), (4, 1))
    speech = np.ones(tokens.shape, bool)
    runs = [
        [row["inputs"].tolist() for row in noisy(features, tokens, speech, seed, drop=0.2, replace=0.2)]
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(map(tuple, runs[0]))) == 4
    with pytest.raises(UserError, match="must not be negative nor add up to more than 1"):
        noisy(features, tokens, speech, drop=0.6, double=0.6)


def corrupted(features, texts: list[str], seed: int = 0, **options) -> list[dict]:
    with seqio.utils.map_seed_manager(seed):
        return listed(pre.span_corruption(dataset_of(text=texts), features, **options))


def restore(inputs: list[int], targets: list[int], sentinels: list[int]) -> list[int]:
    """Puts the spans of the targets back where the inputs have their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == sentinels[: len(spans)] and all(spans.values())
    return [piece for token in inputs[:-1] for piece in spans.get(token, [token])]


def test_corrupted_spans_can_be_put_back(vocabulary, features, rng: np.random.Generator):
    words = ["please", "book", "a", "table", "for", "two", "at", "the", "grand", "hotel", "near", "station"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 60))) for _ in range(200)]
    sentinels = pre.sentinel_ids(vocabulary)
    assert sentinels == list(range(3, 13))
    found = corrupted(features, texts, seed=int(rng.integers(1000)))
    lost = total = 0
    at_the_end = 0
    for text, row in zip(texts, found, strict=True):
        inputs, targets = row["inputs"].tolist(), row["targets"].tolist()
        assert inputs[-1] == targets[-1] == 1
        tokens = vocabulary.encode(text)
        assert restore(inputs, targets, sentinels) == tokens
        lost += len([token for token in targets[:-1] if token not in sentinels])
        total += len(tokens)
        at_the_end += inputs[-2] in sentinels
    assert abs(lost / total - 0.15) < 0.03
    assert at_the_end < 120
    with pytest.raises(UserError, match="expected at least 2"):
        bare = {"inputs": seqio.Feature(seqio.ByteVocabulary(extra_ids=1))}
        pre.span_corruption(dataset_of(text=texts), bare)


def test_too_short_to_corrupt_is_empty(vocabulary, features):
    (short,) = corrupted(features, [""])
    assert short["inputs"].tolist() == short["targets"].tolist() == []


def test_sentinels_of_seqio_count_down(vocabulary_path):
    vocabulary = seqio.SentencePieceVocabulary(str(vocabulary_path), extra_ids=4)
    assert pre.sentinel_ids(vocabulary) == [93, 92, 91, 90]
    assert vocabulary.decode_tf(tf.constant([93])).numpy().decode().endswith("<extra_id_0>")


def test_pipeline_repeats_with_its_seed(features):
    steps = functools.partial(pre.span_corruption, output_features=features)
    texts = ["please book a table for two at the grand hotel"] * 5
    with seqio.utils.map_seed_manager(3):
        first = [row["inputs"].tolist() for row in listed(steps(dataset_of(text=texts)))]
    with seqio.utils.map_seed_manager(3):
        assert [row["inputs"].tolist() for row in listed(steps(dataset_of(text=texts)))] == first
