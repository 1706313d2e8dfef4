"""What crosses the network: frozen weights layer by layer, and of the batch at most a number a token."""

import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.audio.spec_augment import SpecAugmentConfig, spec_augment
from slm_jax.models import conformer
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.encoders import encoder_class
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.models.whisper import WhisperConfig
from slm_jax.partitioning.collectives import instructions
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding, partitioned, spec_of
from slm_jax.training.flops import traced_flops
from slm_jax.training.objectives.slm import SLMObjective
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig
from slm_jax.training.program import TrainProgram, make_train_program

# No other dim of the model is like one of these, so that shapes tell what was gathered.
LAYERS, ROWS = 7, 16
POSITIONS, TEXT, TARGETS = 4, 11, 13
ENCODERS: dict[str, Any] = {
    "usm": ConformerConfig(layers=LAYERS, dim=48, heads=4, ffn_multiplier=2, subsampling_channels=(4, 4)),
    "w2v_bert": conformer.preset("w2v_bert", layers=LAYERS, dim=48, heads=4, ffn_dim=96),
    "whisper": WhisperConfig(layers=LAYERS, dim=48, heads=4, mlp_dim=96, positions=50),
}
# Where machine code is made in less time, collectives are the same.
QUICKLY: dict[str, bool | str] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


class Gather(NamedTuple):
    """An all-gather of a compiled program: its result's shape, where in the model, and whether in a loop."""

    shape: tuple[int, ...]
    where: str
    in_loop: bool


def gathers(program: str) -> list[Gather]:
    """Reads them off the text of a compiled program."""
    found = []
    for instruction, runs in instructions(program):
        if instruction.opcode in ("all-gather", "all-gather-start"):
            where = re.search(r'op_name="([^"]*)"', instruction.rest)
            for dims in re.findall(r"\w+\[([\d,]*)\]", instruction.type):
                shape = tuple(int(size) for size in dims.split(",") if size)
                found.append(Gather(shape, where[1] if where else "", runs > 1))
    return found


@pytest.fixture(scope="module")
def sharded_step() -> tuple[TrainProgram, list[Gather]]:
    llm = T5Config(
        vocab_size=120,
        emb_dim=32,
        num_heads=4,
        head_dim=12,
        mlp_dim=56,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        remat="full",
    )
    adapter = AdapterConfig(layers=LAYERS, dim=40, heads=4, head_dim=10, mlp_dim=88)
    model = SLM(SLMConfig(ENCODERS["usm"], llm, adapter, DropReducer(2)))
    shapes = {
        "speech": jax.ShapeDtypeStruct((ROWS, 1, POSITIONS * model.samples_per_position), jnp.int16),
        "speech_segments": jax.ShapeDtypeStruct((ROWS, 1, 2, 3), jnp.int32),
        "inputs": jax.ShapeDtypeStruct((ROWS, TEXT), jnp.int32),
        **{
            name: jax.ShapeDtypeStruct((ROWS, POSITIONS + TEXT), jnp.int32)
            for name in ("layout", "layout_segment_ids")
        },
        **{
            name: jax.ShapeDtypeStruct((ROWS, TARGETS), jnp.int32)
            for name in ("targets", "target_segment_ids", "target_positions")
        },
        "loss_weights": jax.ShapeDtypeStruct((ROWS, TARGETS), jnp.float32),
    }
    mesh = make_mesh(data=1, fsdp=8)
    program = make_train_program(
        SLMObjective(model, augment=SpecAugmentConfig()),
        AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=1)),
        shapes,
        seed=0,
        mesh=mesh,
    )
    with partitioned(mesh):
        lowered = program.jitted.lower(program.shapes.state, program.shapes.frozen, shapes)
        return program, gathers(lowered.compile(QUICKLY).as_text())


def test_weights_are_gathered_layer_by_layer(sharded_step):
    program, found = sharded_step
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    parts: dict[str, set[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        program.shapes.boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    ):
        stacked = leaf.names[0] == "layers"
        size = math.prod(leaf.value.shape[1:] if stacked else leaf.value.shape)
        if "fsdp" in spec_of(leaf.names, program.mesh):
            sizes[stacked].add(size)
            if stacked:
                parts.setdefault("/".join(entry.key for entry in path[1:3]), set()).add(size)
    assert not sizes[True] & sizes[False], "the sizes of weights do not tell which are of a layer"
    assert not [gather for gather in found if LAYERS in gather.shape]
    assert not [gather for gather in found if math.prod(gather.shape) in sizes[True] and not gather.in_loop]

    def gathered(forward: str, backward: bool) -> set[int]:
        """What one part gathers, on the way there or back."""
        return {
            math.prod(gather.shape)
            for gather in found
            if forward in gather.where and ("transpose(" in gather.where) is backward
        } & sizes[True]

    assert set(parts) == {"adapter/layers", "speech_encoder/layers", "llm/encoder", "llm/decoder"}
    assert gathered("speech_encoder", False) == parts["speech_encoder/layers"]
    # Nothing before the adapter learns.
    assert not gathered("speech_encoder", True)
    for backward in (False, True):
        assert gathered("llm.encode/encoder", backward) == parts["llm/encoder"]
        assert gathered("llm.decode/decoder", backward) == parts["llm/decoder"]
        assert gathered("adapter/while", backward) == parts["adapter/layers"]


def test_a_step_gathers_of_the_batch_a_number_a_token_at_most(sharded_step):
    _, found = sharded_step
    of_batch = [gather for gather in found if ROWS in gather.shape]
    # The embedding is split along its features, so that every device looks up all tokens.
    assert of_batch
    for gather in of_batch:
        assert gather.shape[0] == ROWS and math.prod(gather.shape) <= ROWS * max(TEXT, TARGETS), gather


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_computed_where_the_rows_lie(rng, name, axes):
    encoder = encoder_class(ENCODERS[name])(ENCODERS[name])
    samples = 12 * encoder.samples_per_frame
    speech = rng.integers(-9000, 9000, (ROWS, 1, samples)).astype(np.int16)
    segments = np.zeros((ROWS, 1, 1, 3), np.int32)
    segments[..., 0], segments[..., 2] = 1, rng.integers(samples // 3, samples + 1, (ROWS, 1, 1))

    def features(speech, segments):
        mel, ids = encoder.apply({}, speech, segments, method="features")
        return spec_augment(jax.random.key(0), mel, ids, SpecAugmentConfig()), ids

    mesh = make_mesh(**axes)
    rows = batch_sharding(mesh)
    with partitioned(mesh):
        traced = jax.jit(features, in_shardings=rows, out_shardings=rows).trace(speech, segments)
        compiled = traced.lower().compile(QUICKLY)
        mel, ids = compiled(*jax.device_put((speech, segments), rows))
    text = compiled.as_text()
    assert text and not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)
    plain = jax.jit(features).trace(speech, segments)
    expected, expected_ids = plain.lower().compile(QUICKLY)(speech, segments)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(mel, expected, atol=1e-4)
    # What a shard computes counts as often as there are shards.
    assert traced_flops(traced.jaxpr) == traced_flops(plain.jaxpr) > 0


def test_rows_that_shards_do_not_divide_are_computed_too(rng):
    encoder = encoder_class(ENCODERS["usm"])(ENCODERS["usm"])
    speech = rng.integers(-9000, 9000, (3, 1, 1280)).astype(np.int16)
    segments = np.array([[[[1, 0, 1100]]]] * 3, np.int32)

    @jax.jit
    def features(speech, segments):
        return encoder.apply({}, speech, segments, method="features")

    with partitioned(make_mesh(2, 2, 2)):
        found = features(speech, segments)
    jax.tree.map(np.testing.assert_array_equal, found, features(speech, segments))
