"""The demonstration's tasks on the corpus of `slm_jax.demo`: spoken, and the same asked of a T5 in text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_jax.demo import prompts, sentences
from slm_jax.demo.vocabulary import vocabularies
from slm_jax.errors import UserError
from slm_jax.evaluation import metrics
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.ast import register_ast
from slm_jax.tasks.instruction import register_instruction, register_span_corruption
from slm_jax.tasks.registration import register_mixture, register_proportional_mixture, register_speech_task

# What an adapter does to a transcript, in kind: it says pieces twice, leaves some out and garbles others.
# A T5 that has met this answers far better from an adapter's output.
ADAPTER_LIKE_NOISE: Mapping[str, float] = {"drop": 0.03, "double": 0.15, "unknown": 0.04, "replace": 0.04}

SPEECH_TASKS = ("demo_asr", "demo_ast_de", "demo_ast_es", "demo_slots")
# Recognition of sentences with invented names; there is nothing of it to train on.
NAMES_TASKS = ("demo_names", "demo_names_unlisted")
ADAPTER_TASKS = ("demo_asr", "demo_ast_de")
TEXT_TASKS = (
    "demo_text_repeat", "demo_text_translate_de", "demo_text_translate_es", "demo_text_slots",
    "demo_text_names",
)  # fmt: skip
# Spelling a name that nobody has read takes more examples than saying what was said a thousand times.
NAMES_WEIGHT = 2.5
SPANS_TASK = "demo_text_spans"


def register(
    corpus_dir: str | os.PathLike,
    *,
    noise: Mapping[str, float] = ADAPTER_LIKE_NOISE,
    noisy_share: float = 0.5,
    spans_share: float = 0.1,
) -> str:
    """Registers all tasks and mixtures of a corpus; returns the name of the speech mixture.

    Spoken: `demo_ctc` (pieces of the encoder's CTC head), `demo_asr`, `demo_ast_de`, `demo_ast_es`,
    `demo_slots`; for evaluation alone `demo_names` (recognition of sentences with an invented name, given a
    list that holds it) and `demo_names_unlisted` (the same without the list); the mixtures `demo_speech` of
    the four that can be trained, `demo_scored` of all six, `demo_adapter` of `demo_asr` and `demo_ast_de`.
    Text: `demo_text_repeat`, `demo_text_translate_de`, `demo_text_translate_es`, `demo_text_slots`,
    `demo_text_names`, each also as `..._noisy`, and `demo_text_spans`; the mixture `demo_text` of all.

    Args:
      corpus_dir: made by `slm_jax.demo.corpus.build_corpus`.
      noise: rates of `preprocessors.token_noise` on the transcripts of noisy text tasks.
      noisy_share: of the examples of each text instruction in `demo_text`.
      spans_share: of span corruption in `demo_text`.

    Raises:
      UserError: there is no corpus or no vocabulary, or another corpus is registered already.
    """
    corpus = Path(corpus_dir).absolute()
    paths = vocabularies(corpus)
    for path in (corpus / "train.jsonl", paths.text, paths.ctc):
        if not path.is_file():
            raise UserError(f"demo tasks: {path} does not exist; build the corpus: slm demo --to {corpus}")
    _register_speech(corpus, paths.text, paths.ctc)
    _register_text(corpus, paths.text, noise)
    weights = dict.fromkeys(TEXT_TASKS, 1.0) | {"demo_text_names": NAMES_WEIGHT}
    rates = {name: weight * (1 - noisy_share) for name, weight in weights.items()}
    rates |= {f"{name}_noisy": weight * noisy_share for name, weight in weights.items()}
    rates[SPANS_TASK] = spans_share * sum(weights.values()) / (1 - spans_share)
    register_mixture("demo_text", {name: rate for name, rate in rates.items() if rate > 0})
    register_proportional_mixture("demo_adapter", ADAPTER_TASKS)
    register_mixture("demo_scored", dict.fromkeys((*SPEECH_TASKS, *NAMES_TASKS), 1.0))
    return register_proportional_mixture("demo_speech", SPEECH_TASKS)


def _register_speech(corpus: Path, vocabulary: Path, ctc_vocabulary: Path) -> None:
    manifests = {split: corpus / f"{name}.jsonl" for split, name in _SPLITS.items()}
    register_speech_task(
        "demo_ctc", manifests=manifests, vocabulary=ctc_vocabulary, templates=("{speech}",), target="{text}"
    )
    register_asr("demo_asr", manifests=manifests, vocabulary=vocabulary, templates=prompts.ASR)
    for language in ("de", "es"):
        register_ast(
            f"demo_ast_{language}",
            manifests=manifests,
            vocabulary=vocabulary,
            target_language=language,
            templates=prompts.AST,
        )
    register_instruction(
        "demo_slots",
        manifests=manifests,
        vocabulary=vocabulary,
        templates=prompts.QUESTION,
        target="{answer}",
    )
    named = {split: corpus / f"names_{name}.jsonl" for split, name in _SPLITS.items() if name != "train"}
    for name, templates in (("demo_names", prompts.NAMES), ("demo_names_unlisted", prompts.ASR)):
        register_asr(
            name,
            manifests=named,
            vocabulary=vocabulary,
            templates=templates,
            metric_fns=(invented_word_recall, "wer"),
        )


def invented_word_recall(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`rare_word_recall` of the words that the corpus's own sentences lack."""
    return metrics.rare_word_recall(targets, predictions, common_words=sentences.words())


def _register_text(corpus: Path, vocabulary: Path, noise: Mapping[str, float]) -> None:
    manifests = {split: corpus / f"text_{name}.jsonl" for split, name in _SPLITS.items() if name != "test"}
    for suffix, rates in (("", None), ("_noisy", noise)):
        asked = {"manifests": manifests, "vocabulary": vocabulary, "text_only": True, "noise": rates}
        register_asr(f"demo_text_repeat{suffix}", templates=prompts.ASR, **asked)
        for language in ("de", "es"):
            register_ast(
                f"demo_text_translate_{language}{suffix}",
                target_language=language,
                templates=prompts.AST,
                **asked,
            )
        register_instruction(
            f"demo_text_slots{suffix}", templates=prompts.QUESTION, target="{answer}", **asked
        )
        # What is heard may not be what was said: the list tells how it is written.
        listed = {
            split: corpus / f"text_names_{path.stem.removeprefix('text_')}.jsonl"
            for split, path in manifests.items()
        }
        register_asr(
            f"demo_text_names{suffix}",
            templates=prompts.NAMES,
            transcript="{heard}",
            **{**asked, "manifests": listed},
        )
    register_span_corruption(SPANS_TASK, manifests=manifests, vocabulary=vocabulary)


_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
