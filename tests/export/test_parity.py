"""The parity check: passes what is equal, names what differs, and refuses to be blind."""

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.export import parity

EOS = 1


def questions(rng):
    return [
        parity.Question(
            f"clip-{number}",
            rng.integers(-99, 99, rng.integers(1, 4000)).astype(np.int16),
            rng.integers(2, 30, rng.integers(1, 6)).astype(np.int32),
        )
        for number in range(3)
    ]


def artifact(weights, speech, samples, prompts):
    """Says how long the speech is and how long the prompt, in the units of the weight."""
    scale = int(weights["adapter/out/kernel"].flat[0])
    said = np.stack([samples // 100 + 2, (prompts > 0).sum(1) + scale, np.full_like(samples, EOS)], axis=1)
    assert speech.shape == (len(samples), speech.shape[1]) and speech.shape[1] % 640 == 0
    return np.pad(said, ((0, 0), (0, 2)))


def check(asked, expected, **more):
    options = {"eos_id": EOS, "multiple": 640, "perturbed": "adapter/out/kernel"} | more
    weights = {"adapter/out/kernel": np.full((2, 2), 5.0, np.float32), "other": np.zeros(3)}
    return parity.check_parity(artifact, weights, asked, expected, **options)


def answers(asked):
    return [[len(question.speech) // 100 + 2, len(question.prompt) + 5] for question in asked]


def test_equal_answers_pass_and_are_recorded(rng):
    asked = questions(rng)
    record = check(asked, answers(asked))
    assert record["questions"] == ["clip-0", "clip-1", "clip-2"] and record["tokens"] == 6
    assert "adapter/out/kernel" in record["control"]


def test_another_answer_is_named(rng):
    asked = questions(rng)
    expected = answers(asked)
    expected[1][0] += 1
    with pytest.raises(UserError, match=r"clip-1 in a batch .*nothing is exported"):
        check(asked, expected)


def test_an_artifact_that_errs_only_alone_is_noticed(rng):
    asked = questions(rng)

    def moody(weights, speech, samples, prompts):
        return artifact(weights, speech, samples + (100 if len(samples) == 1 else 0), prompts)

    with pytest.raises(UserError, match="clip-0 alone"):
        parity.check_parity(
            moody, {"adapter/out/kernel": np.full(2, 5.0)}, asked, answers(asked),
            eos_id=EOS, multiple=640, perturbed="adapter/out/kernel",
        )  # fmt: skip


def test_a_control_that_changes_nothing_is_refused(rng):
    asked = questions(rng)
    with pytest.raises(UserError, match="prove nothing"):
        check(asked, answers(asked), perturbed="other")


def test_until_end():
    assert parity.until_end(np.array([5, 6, 1, 0]), EOS) == [5, 6]
    assert parity.until_end(np.array([5, 6]), EOS) == [5, 6]
