"""Rows of several examples, as the plan packs them, train as the examples one by one do."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from slm_jax.cli import gin_config
from slm_jax.cli.run import MeshConfig
from slm_jax.data.batch import BatchShape, Placed, collate
from slm_jax.data.packing import Sizes, pack
from slm_jax.data.references import SPEECH, Reference
from slm_jax.models import conformer
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding, partitioned
from slm_jax.training.initialisation import make_state, shardings_of
from slm_jax.training.objectives.slm import SLMObjective
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig
from slm_jax.training.program import make_train_program

ENCODERS = {
    "usm": ConformerConfig(layers=2, dim=12, heads=2, subsampling_channels=(4, 4)),
    "w2v_bert": conformer.preset("w2v_bert", layers=2, dim=16, heads=2, ffn_dim=24),
}
VOCAB = 64


def objective_of(encoder: ConformerConfig, dropout: float = 0.0, layers: int = 2) -> SLMObjective:
    llm = T5Config(
        vocab_size=VOCAB,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        encoder_layers=layers,
        decoder_layers=layers,
    )
    adapter = AdapterConfig(layers=layers, dim=24, heads=2, head_dim=12, mlp_dim=26, dropout=dropout)
    return SLMObjective(SLM(SLMConfig(encoder, llm, adapter, DropReducer(2))))


def draw_examples(rng: np.random.Generator, count: int) -> tuple[list[Reference], dict[str, np.ndarray]]:
    """References whose lengths are no multiples of 10 ms, every second one as loud as can be."""
    references, audio = [], {}
    for i in range(count):
        samples = int(rng.integers(25, 110)) * 160 + int(rng.integers(1, 160))
        loud = 32_000 if i % 2 else 300
        audio[str(i)] = rng.integers(-loud, loud, samples).astype(np.int16)
        before, after = (rng.integers(2, VOCAB, int(rng.integers(0, 5))) for _ in range(2))
        inputs = np.concatenate([before, [SPEECH], after, [1]]).astype(np.int32)
        targets = rng.integers(2, VOCAB, int(rng.integers(1, 8))).astype(np.int32)
        references.append(Reference(str(i), f"{i}.wav", samples, inputs, targets, "t", "en"))
    return references, audio


def packed_rows(references: list[Reference], shape: BatchShape) -> list[list[Placed]]:
    step = shape.samples_per_position
    samples, inputs, targets = np.array(
        [(r.samples, r.input_tokens, len(r.targets)) for r in references], np.int64
    ).T
    packed = pack(Sizes(-(-samples // step), inputs, targets), shape)
    rows: list[list[Placed]] = [[] for _ in range(packed.rows)]
    for i in np.argsort(packed.first, kind="stable").tolist():
        rows[packed.row[i]].append(Placed(references[i], 0, int(packed.first[i]) * step))
    return rows


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_rows_train_as_their_examples_alone(name: str, rng: np.random.Generator):
    objective = objective_of(ENCODERS[name])
    step = objective.samples_per_position
    packed_shape = BatchShape.from_feature_lengths(
        {"speech": 64_000, "inputs": 60, "targets": 50}, rows=1, samples_per_position=step, segments=12
    )
    alone_shape = dataclasses.replace(packed_shape, segments=1, samples=-(-18_000 // step) * step, layout=80)
    references, audio = draw_examples(rng, 9)
    rows = packed_rows(references, packed_shape)
    assert max(map(len, rows)) >= 3 and len(rows) < len(references)

    def load(reference: Reference) -> np.ndarray:
        return audio[reference.id]

    variables = random_variables(objective, collate(rows, packed_shape, load), rng)

    @jax.jit
    def loss_and_gradients(params: Any, frozen: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            # Dropout is 0: the key draws nothing.
            loss_sum, weight_sum, _ = objective.loss(params, frozen, batch, jax.random.key(0))
            return loss_sum, weight_sum

        return jax.value_and_grad(loss, has_aux=True)(params)

    together = loss_and_gradients(variables["params"], variables["frozen"], collate(rows, packed_shape, load))
    singles = [[Placed(reference)] for reference in references]
    separate = loss_and_gradients(
        variables["params"], variables["frozen"], collate(singles, alone_shape, load)
    )
    ((loss, weight), gradients), ((one_loss, one_weight), one_gradients) = together, separate
    assert weight == one_weight == sum(map(len, (r.targets for r in references)))
    assert abs(loss - one_loss) <= 1e-5 * abs(one_loss)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(one_gradients), strict=True
    ):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)}: {error}"


def random_variables(objective: SLMObjective, batch: Any, rng: np.random.Generator) -> Any:
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.1) if "scale" in name else (0.0, 1.0 if "embedding" in name else 0.2)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, meta.unbox(shapes))


def losses_of(mesh_config: MeshConfig | None) -> list[float]:
    """Losses of three steps of two microbatches on packed rows; None is for one device."""
    rng = np.random.default_rng(int(os.environ["SLM_TEST_SEED"]))
    objective = objective_of(dataclasses.replace(ENCODERS["usm"], layers=1, dim=16), dropout=0.1, layers=1)
    step, steps, rows = objective.samples_per_position, 3, 16
    shape = BatchShape.from_feature_lengths(
        {"speech": 24_000, "inputs": 24, "targets": 20}, rows=rows, samples_per_position=step, segments=6
    )
    references, audio = draw_examples(rng, 160)
    packed = packed_rows(references, shape)[: steps * rows]
    assert len(packed) == steps * rows and max(map(len, packed)) > 1
    batches = [
        collate(packed[start : start + rows], shape, lambda reference: audio[reference.id])
        for start in range(0, steps * rows, rows)
    ]
    variables = random_variables(objective, batches[0], rng)
    if mesh_config is None:
        mesh, rules = make_mesh(devices=jax.devices()[:1]), MeshConfig().rules
    else:
        asked = mesh_config
        mesh, rules = make_mesh(asked.data, asked.fsdp, asked.tensor, slices=asked.slices), asked.rules
    program = make_train_program(
        objective,
        AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=1)),
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batches[0].items()},
        seed=0,
        microbatches=2,
        mesh=mesh,
        rules=rules,
    )
    params = jax.device_put(variables["params"], shardings_of(program.shapes.state.params))
    frozen = jax.device_put(variables["frozen"], shardings_of(program.shapes.frozen))
    state = make_state(params, program.optimizer, program.shapes.state)
    placed = [jax.device_put(batch, batch_sharding(mesh, rules)) for batch in batches]
    with partitioned(mesh, rules):
        lowered = program.jitted.lower(state, frozen, placed[0])
        compiled = lowered.compile({"xla_backend_optimization_level": "0"})
        losses = []
        for batch in placed:
            state, metrics = compiled(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def losses_of_one_device() -> list[float]:
    return losses_of(None)


@pytest.mark.parametrize("preset", ["ddp", "fsdp", "fsdp_tensor", "multislice"])
def test_no_preset_changes_a_loss(losses_of_one_device: list[float], preset: str):
    sizes = {"fsdp_tensor": ["TENSOR=2"], "multislice": ["SLICES=2", "TENSOR=2"]}
    gin_config.parse([f"partitioning/{preset}.gin"], sizes.get(preset, []))
    np.testing.assert_allclose(losses_of(gin_config.build(MeshConfig)), losses_of_one_device, rtol=1e-5)
    assert len(set(losses_of_one_device)) == len(losses_of_one_device)
