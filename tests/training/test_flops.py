"""FLOPs of a step: the formula against the count of the traced program, and both against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models import conformer, whisper
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer, StackReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.partitioning.sharding import partitioned
from slm_jax.training.flops import step_flops, traced_flops
from slm_jax.training.initialisation import optimizer_of, run_shapes
from slm_jax.training.objectives.slm import SLMObjective
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


def traced(config: SLMConfig, shapes: dict) -> int:
    """What the program of a whole step computes."""
    objective, adam = SLMObjective(SLM(config)), AdamWConfig()
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
    found, expected = traced(config, shapes), sum(step_flops(config, shapes).values())
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
    whole = step_flops(SMALL, shapes)
    frames = {name: shape for name, shape in shapes.items() if name != "speech"}
    frames["speech_frames"] = jax.ShapeDtypeStruct((4, 2, 30, SLM(SMALL).reduced_dim), jnp.bfloat16)
    assert step_flops(SMALL, frames) == whole | {"speech_encoder": 0}
    assert traced(SMALL, frames) == pytest.approx(sum(whole.values()) - whole["speech_encoder"], rel=0.01)
    text = {name: shape for name, shape in shapes.items() if not name.startswith("speech")}
    found = step_flops(SMALL, text)
    assert found["speech_encoder"] == found["adapter"] == 0
    # No gradient passes: half of what it takes behind an adapter that learns.
    assert 2 * found["head"] == whole["head"] and 2 * found["llm_encoder"] < whole["llm_encoder"]


def test_the_paper_sized_step():
    """Batch 256 x 30 s and 64 + 64 tokens: within 1 % of a count by 2N, 4N and 6N."""
    from slm_jax.models import slm

    config = slm.preset("xxl")
    shapes = shapes_of_batch(SLM(config), 256, 1, 188, 64, 64)
    found = {name: value / 1e12 for name, value in step_flops(config, shapes).items()}
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


def test_an_encoder_that_the_formula_does_not_know_is_named():
    config = dataclasses.replace(SMALL, speech_encoder=whisper.preset("tiny"))
    with pytest.raises(UserError, match="the speech encoder's is a WhisperConfig"):
        step_flops(config, shapes_of_batch(SLM(config), 1, 1, 10, 4, 4))
