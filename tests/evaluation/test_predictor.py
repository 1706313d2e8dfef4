"""Predictions through the real batches and the real greedy decoder, on a model that repeats its input."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.data.batch import BatchShape
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import BadExample, UserError
from slm_jax.evaluation.batches import ReferenceBatches, rejects_as_bytes, told_rejects
from slm_jax.evaluation.predictor import Prediction, Predictor, Rejected
from slm_jax.partitioning.mesh import make_mesh

VOCABULARY = 40
SHAPE = BatchShape.from_feature_lengths(
    {"inputs": 9, "targets": 3, "speech": 6400}, rows=4, samples_per_position=640
)


class Repeater(nn.Module):
    """Says the text tokens of its input one after the other, then one token for each speech position."""

    def setup(self):
        self.words = self.param("words", nn.initializers.zeros, (VOCABULARY, VOCABULARY))

    def encode(self, batch):
        said = jnp.concatenate(
            [
                batch["inputs"],
                (jnp.arange(10)[None] * 640 < batch["speech_segments"][:, 0, 0, 2, None]) * (VOCABULARY - 1),
            ],
            axis=1,
        )
        order = jnp.argsort(said == 0, axis=1, stable=True)
        said = jnp.take_along_axis(said, order, axis=1)
        said = jnp.where(said == 0, 1, said)
        return jax.nn.one_hot(said, VOCABULARY) @ self.words, batch["layout_segment_ids"]

    def decode_step(self, encoded, segment_ids, tokens, max_tokens):
        place = self.get_variable("cache", "place", jnp.int32(0))
        logits = jax.lax.dynamic_slice_in_dim(encoded, place, 1, axis=1)
        self.put_variable("cache", "place", place + 1)
        return logits


def variables(step: int = 0) -> dict:
    """Weights under which token n is said as n + step, but the end as the end."""
    words = np.roll(np.eye(VOCABULARY, dtype=np.float32), step, axis=1)
    words[1] = np.eye(VOCABULARY)[1]
    return {"params": {"words": words}}


def question(rng: np.random.Generator, number: int, samples: int = 0, tokens: int | None = None) -> Reference:
    inputs = rng.integers(2, 30, rng.integers(1, 8) if tokens is None else tokens)
    if samples:
        inputs = np.insert(inputs, rng.integers(0, len(inputs) + 1), SPEECH)
    return Reference(
        id=f"example-{number}",
        audio=f"{number}.wav" if samples else None,
        samples=samples,
        inputs=inputs.astype(np.int32),
        targets=rng.integers(2, 30, rng.integers(0, 12)).astype(np.int32),
        task="task",
        language="en",
    )


def load(reference: Reference) -> np.ndarray:
    if reference.id.endswith("3"):
        raise BadExample("unreadable_audio", "3.wav: not a sound")
    return np.ones(reference.samples, np.int16)


def repeated(reference: Reference) -> list[int]:
    positions = -(-reference.samples // 640)
    return [*reference.inputs[reference.inputs != SPEECH].tolist(), *[VOCABULARY - 1] * positions]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    mesh = make_mesh(devices=jax.devices()[:4])
    return Predictor(Repeater(), variables(), ReferenceBatches(SHAPE, load, mesh), mesh=mesh, max_tokens=20)


@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_every_reference_is_answered_in_its_order(predictor, rng, count):
    asked = [
        question(rng, 10 * n, samples=int(rng.integers(0, 2) * rng.integers(1, 6401))) for n in range(count)
    ]
    assert predictor(asked) == [Prediction(repeated(reference)) for reference in asked]


def test_bad_examples_are_rejected_with_their_reason_and_harm_no_other(predictor, rng):
    asked = [question(rng, 10 * n, samples=1000) for n in range(7)]
    asked[1] = question(rng, 3, samples=1000)
    asked[4] = question(rng, 10, tokens=10)
    asked[6] = question(rng, 20, samples=6401)
    answers = predictor(asked)
    assert answers[1] == Prediction([], Rejected("unreadable_audio", "3.wav: not a sound"))
    assert answers[4].rejected == Rejected("inputs_too_long", "10 tokens, the row holds 9")
    assert answers[6].rejected == Rejected("speech_too_long", "0.400062 s, the row holds 0.4 s of speech")
    for n in (0, 2, 3, 5):
        assert answers[n] == Prediction(repeated(asked[n]))


def test_an_answer_ends_at_the_most_tokens(rng):
    mesh = make_mesh(devices=jax.devices()[:1])
    short = Predictor(Repeater(), variables(), ReferenceBatches(SHAPE, load, mesh), mesh=mesh, max_tokens=3)
    asked = question(rng, 0, tokens=8)
    assert short([asked]) == [Prediction(repeated(asked)[:3])]


def test_weights_are_arguments_and_every_shape_is_compiled_once(rng, monkeypatch):
    traced = []
    encode = Repeater.encode
    monkeypatch.setattr(Repeater, "encode", lambda self, batch: traced.append(1) or encode(self, batch))
    mesh = make_mesh(devices=jax.devices()[:2])
    make_batch = ReferenceBatches(SHAPE, load, mesh)
    predict = Predictor(Repeater(), variables(2), make_batch, mesh=mesh, max_tokens=9)
    asked = [question(rng, 10 * n, tokens=5) for n in range(9)]
    assert [answer.tokens for answer in predict(asked)] == [[n + 2 for n in repeated(r)] for r in asked]
    later = predict(asked, variables=variables(3))
    assert [answer.tokens for answer in later] == [[n + 3 for n in repeated(r)] for r in asked]
    assert len(traced) == 1


def test_rows_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(devices=jax.devices()[:4])
    make_batch = ReferenceBatches(dataclasses.replace(SHAPE, rows=6), load, mesh)
    with pytest.raises(UserError, match=r"6 is not divisible by the mesh's 4 batch shards.* 4 or 8"):
        Predictor(Repeater(), variables(), make_batch, mesh=mesh, max_tokens=3)


def test_what_hosts_tell_of_their_rejects_is_what_all_know():
    one = {2: Rejected("too_long", "a\nb"), 0: Rejected("unreadable_audio", "\u00e9" * 400)}
    other = {1: Rejected("missing_file", "")}
    told = told_rejects(np.stack([rejects_as_bytes(one, 4), rejects_as_bytes(other, 4)]))
    assert list(told) == [0, 1, 2]
    assert (told[1], told[2]) == (other[1], one[2])
    assert told[0].reason == "unreadable_audio"
    assert len(told[0].detail) > 200 and set(told[0].detail) == {"\u00e9"}
