"""The exported function: laid out as the data path does, answering as the live model does at any size."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from slm_jax.data.batch import BatchShape, Placed, collate
from slm_jax.data.references import SPEECH, Reference
from slm_jax.decoding.greedy import greedy_decode
from slm_jax.errors import UserError
from slm_jax.export import parity, stablehlo
from slm_jax.export.weights import to_names, to_variables
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer, StackReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.models.whisper import WhisperConfig

MAX_TOKENS, EOS = 7, 1
CONFIGS = {
    "stack": SLMConfig(
        ConformerConfig(layers=2, dim=12, heads=2, subsampling_channels=(4, 4)),
        T5Config(vocab_size=71, emb_dim=16, num_heads=3, head_dim=10, mlp_dim=24,
                 encoder_layers=2, decoder_layers=2),
        AdapterConfig(layers=1, dim=20, heads=2, head_dim=14, mlp_dim=26),
        StackReducer(4),
    ),
}  # fmt: skip
CONFIGS["drop, chunks"] = dataclasses.replace(
    CONFIGS["stack"],
    speech_encoder=dataclasses.replace(CONFIGS["stack"].speech_encoder, attention="chunk", chunk_frames=5),
    reducer=DropReducer(3),
)
CONFIGS["local, T5 trains too"] = dataclasses.replace(
    CONFIGS["stack"],
    speech_encoder=dataclasses.replace(
        CONFIGS["stack"].speech_encoder, attention="local", left_context=3, right_context=2
    ),
    trainable=("adapter", "llm"),
)
# An encoder with a window: the artifact's length of speech is bounded.
CONFIGS["whisper"] = dataclasses.replace(
    CONFIGS["stack"],
    speech_encoder=WhisperConfig(mel_bins=8, layers=1, dim=12, heads=2, mlp_dim=16, positions=160),
)


def ask(rng, number: int, speech: bool = True, most: int = 30_000) -> parity.Question:
    """A question with ragged noise for speech, the marker at a random place."""
    prompt = rng.integers(2, 71, rng.integers(1, 9)).astype(np.int32)
    samples = rng.integers(1, most)
    if speech:
        prompt = np.insert(prompt, rng.integers(0, len(prompt) + 1), SPEECH)
    sound = rng.integers(-9000, 9000, samples).astype(np.int16)
    return parity.Question(f"question-{number}", sound, np.append(prompt, EOS).astype(np.int32))


def reference(question: parity.Question) -> Reference:
    spoken = SPEECH in question.prompt
    return Reference(
        question.id, "a.wav" if spoken else None, len(question.speech) if spoken else 0, question.prompt,
        np.zeros(0, np.int32), "task", "",
    )  # fmt: skip


def collated(questions: list[parity.Question], step: int) -> dict[str, np.ndarray]:
    """The batch that the data path makes of the questions."""
    sizes = {"speech": 40_000, "inputs": 12, "targets": 1}
    shape = BatchShape.from_feature_lengths(sizes, rows=len(questions), samples_per_position=step)
    by_id = {question.id: question.speech for question in questions}
    rows = [[Placed(reference(question))] for question in questions]
    return collate(rows, shape, lambda found: by_id[found.id])


def sources(batch, step: int) -> list[list[tuple[str, int]]]:
    """What stands at the positions of each row: the number of a speech position, or a token."""
    positions = batch["speech"].shape[-1] // step
    return [
        [
            ("speech", int(index)) if index < positions else ("token", int(inputs[index - positions]))
            for index in layout
            if index >= 0
        ]
        for layout, inputs in zip(np.asarray(batch["layout"]), np.asarray(batch["inputs"]), strict=True)
    ]


def test_rows_are_laid_out_as_by_the_data_path(rng):
    step = 2560
    questions = [ask(rng, number, speech=number % 4 > 0) for number in range(9)]
    expected = collated(questions, step)
    found = jax.jit(stablehlo.rows_of, static_argnums=3)(*parity.stack(questions, 640), step)
    assert sources(found, step) == sources(expected, step)
    np.testing.assert_array_equal(found["layout_segment_ids"], np.asarray(found["layout"]) >= 0)
    for row, question in enumerate(questions):
        if SPEECH in question.prompt:
            np.testing.assert_array_equal(
                found["speech_segments"][row, 0, 0], expected["speech_segments"][row, 0, 0]
            )


def make(name: str, rng) -> tuple[SLM, dict]:
    model = SLM(CONFIGS[name])
    batch = collated([ask(rng, 0)], model.samples_per_position)
    batch = {key: jnp.asarray(array) for key, array in batch.items()}
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(int(rng.integers(2**31))), batch))
    return model, variables


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request):
    """A model, its variables, and the artifact read back."""
    model, variables = make(request.param, np.random.default_rng(len(request.param)))
    blob = stablehlo.export_answer(model, to_names(variables), max_tokens=MAX_TOKENS, eos_id=EOS)
    return model, variables, export.deserialize(bytearray(blob))


def test_any_batch_is_answered_as_by_the_live_model(exported, rng):
    model, variables, artifact = exported
    weights = to_names(variables)
    questions = [ask(rng, number, speech=number != 2) for number in range(4)]
    live = jax.jit(lambda v, b: greedy_decode(model, v, b, max_tokens=MAX_TOKENS, eos_id=EOS))
    expected = np.asarray(live(variables, collated(questions, model.samples_per_position)))
    multiple = stablehlo.samples_per_frame(model)
    for chosen in (questions, questions[1:2], questions[2:]):
        found = artifact.call(weights, *parity.stack(chosen, multiple))
        rows = [questions.index(question) for question in chosen]
        np.testing.assert_array_equal(np.asarray(found), expected[rows])


def test_it_is_lowered_for_machines_that_are_not_here(exported):
    model, _, artifact = exported
    frame = stablehlo.samples_per_frame(model)
    assert artifact.platforms == ("cpu", "cuda", "tpu")
    assert {str(size) for aval in artifact.in_avals[-3:] for size in aval.shape} == {
        "b",
        f"{frame}*s",
        "n",
    }


def test_every_weight_is_an_argument_that_is_used(exported):
    _, variables, artifact = exported
    weights = to_names(variables)
    assert len(artifact.in_avals) == len(weights) + 3
    assert set(artifact.module_kept_var_idx) == set(range(len(weights) + 3))


def test_an_unknown_platform_is_named(rng):
    model, variables = make("stack", rng)
    with pytest.raises(UserError, match="'gpu'"):
        stablehlo.export_answer(
            model, to_names(variables), max_tokens=2, eos_id=EOS, platforms=("cpu", "gpu")
        )


def test_names_and_collections_are_one_another_s_inverse(exported):
    model, variables, _ = exported
    weights = to_names(variables)
    assert list(weights) == sorted(weights) and "adapter/out/kernel" in weights
    again = to_variables(weights, model.config.trainable)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))
