"""Answers from text in place of speech: what the LLM could reach at best, and what a cascade reaches.

The text topline asks the same LLM about the true transcript. The cascade lets the model transcribe first,
then asks the same LLM about what it wrote. Neither is a bound: a cascade loses what its transcript lost.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm_jax.evaluation.predictor import Prediction, Rejected

if TYPE_CHECKING:
    from slm_jax.data.references import Reference

    Predict = Callable[[Sequence[Reference]], Sequence[Prediction]]
    Transcribe = Callable[[Sequence[Reference]], Sequence[Prediction]]


def from_text(
    references: "Sequence[Reference]", *, predict: "Predict", transcribe: "Transcribe"
) -> list[Prediction]:
    """Answers references with their speech replaced by its transcript.

    Args:
      references: what is asked; one without speech is asked as it is.
      predict: answers references without speech.
      transcribe: returns for each reference the tokens of what is said, as the LLM's encoder knows them; a
        rejected one is rejected here too.
    """
    from slm_jax.data.references import in_text

    transcripts = transcribe(references)
    asked = [
        in_text(reference, transcript.tokens)
        for reference, transcript in zip(references, transcripts, strict=True)
        if transcript.rejected is None
    ]
    answers = iter(predict(asked))
    return [transcript if transcript.rejected else next(answers) for transcript in transcripts]


class Transcriber:
    """The first half of a cascade: each audio file is transcribed once, whatever is asked about it.

    Args:
      predict: answers references about speech.
      prompt: int32 inputs that ask for a transcript.
      to_inputs: from target tokens to the tokens by which the LLM's encoder knows the same text.
    """

    def __init__(
        self, predict: "Predict", prompt: Sequence[int], to_inputs: Callable[[Sequence[int]], list[int]]
    ):
        self._predict, self._prompt, self._to_inputs = predict, prompt, to_inputs
        self._known: dict[str, Prediction] = {}

    def __call__(self, references: "Sequence[Reference]") -> list[Prediction]:
        """Returns the transcript of each reference, as tokens of the LLM's encoder."""
        inputs = np.asarray(self._prompt, np.int32)
        new = {
            reference.audio: dataclasses.replace(reference, inputs=inputs)
            for reference in references
            if reference.audio is not None and reference.audio not in self._known
        }
        for audio, answer in zip(new, self._predict(list(new.values())), strict=True):
            known = answer if answer.rejected else Prediction(self._to_inputs(answer.tokens))
            self._known[audio] = known
        return [
            self._known[reference.audio] if reference.audio else Prediction([]) for reference in references
        ]


def true_transcripts(texts: Mapping[tuple[str, str], Sequence[int]]) -> "Transcribe":
    """Returns what looks the transcripts of the topline up; an example without one is rejected.

    Args:
      texts: task and id of an example -> tokens of its true transcript.
    """
    missing = Prediction([], Rejected("missing_text", "the example has no text"))

    def look_up(reference: "Reference") -> Prediction:
        if reference.audio is None:
            return Prediction([])
        tokens = texts.get((reference.task, reference.id))
        return Prediction(list(tokens)) if tokens else missing

    return lambda references: [look_up(reference) for reference in references]
