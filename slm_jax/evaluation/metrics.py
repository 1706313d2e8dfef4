"""SeqIO metric functions for speech and translation; every score is in percent.

Word and character error rates are of the corpus: all edits over all reference units (jiwer). BLEU
(Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's on the texts as they are (Post 2018).
A task declares its language with `functools.partial(wer, language="de")`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

from slm_jax.errors import UserError
from slm_jax.evaluation.normalizers import TextNormalizer
from slm_jax.evaluation.normalizers import normalizer as get_normalizer

MetricFn = Callable[..., dict[str, float]]

# Languages whose words sacrebleu's default tokenizer cannot find.
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", **dict.fromkeys(["bo", "ja", "km", "lo", "my", "th"], "char")}


def wer(
    targets: Sequence[str], predictions: Sequence[str], *, language: str = "", normalizer: str = "basic"
) -> dict[str, float]:
    """Word error rate: substitutions, deletions and insertions over reference words.

    Args:
      targets: reference texts; an empty one adds the words of its hypothesis as insertions.
      predictions: hypotheses, in the same order; an empty one deletes its whole reference.
      language: ISO 639 code that the normaliser goes by.
      normalizer: name of a declared normaliser.

    Raises:
      ValueError: no examples, or not one hypothesis for each reference.
    """
    import jiwer

    pairs = _normalized_pairs(targets, predictions, language, get_normalizer(normalizer))
    return {"wer": _error_rate(pairs, jiwer.process_words, lambda text: len(text.split()))}


def cer(
    targets: Sequence[str], predictions: Sequence[str], *, language: str = "", normalizer: str = "basic"
) -> dict[str, float]:
    """Character error rate, spaces counted; arguments and errors are those of `wer`."""
    import jiwer

    # Parting characters is for words; here the spaces would be counted.
    normalize = dataclasses.replace(get_normalizer(normalizer), split_unspaced=False)
    pairs = _normalized_pairs(targets, predictions, language, normalize)
    return {"cer": _error_rate(pairs, jiwer.process_characters, len)}


def bleu(targets: Sequence[str], predictions: Sequence[str], *, language: str = "") -> dict[str, float]:
    """Corpus BLEU with one reference, cased, on texts as they are.

    Raises:
      ValueError: no examples, or not one hypothesis for each reference.
    """
    _check_aligned(targets, predictions)
    return {"bleu": float(_bleu(language).corpus_score(list(predictions), [list(targets)]).score)}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus chrF2 with one reference, on texts as they are.

    Raises:
      ValueError: no examples, or not one hypothesis for each reference.
    """
    _check_aligned(targets, predictions)
    return {"chrf": float(_chrf().corpus_score(list(predictions), [list(targets)]).score)}


def exact_match(
    targets: Sequence[str], predictions: Sequence[str], *, language: str = "", normalizer: str = "basic"
) -> dict[str, float]:
    """Share of hypotheses that equal their reference once normalised; errors are those of `wer`."""
    pairs = _normalized_pairs(targets, predictions, language, get_normalizer(normalizer))
    return {"exact_match": 100.0 * sum(target == found for target, found in pairs) / len(pairs)}


def rare_word_recall(
    targets: Sequence[str],
    predictions: Sequence[str],
    *,
    common_words: Collection[str],
    language: str = "",
    normalizer: str = "basic",
) -> dict[str, float]:
    """Share of the rare words of the references that their hypotheses hold, as contextual biasing is scored.

    Args:
      targets: reference texts.
      predictions: hypotheses, in the same order.
      common_words: all words that do not count, normalised.
      language: ISO 639 code that the normaliser goes by.
      normalizer: name of a declared normaliser.

    Raises:
      UserError: no reference has a rare word.
      ValueError: not one hypothesis for each reference.
    """
    spoken = found = 0
    for target, said in _normalized_pairs(targets, predictions, language, get_normalizer(normalizer)):
        rare = [word for word in target.split() if word not in common_words]
        heard = collections.Counter(said.split())
        spoken += len(rare)
        found += sum((collections.Counter(rare) & heard).values())
    if not spoken:
        raise UserError("rare_word_recall: no reference has a word outside common_words")
    return {"rare_word_recall": 100.0 * found / spoken}


def declaration(metric_fn: MetricFn) -> str:
    """Returns what a score depends on beside the texts: the normaliser, or sacrebleu's signature.

    Args:
      metric_fn: a function of this module, or a `functools.partial` of one.
    """
    options: dict[str, str] = {}
    while isinstance(metric_fn, functools.partial):
        options = {**metric_fn.keywords, **options}
        metric_fn = metric_fn.func
    language = options.get("language", "")
    if metric_fn in (bleu, chrf):
        scorer = _bleu(language) if metric_fn is bleu else _chrf()
        scorer.corpus_score(["a"], [["a"]])  # sacrebleu knows the number of references only from a call
        return str(scorer.get_signature())
    if metric_fn in (wer, cer, exact_match, rare_word_recall):
        described = get_normalizer(options.get("normalizer", "basic")).describe()
        return f"{described}; language {language}" if language else described
    return f"{metric_fn.__module__}.{getattr(metric_fn, '__qualname__', repr(metric_fn))}"


def _bleu(language: str):
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=_BLEU_TOKENIZERS.get(language.replace("_", "-").split("-")[0].lower(), "13a"))


def _chrf():
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _check_aligned(targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(predictions)} hypotheses for {len(targets)} references")
    if not len(targets):
        raise ValueError("no examples to score")


def _normalized_pairs(
    targets: Sequence[str], predictions: Sequence[str], language: str, normalize: TextNormalizer
) -> list[tuple[str, str]]:
    _check_aligned(targets, predictions)
    return [
        (normalize(target, language), normalize(found, language))
        for target, found in zip(targets, predictions, strict=True)
    ]


def _error_rate(pairs: list[tuple[str, str]], process: Callable, count: Callable[[str], int]) -> float:
    # jiwer refuses an empty reference; what stands against one is inserted.
    edits = sum(count(found) for target, found in pairs if not target)
    units = 0
    spoken = [(target, found) for target, found in pairs if target]
    if spoken:
        result = process([target for target, _ in spoken], [found for _, found in spoken])
        edits += result.substitutions + result.deletions + result.insertions
        units = result.hits + result.substitutions + result.deletions
    if not units:
        return 100.0 * bool(edits)  # a rate over nothing: all wrong as soon as anything was said
    return 100.0 * edits / units
