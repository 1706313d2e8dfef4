"""Whether an artifact answers as the live model does, token for token, and whether that would be noticed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_jax.errors import UserError


class Question(NamedTuple):
    """One utterance and what is asked about it.

    Attributes:
      id: names it in messages.
      speech: int16 [s] at 16 kHz.
      prompt: int32 [n], -1 where the speech goes.
    """

    id: str
    speech: np.ndarray
    prompt: np.ndarray


# Arguments as of `stablehlo.answer_function`, its result as numpy.
Artifact = Callable[[Mapping[str, Any], np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def stack(questions: Sequence[Question], multiple: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns speech int16 [b, s], samples int32 [b] and prompts int32 [b, n] of questions, padded with 0.

    Args:
      questions: the rows.
      multiple: s is the least multiple of this that holds the longest.
    """
    samples = np.array([len(question.speech) for question in questions], np.int32)
    speech = np.zeros((len(questions), -(-int(samples.max()) // multiple) * multiple), np.int16)
    prompts = np.zeros((len(questions), max(len(question.prompt) for question in questions)), np.int32)
    for row, question in enumerate(questions):
        speech[row, : len(question.speech)] = question.speech
        prompts[row, : len(question.prompt)] = question.prompt
    return speech, samples, prompts


def until_end(tokens: np.ndarray, eos_id: int) -> list[int]:
    """Returns the tokens before the end of an answer."""
    (ends,) = np.nonzero(tokens == eos_id)
    return tokens[: ends[0] if len(ends) else len(tokens)].tolist()


def check_parity(
    artifact: Artifact,
    weights: Mapping[str, Any],
    questions: Sequence[Question],
    expected: Sequence[Sequence[int]],
    *,
    eos_id: int,
    multiple: int,
    perturbed: str,
) -> dict[str, Any]:
    """Asks the artifact all questions together and each alone, and once more with one number changed.

    Args:
      artifact: what is checked.
      weights: by name.
      questions: real speech of several lengths.
      expected: the live model's tokens for each.
      eos_id: ends an answer.
      multiple: samples that the artifact's length is a multiple of.
      perturbed: name of the weight whose first number is changed for the control.

    Returns:
      What was compared, for the artifact's record.

    Raises:
      UserError: an answer differs; or the changed weight changed none, so that the check proves nothing.
    """

    def ask(asked: Sequence[Question], using: Mapping[str, Any]) -> list[list[int]]:
        return [until_end(row, eos_id) for row in artifact(using, *stack(asked, multiple))]

    together = ask(questions, weights)
    alone = [ask([question], weights)[0] for question in questions]
    for how, answers in (("in a batch", together), ("alone", alone)):
        for question, found, wanted in zip(questions, answers, expected, strict=True):
            if found != list(wanted):
                raise UserError(
                    f"export: the artifact answers {question.id} {how} with tokens {found}, the model with "
                    f"{list(wanted)}; nothing is exported"
                )
    if ask(questions, {**weights, perturbed: _changed(weights[perturbed])}) == together:
        raise UserError(
            f"export: a changed number in {perturbed} changes no answer to {len(questions)} questions, so "
            "equal answers prove nothing; give other audio with --audio; nothing is exported"
        )
    return {
        "questions": [question.id for question in questions],
        "tokens": sum(map(len, together)),
        "asked": ["together", "alone"],
        "control": f"{perturbed}[0] changed: answers differ",
    }


def _changed(weight: Any) -> np.ndarray:
    changed = np.array(weight)
    # Far beyond the others, so that it is heard through any normalisation.
    changed.flat[0] = 1e4
    return changed
