"""FLOPs of a step: the formula against the count of the traced program, and both against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.models import conformer, wav2vec2, whisper
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.models.encoders import encoder_class
from slm_jax.models.lora import LoRAConfig
from slm_jax.models.reducers import DropReducer, StackReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5, T5Config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.partitioning.sharding import partitioned
from slm_jax.training.flops import slm_flops, traced_flops
from slm_jax.training.initialisation import optimizer_of, run_shapes
from slm_jax.training.objectives.base import Objective
from slm_jax.training.objectives.best_rq import BestRQConfig, BestRQObjective
from slm_jax.training.objectives.ctc import CTCObjective
from slm_jax.training.objectives.slm import SLMObjective
from slm_jax.training.objectives.text import TextObjective
from slm_jax.training.optimizers import AdamWConfig, make_schedule
from slm_jax.training.step import make_train_step

SMALL = SLMConfig(
    speech_encoder=ConformerConfig(layers=3, dim=64, heads=4, subsampling_channels=(8, 8)),
    llm=T5Config(
        vocab_size=500, emb_dim=48, num_heads=3, head_dim=20, mlp_dim=96, encoder_layers=6, decoder_layers=5
    ),
    adapter=AdapterConfig(layers=2, dim=56, heads=2, head_dim=24, mlp_dim=80),
    reducer=DropReducer(2),
)


def shapes_of_batch(model: SLM, rows: int, slots: int, positions: int, text: int, targets: int) -> dict:
    step, int32 = model.samples_per_position, jnp.int32
    layout = slots * positions + text
    return {
        "speech": jax.ShapeDtypeStruct((rows, slots, positions * step), jnp.int16),
        "speech_segments": jax.ShapeDtypeStruct((rows, slots, 3, 3), int32),
        "inputs": jax.ShapeDtypeStruct((rows, text), int32),
        "layout": jax.ShapeDtypeStruct((rows, layout), int32),
        "layout_segment_ids": jax.ShapeDtypeStruct((rows, layout), int32),
        **{
            name: jax.ShapeDtypeStruct((rows, targets), int32)
            for name in ("targets", "target_segment_ids", "target_positions")
        },
        "loss_weights": jax.ShapeDtypeStruct((rows, targets), jnp.float32),
    }


def traced(objective: Objective, shapes: dict) -> int:
    """What the program of a whole step computes."""
    adam = AdamWConfig()
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optimizer_of(adam, objective, shapes)
    run = run_shapes(objective, optimizer, shapes, mesh, DEFAULT_RULES)
    step = make_train_step(objective, optimizer, make_schedule(adam.schedule), seed=0, mesh=mesh)
    with partitioned(mesh):
        return traced_flops(jax.make_jaxpr(step)(run.state, run.frozen, shapes))


CASES = {
    "adapter": SMALL,
    "stacked": dataclasses.replace(SMALL, reducer=StackReducer(4)),
    "with the encoder": dataclasses.replace(SMALL, trainable=("adapter", "speech_encoder")),
    "encoder alone": dataclasses.replace(SMALL, trainable=("speech_encoder",)),
    "with the llm": dataclasses.replace(
        SMALL, trainable=("adapter", "llm"), llm=dataclasses.replace(SMALL.llm, gated=False, tied_logits=True)
    ),
    "llm alone": dataclasses.replace(SMALL, trainable=("llm",)),
    "lora": dataclasses.replace(SMALL, lora=LoRAConfig(16, 8.0, ("query", "value", "out", "wi_0", "wo"))),
    "lora of the decoder": dataclasses.replace(
        SMALL, lora=LoRAConfig(5, 8.0, ("decoder/mlp/wo", "encoder_decoder_attention/key"))
    ),
    "w2v-bert": dataclasses.replace(
        SMALL,
        speech_encoder=conformer.preset("w2v_bert", layers=2, dim=64, heads=4, ffn_dim=96),
        adapter=dataclasses.replace(SMALL.adapter, gated=True),
    ),
    "gemma": dataclasses.replace(
        SMALL,
        speech_encoder=conformer.preset("gemma3n", layers=2, dim=64, heads=4, subsampling_channels=(8, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_what_is_computed(rng, name):
    config = CASES[name]
    shapes = shapes_of_batch(SLM(config), *map(int, rng.integers([2, 1, 20, 5, 8], [6, 4, 40, 30, 30])))
    found, expected = traced(SLMObjective(SLM(config)), shapes), sum(slm_flops(config, shapes).values())
    mel = traced_flops(
        jax.make_jaxpr(lambda speech, segments: SLM(config)._encoder.features(speech, segments))(
            shapes["speech"], shapes["speech_segments"]
        )
    )
    # A trained head is computed again in the backward pass, which is no part of what the model asks for.
    again = 0
    if "llm" in config.trainable:
        rows, tokens = shapes["targets"].shape
        again = 2 * rows * (tokens + tokens % 2) * config.llm.emb_dim * config.llm.vocab_size
    # What is left: a chunk of targets may be padded, and the tokens' embeddings need no gradient.
    assert found - mel - again == pytest.approx(expected, rel=0.01)


def test_precomputed_frames_and_text_alone(rng):
    shapes = shapes_of_batch(SLM(SMALL), 4, 2, 30, 12, 14)
    whole = slm_flops(SMALL, shapes)
    frames = {name: shape for name, shape in shapes.items() if name != "speech"}
    frames["speech_frames"] = jax.ShapeDtypeStruct((4, 2, 30, SLM(SMALL).reduced_dim), jnp.bfloat16)
    assert slm_flops(SMALL, frames) == whole | {"speech_encoder": 0}
    assert traced(SLMObjective(SLM(SMALL)), frames) == pytest.approx(
        sum(whole.values()) - whole["speech_encoder"], rel=0.01
    )
    text = {name: shape for name, shape in shapes.items() if not name.startswith("speech")}
    found = slm_flops(SMALL, text)
    assert found["speech_encoder"] == found["adapter"] == 0
    # No gradient passes: half of what it takes behind an adapter that learns.
    assert 2 * found["head"] == whole["head"] and 2 * found["llm_encoder"] < whole["llm_encoder"]


def test_the_paper_sized_step():
    """Batch 256 x 30 s and 64 + 64 tokens: within 1 % of a count by 2N, 4N and 6N."""
    from slm_jax.models import slm

    config = slm.preset("xxl")
    shapes = shapes_of_batch(SLM(config), 256, 1, 188, 64, 64)
    found = {name: value / 1e12 for name, value in slm_flops(config, shapes).items()}
    positions, tokens = 256 * (188 + 64), 256 * 64
    # 23 d^2 a layer of the Conformer, and scores; 4.63B in the T5's encoder.
    assert found["speech_encoder"] == pytest.approx(2 * 32 * 23 * 1536**2 * 752 * 256 / 1e12, rel=0.1)
    assert found["adapter"] == pytest.approx(6 * 155.7e6 * 188 * 256 / 1e12, rel=0.03)
    assert found["llm_encoder"] == pytest.approx(4 * 4.631e9 * positions / 1e12, rel=0.03)
    assert found["head"] == pytest.approx(4 * 4096 * 250112 * tokens / 1e12, rel=1e-6)
    assert sum(found.values()) == pytest.approx(2605, rel=0.01)


def test_loops_branches_and_nested_programs_are_counted():
    x, w = jnp.ones((4, 5)), jnp.ones((5, 5))

    def body(carry, _):
        return jax.checkpoint(lambda y: jnp.sin(y) @ w)(carry), None

    def looped(x):
        y, _ = jax.lax.scan(body, x, None, length=7)
        return jnp.sum(jax.lax.cond(y[0, 0] > 0, lambda: y @ w @ w, lambda: y @ w))

    one = 2 * 4 * 5 * 5
    assert traced_flops(jax.make_jaxpr(jax.jit(looped))(x)) == one * (7 + 2)
    assert traced_flops(jax.make_jaxpr(lambda x: x @ w)(x)) == one

    def forever(x):
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ w, x)

    with pytest.raises(ValueError, match="unknown number of times"):
        traced_flops(jax.make_jaxpr(forever)(x))
    kernel = jnp.ones((3, 2, 6))
    convolved = jax.make_jaxpr(
        lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
    )(jnp.ones((2, 9, 2)))
    assert traced_flops(convolved) == 2 * (2 * 7 * 6) * 3 * 2
    assert np.prod(convolved.out_avals[0].shape) == 2 * 7 * 6


def test_zeros_that_a_strided_convolution_spreads_are_not_counted():
    kernel, x = jnp.ones((3, 4, 6)), jnp.ones((2, 20, 4))

    def strided(x):
        return jnp.sum(
            jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )

    forward = 2 * 2 * 10 * 3 * 4 * 6
    assert traced_flops(jax.make_jaxpr(strided)(x)) == forward
    assert traced_flops(jax.make_jaxpr(jax.grad(strided))(x)) == 2 * forward


WAV2VEC2 = wav2vec2.preset("hubert_large", layers=2, dim=64, heads=4, mlp_dim=96, conv_dims=(48,) * 7)
WHISPER = whisper.preset("tiny", layers=2, dim=48, heads=4, mlp_dim=80, positions=60)


@pytest.mark.parametrize("encoder", [WHISPER, WAV2VEC2])
@pytest.mark.parametrize("trainable", [("adapter",), ("adapter", "speech_encoder")])
def test_encoders_of_one_utterance_a_slot(rng, encoder, trainable):
    config = dataclasses.replace(SMALL, speech_encoder=encoder, trainable=trainable)
    shapes = shapes_of_batch(SLM(config), *map(int, rng.integers([2, 1, 20, 5, 8], [4, 3, 30, 30, 30])))
    rows, slots, _ = shapes["speech"].shape
    shapes["speech_segments"] = jax.ShapeDtypeStruct((rows, slots, 1, 3), jnp.int32)
    features = traced_flops(
        jax.make_jaxpr(SLM(config)._encoder.features)(shapes["speech"], shapes["speech_segments"])
    )
    found, expected = traced(SLMObjective(SLM(config)), shapes), slm_flops(config, shapes)
    assert expected["speech_encoder"] > 0.05 * sum(expected.values())
    assert found - features == pytest.approx(sum(expected.values()), rel=0.01)


def speech_alone(objective: Objective, rows: int, frames: int) -> dict:
    """Of a batch of the objectives that pretrain a speech encoder."""
    samples, int32 = frames * objective.samples_per_position, jnp.int32
    return {
        "speech": jax.ShapeDtypeStruct((rows, 1, samples), jnp.int16),
        "speech_segments": jax.ShapeDtypeStruct((rows, 1, 1, 3), int32),
        "targets": jax.ShapeDtypeStruct((rows, 5), int32),
        "target_segment_ids": jax.ShapeDtypeStruct((rows, 5), int32),
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["conformer", "whisper"])
def test_ctc(rng, kind, frozen):
    config = {"conformer": SMALL.speech_encoder, "whisper": WHISPER}[kind]
    encoder, vocab = encoder_class(config)(config), 90
    objective = CTCObjective(encoder, vocab, freeze_encoder=frozen)
    shapes = speech_alone(objective, *map(int, rng.integers([2, 20], [5, 50])))
    expected = objective.flops(shapes)
    features = traced_flops(jax.make_jaxpr(encoder.features)(shapes["speech"], shapes["speech_segments"]))
    frames = (
        WHISPER.positions if kind == "whisper" else shapes["speech"].shape[2] // encoder.samples_per_frame
    )
    # Optax looks up the labels' probabilities by products, forward and backward.
    lookups = 2 * 2 * shapes["speech"].shape[0] * frames * 5 * vocab
    found = traced(objective, shapes) - features - lookups
    assert found == pytest.approx(sum(expected.values()), rel=0.01)


def test_best_rq(rng):
    config = BestRQConfig(codebooks=3, codes=70, code_dim=6)
    objective = BestRQObjective(ConformerEncoder(SMALL.speech_encoder), config)
    shapes = speech_alone(objective, *map(int, rng.integers([2, 20], [5, 50])))
    expected = objective.flops(shapes)
    encoder = objective.model.encoder
    features = traced_flops(jax.make_jaxpr(encoder.features)(shapes["speech"], shapes["speech_segments"]))
    # The heads' logits are computed again in the backward pass.
    found = traced(objective, shapes) - features - expected["heads"] // 3
    assert found == pytest.approx(sum(expected.values()), rel=0.01)


def test_a_t5_on_text(rng):
    objective = TextObjective(T5(SMALL.llm))
    speech = shapes_of_batch(SLM(SMALL), *map(int, rng.integers([2, 1, 20, 5, 8], [6, 4, 40, 30, 30])))
    shapes = {name: shape for name, shape in speech.items() if not name.startswith("speech")}
    shapes["inputs_said"] = jax.ShapeDtypeStruct(shapes["inputs"].shape, bool)
    expected, (rows, tokens) = objective.flops(shapes), shapes["targets"].shape
    # As in an SLM whose LLM trains: the head once more, with the padding of its chunks.
    again = 2 * rows * (tokens + tokens % 2) * SMALL.llm.emb_dim * SMALL.llm.vocab_size
    assert traced(objective, shapes) - again == pytest.approx(sum(expected.values()), rel=0.015)
