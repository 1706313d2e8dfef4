"""Runs of a small SLM: what trains, what is saved, and that the mesh changes no loss."""

import json
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from slm_jax.audio.log_mel import LogMelConfig
from slm_jax.checkpoints.foundation import load_foundation, save_foundation
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.training.batches import PlacedBatch
from slm_jax.training.loop import LoopConfig, train
from slm_jax.training.objectives.slm import SLMObjective
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig

POSITIONS, INPUTS, TARGETS, ROWS, VOCAB = 5, 4, 6, 8, 32
CONFIG = SLMConfig(
    speech_encoder=ConformerConfig(
        layers=1,
        dim=16,
        heads=4,
        ffn_multiplier=2,
        subsampling_channels=(4, 4),
        log_mel=LogMelConfig(mel_bins=16, fft_length=512, window_ms=25.0),
    ),
    llm=T5Config(
        vocab_size=VOCAB,
        emb_dim=16,
        num_heads=4,
        head_dim=4,
        mlp_dim=32,
        encoder_layers=1,
        decoder_layers=1,
    ),
    adapter=AdapterConfig(layers=1, dim=16, heads=4, head_dim=4, mlp_dim=32, dropout=0.1),
    reducer=DropReducer(2),
)


class SpeechSource:
    """Rows of one utterance of random length and text, the same on every mesh."""

    rows_per_step = ROWS

    def __init__(self, mesh, seed: int):
        self.fingerprint = str(seed)
        self._sharding, self._seed = batch_sharding(mesh), seed
        self._hop = SLM(CONFIG).samples_per_position
        self.shapes = {
            name: jax.ShapeDtypeStruct((ROWS, *value.shape), value.dtype)
            for name, value in self.row(0).items()
        }

    def row(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self._seed, number])
        samples = int(rng.integers(1, POSITIONS * self._hop + 1))
        speech, text, tokens = -(-samples // self._hop), rng.integers(1, INPUTS), rng.integers(1, TARGETS + 1)
        layout = np.full(POSITIONS + INPUTS, -1, np.int32)
        # The first `POSITIONS` sources are the slot's speech, the text follows.
        layout[: speech + text] = [*range(speech), *range(POSITIONS, POSITIONS + text)]
        inside = (np.arange(TARGETS) < tokens).astype(np.int32)
        return {
            "speech": rng.integers(-9000, 9000, (1, POSITIONS * self._hop)).astype(np.int16),
            "speech_segments": np.array([[[1, 0, samples]]], np.int32),
            "inputs": rng.integers(2, VOCAB, INPUTS).astype(np.int32),
            "layout": layout,
            "layout_segment_ids": (layout >= 0).astype(np.int32),
            "targets": (rng.integers(2, VOCAB, TARGETS) * inside).astype(np.int32),
            "target_segment_ids": inside,
            "target_positions": (np.arange(TARGETS) * inside).astype(np.int32),
            "loss_weights": inside.astype(np.float32),
        }

    def anchor(self, rows_consumed: int) -> None:
        return None

    def batches(self, rows_consumed: int, anchor: object = None) -> Iterator[PlacedBatch]:
        while True:
            rows = [self.row(rows_consumed + place) for place in range(ROWS)]
            arrays = {
                name: jax.device_put(np.stack([row[name] for row in rows]), self._sharding)
                for name in self.shapes
            }
            yield PlacedBatch(arrays, {0: (f"row-{rows_consumed}",)}, {"target_tokens": 1.0})
            rows_consumed += ROWS


def run(model_dir, mesh, seed, steps=4, **options):
    return train(
        SLMObjective(SLM(CONFIG)),
        SpeechSource(mesh, seed),
        model_dir=model_dir,
        config=LoopConfig(train_steps=steps, log_ids=True, microbatches=2),
        optimizer=AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=1)),
        mesh=mesh,
        **options,
    )


def steps_of(model_dir):
    return [json.loads(line) for line in (model_dir / "steps.jsonl").read_text().splitlines()]


def sizes(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    seed = int(os.environ["SLM_TEST_SEED"])
    model_dir = tmp_path_factory.mktemp("slm")
    return seed, model_dir, run(model_dir, make_mesh(devices=jax.devices()[:1]), seed)


def test_nothing_but_the_adapter_trains_and_is_saved(one_device):
    _, model_dir, result = one_device
    assert set(result.state.params) == {"adapter"}
    assert set(result.frozen) == {"speech_encoder", "llm"}
    adapter = sizes(result.state.params)
    with ocp.StandardCheckpointer() as checkpointer:
        tree: Any = checkpointer.metadata(model_dir / "checkpoints" / "4" / "state").item_metadata
    held = {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(np.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree))
    }
    assert all("adapter" in path for path, size in held.items() if size > 1)
    # The parameters, two moments, and scalars.
    assert 3 * adapter < sum(held.values()) < 3 * adapter + 10
    variables = jax.jit(lambda: nn.unbox(SLM(CONFIG).init(jax.random.key(0), zeros())))()
    jax.tree.map(np.testing.assert_array_equal, result.frozen, variables["frozen"])


def test_training_leaves_every_bit_of_the_t5_answers_to_text(one_device):
    seed, _, result = one_device
    text_row = 3
    source = SpeechSource(make_mesh(), seed)
    rows = [source.row(number) for number in range(ROWS)]
    text = rows[text_row]["layout"]
    text = text[text >= POSITIONS]
    rows[text_row]["layout"] = np.pad(text, (0, POSITIONS + INPUTS - len(text)), constant_values=-1)
    rows[text_row]["layout_segment_ids"] = (rows[text_row]["layout"] >= 0).astype(np.int32)
    rows[text_row]["speech_segments"] = np.zeros_like(rows[text_row]["speech_segments"])
    with_speech = {name: np.stack([row[name] for row in rows]) for name in source.shapes}
    # That row and no other in a batch without speech, where `inputs` alone are the sources.
    alone = {
        name: array[[text_row] * ROWS] for name, array in with_speech.items() if not name.startswith("speech")
    }
    alone["layout"] = np.where(alone["layout"] < 0, -1, alone["layout"] - POSITIONS)

    @jax.jit
    def answers(variables, batch):
        def logits(model: SLM):
            targets = batch["targets"], batch["target_segment_ids"], batch["target_positions"]
            return model.llm.logits(model.llm.decode(*model.encode(batch), *targets))

        return SLM(CONFIG).apply(variables, method=logits)

    fresh = jax.jit(lambda: nn.unbox(SLM(CONFIG).init(jax.random.key(0), zeros())))()
    trained = {"params": result.state.params, "frozen": result.frozen}
    before, after = (np.asarray(answers(variables, with_speech)) for variables in (fresh, trained))
    np.testing.assert_array_equal(after[text_row], before[text_row])
    np.testing.assert_array_equal(answers(trained, alone), answers(fresh, alone))
    inside = rows[text_row]["target_segment_ids"] > 0
    np.testing.assert_array_equal(answers(trained, alone)[text_row][inside], before[text_row][inside])
    # The control: what the adapter says has changed.
    for row in set(range(ROWS)) - {text_row}:
        assert np.any(after[row] != before[row])


def zeros():
    shapes = SpeechSource(make_mesh(), 0).shapes
    return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_the_mesh_changes_no_loss(one_device, tmp_path, shape):
    seed, model_dir, _ = one_device
    run(tmp_path, make_mesh(*shape), seed)
    one, many = steps_of(model_dir), steps_of(tmp_path)
    assert [step["ids"] for step in many] == [step["ids"] for step in one]
    np.testing.assert_allclose([s["loss"] for s in many], [s["loss"] for s in one], rtol=1e-5)


def test_foundations_are_loaded_onto_the_mesh(one_device, tmp_path):
    seed, _, result = one_device
    for part, tree in result.frozen.items():
        save_foundation(tmp_path / part, jax.device_get(tree), kind=part, config={})

    def load(shapes):
        return {
            "frozen": {
                part: load_foundation(tmp_path / part, part, tree) for part, tree in shapes["frozen"].items()
            }
        }

    again = run(tmp_path / "run", make_mesh(2, 2, 2), seed, steps=1, load_variables=load)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.frozen), jax.device_get(result.frozen))
    kernel = again.frozen["llm"]["token_embedder"]["embedding"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
