"""Scores against jiwer and sacrebleu called directly, and against an edit distance written out."""

import functools
import inspect

import jiwer
import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics.bleu import BLEU

from slm_jax.errors import UserError
from slm_jax.evaluation import metrics

WORDS = ["train", "Bahnhof", "ni\u00f1o", "a", "the", "seven", "o'clock"]


def edit_distance(one: list[str], other: list[str]) -> int:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0] = np.arange(len(one) + 1), np.arange(len(other) + 1)
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (left != right))
    return int(table[-1, -1])


def sentences(rng: np.random.Generator, count: int, shortest: int = 0) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 9))) for _ in range(count)]


def test_error_rates_are_those_of_an_edit_distance_also_where_a_side_is_empty(rng):
    targets, found = sentences(rng, 40), sentences(rng, 40)
    targets[3], found[3], targets[5], found[7] = "", "the train", "", ""
    low = [(a.lower(), b.lower()) for a, b in zip(targets, found, strict=True)]
    words = sum(edit_distance(a.split(), b.split()) for a, b in low) / sum(len(a.split()) for a, _ in low)
    letters = sum(edit_distance(list(a), list(b)) for a, b in low) / sum(len(a) for a, _ in low)
    assert metrics.wer(targets, found, language="en")["wer"] == pytest.approx(100 * words)
    assert metrics.cer(targets, found, language="en")["cer"] == pytest.approx(100 * letters)


def test_error_rates_are_jiwers_on_normalised_text(rng):
    targets, found = sentences(rng, 30, shortest=1), sentences(rng, 30)
    low, low_found = [text.lower() for text in targets], [text.lower() for text in found]
    shouted = [f"{text.upper()}!" for text in targets]
    assert metrics.wer(shouted, found, language="en")["wer"] == pytest.approx(100 * jiwer.wer(low, low_found))
    assert metrics.cer(shouted, found, language="en")["cer"] == pytest.approx(100 * jiwer.cer(low, low_found))


@pytest.mark.parametrize("metric_fn", [metrics.wer, metrics.cer])
def test_a_rate_over_nothing(metric_fn):
    (silent,) = metric_fn(["", "?"], ["", "."]).values()
    (spoken,) = metric_fn(["", "?"], ["", "a word"]).values()
    assert (silent, spoken) == (0.0, 100.0)


def test_bleu_and_chrf_are_sacrebleus_on_the_raw_texts(rng):
    targets = sentences(rng, 25, shortest=4)
    found = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in targets]
    found[0], found[1] = "", targets[1]
    assert metrics.bleu(targets, found)["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(found, [targets]).score
    )
    assert metrics.chrf(targets, found)["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(found, [targets]).score
    )
    assert metrics.bleu(targets, targets)["bleu"] == pytest.approx(100)


def test_bleu_counts_characters_where_words_have_no_spaces():
    target, found = ["\u6211\u5728\u8f66\u7ad9\u7b49\u4f60"], ["\u6211\u5728\u8f66\u7ad9\u7b49\u4ed6"]
    direct = sacrebleu.corpus_bleu(found, [target], tokenize="zh").score
    assert metrics.bleu(target, found, language="zh-CN")["bleu"] == pytest.approx(direct)
    assert metrics.bleu(target, found)["bleu"] == pytest.approx(0, abs=1e-6)


def test_unspaced_languages_count_characters_as_words_and_no_spaces_as_characters():
    target, found = ["\u6211\u5728 \u8f66\u7ad9"], ["\u6211\u5728\u8f66\u5e93\u3002"]
    assert metrics.wer(target, found, language="zh")["wer"] == pytest.approx(25.0)
    assert metrics.cer(["\u6211\u5728\u8f66\u7ad9"], found, language="zh")["cer"] == pytest.approx(25.0)


def test_exact_match_is_a_share_in_percent():
    found = metrics.exact_match(["Seven!", "at nine", "", "a"], ["seven", "nine", "", "b"], language="en")
    assert found == {"exact_match": 50.0}


@pytest.mark.parametrize(
    "metric_fn", [metrics.wer, metrics.cer, metrics.bleu, metrics.chrf, metrics.exact_match]
)
def test_what_cannot_be_scored_is_refused(metric_fn):
    with pytest.raises(ValueError, match="no examples"):
        metric_fn([], [])
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        metric_fn(["a"], ["a", "b"])


@pytest.mark.parametrize(
    "metric_fn",
    [metrics.wer, metrics.chrf, functools.partial(metrics.cer, language="de", normalizer="cased")],
)
def test_seqio_finds_targets_and_predictions(metric_fn):
    required = [
        name
        for name, parameter in inspect.signature(metric_fn).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert required == ["targets", "predictions"]


def test_a_declaration_says_what_a_score_depends_on():
    german = functools.partial(metrics.wer, language="de")
    assert metrics.declaration(german).startswith("basic: NFKC, lower-case, no punctuation")
    assert metrics.declaration(german).endswith("; language de")
    cased = functools.partial(german, normalizer="cased")
    assert metrics.declaration(cased).startswith("cased: NFKC")
    direct = BLEU()
    direct.corpus_score(["a"], [["a"]])
    assert metrics.declaration(metrics.bleu) == str(direct.get_signature())
    assert "chrF2" in metrics.declaration(metrics.chrf) or "nc:6" in metrics.declaration(metrics.chrf)
    assert metrics.declaration(lambda targets, predictions: {}).startswith(__name__)


def test_an_unknown_normaliser_is_refused_by_name():
    with pytest.raises(UserError, match="no text normaliser 'casd'"):
        metrics.wer(["a"], ["a"], normalizer="casd")


def test_rare_word_recall_counts_each_rare_word_once():
    common = {"the", "train", "leaves"}
    targets = ["the kavlo leaves kavlo", "The Mirena train", "the train leaves"]
    found = ["kavlo the train", "the mirena, mirena train", "kavlo leaves"]
    assert metrics.rare_word_recall(targets, found, common_words=common) == {
        "rare_word_recall": pytest.approx(100 * 2 / 3)
    }
    with pytest.raises(UserError, match="no reference has a word outside"):
        metrics.rare_word_recall(["the train"], ["kavlo"], common_words=common)
