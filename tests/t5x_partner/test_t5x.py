"""An SLM inside T5X: losses, answers, checkpoints. Skipped where T5X is not there; it is never required."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.core
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

t5x = pytest.importorskip("t5x")

from t5x import eval as t5x_eval  # noqa: E402  # pyright: ignore[reportMissingImports]
from t5x import partitioning, train_state, utils  # noqa: E402  # pyright: ignore[reportMissingImports]
from t5x import train as t5x_train  # noqa: E402  # pyright: ignore[reportMissingImports]

from slm_jax.checkpoints.foundation import load_foundation  # noqa: E402
from slm_jax.checkpoints.safetensors import flatten, unflatten  # noqa: E402
from slm_jax.checkpoints.sources.t5x import T5XTensors  # noqa: E402
from slm_jax.checkpoints.to_t5x import write_t5x  # noqa: E402
from slm_jax.cli import demo, gin_config  # noqa: E402
from slm_jax.decoding.greedy import greedy_decode  # noqa: E402
from slm_jax.errors import UserError  # noqa: E402
from slm_jax.t5x_partner.model import SLMModel, logical_axis_rules  # noqa: E402
from slm_jax.t5x_partner.optimizer import ConfiguredOptimizer, logical_factor_rules  # noqa: E402
from slm_jax.t5x_partner.state import SLMTrainStateInitializer  # noqa: E402
from slm_jax.t5x_partner.tasks import for_t5x  # noqa: E402
from slm_jax.training.optimizers import MuonConfig  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS = 3
# Of T5X's own, and of what it is made of.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    demo.build(str(folder), "tiny")
    return folder


@pytest.fixture(scope="module")
def run(corpus) -> tuple[Path, list[dict[str, float]]]:
    """T5X's directory of a training on two devices, its matrices split, and the losses of each step."""
    model_dir = corpus.parent / "run"
    bindings = {
        "CORPUS_DIR": str(corpus), "MODEL_DIR": str(model_dir), "TRAIN_STEPS": STEPS, "BATCH_SIZE": 4,
        "LOG_PERIOD": 1, "EVAL_PERIOD": STEPS, "EVAL_STEPS": 1, "CHECKPOINT_PERIOD": STEPS,
        "seqio.Evaluator.num_examples": 4, "infer_eval/utils.DatasetConfig.batch_size": 4,
    }  # fmt: skip
    flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    files = ["--gin_file", "t5x/train.gin", "--gin_file", "t5x/demo.gin"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "t5x_losses.py", *files, *flags],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return model_dir, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def model(corpus, clean_registries, monkeypatch) -> SLMModel:
    """What the gin files make, in this process."""
    main = sys.modules["__main__"]
    for name, function in (("train", t5x_train.train), ("evaluate", t5x_eval.evaluate)):
        monkeypatch.setattr(main, name, function, raising=False)
    given = [f"CORPUS_DIR={str(corpus)!r}", "TRAIN_STEPS=4", "MODEL_DIR='run'"]
    gin_config.parse(["t5x/train.gin", "t5x/demo.gin"], given)
    return gin_config.build(SLMModel)


def batch_of(model: SLMModel) -> dict[str, jax.Array]:
    name = gin.get_configurable(for_t5x)()
    config = utils.DatasetConfig(
        mixture_or_task_name=name, task_feature_lengths={"inputs": 16, "targets": 24}, split="validation",
        batch_size=4, shuffle=False, seed=0, trim_output_features=False,
    )  # fmt: skip
    batch = next(utils.get_dataset(config, 0, 1, model.FEATURE_CONVERTER_CLS).as_numpy_iterator())
    return {name: jnp.asarray(array) for name, array in batch.items()}


def partitioner() -> Any:
    """Everything on every device: T5X takes all CPUs for one dim of its mesh."""
    rules = [(name, "data" if name == "batch" else None) for name, _ in logical_axis_rules()]
    return partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)


def initializer_of(model: SLMModel, batch: dict[str, jax.Array], optimizer: bool = True) -> Any:
    shapes = {name: array.shape for name, array in batch.items()}
    return SLMTrainStateInitializer(
        model.optimizer_def if optimizer else None, model.get_initial_variables, shapes, partitioner()
    )


def test_losses_are_those_of_slm_jax(run):
    _, losses = run
    assert [line["step"] for line in losses] == list(range(1, STEPS + 1))
    for line in losses:
        assert line["same_weights"] == pytest.approx(line["t5x"], rel=1e-5)
    # Its own updates too, as long as rounding has not grown.
    assert losses[1]["on_its_own"] == pytest.approx(losses[1]["t5x"], rel=1e-5)
    assert losses[1]["t5x"] != losses[0]["t5x"]


def test_a_checkpoint_holds_what_trains_and_nothing_frozen(run, model):
    model_dir, _ = run
    tensors = T5XTensors(model_dir).tensors
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"target", "state"}
    assert not [name for name in tensors if "llm" in name or "speech_encoder" in name]
    scores = (model_dir / "inference_eval" / "demo_asr_t5x-metrics.jsonl").read_text().splitlines()
    assert json.loads(scores[-1])["step"] == STEPS


def test_state_begins_with_foundations_and_goes_on_with_a_checkpoint(run, model):
    model_dir, _ = run
    batch = batch_of(model)
    initializer = initializer_of(model, batch)
    fresh = initializer.from_scratch(jax.random.PRNGKey(0))
    assert "flax_mutables" not in fresh.state_dict()
    for part, directory in model.foundations.items():
        place, found = model.objective.parts[part], fresh.flax_mutables["frozen"][part]
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flax.core.unfreeze(found)
        )
        expected = load_foundation(directory, place.kind, shapes, "float32")
        jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(found), expected)
    assert int(fresh.replace_step(jnp.int32(5)).step) == 5

    restored, manager = restore(initializer, model_dir / f"checkpoint_{STEPS}")
    manager.close()
    assert int(restored.step) == STEPS
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, restored)
    assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, fresh)
    source = T5XTensors(model_dir / f"checkpoint_{STEPS}")
    for name, leaf in flatten(flax.core.unfreeze(restored.params)).items():
        np.testing.assert_array_equal(leaf, source.parameter(name))


def restore(initializer: Any, path: Path, **settings: Any) -> Any:
    config = utils.RestoreCheckpointConfig(path=str(path), mode="specific", dtype="float32", **settings)
    return utils.create_checkpoint_manager_and_restore(
        initializer, initializer._partitioner, config, str(path), jax.random.PRNGKey(0),
        model_dir=str(path.parent), use_orbax=True,
    )  # fmt: skip


def test_what_slm_jax_writes_t5x_restores_bit_for_bit(model, tmp_path):
    batch = batch_of(model)
    initializer = initializer_of(model, batch)
    shapes = flatten(flax.core.unfreeze(initializer.global_train_state_shape.params))
    random = np.random.default_rng(0)
    params = {name: random.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()}
    folder = tmp_path / "checkpoint_9"
    folder.mkdir()
    write_t5x(folder, unflatten(params), 9)

    # By T5X's own reader, and by ours where a run begins.
    no_slots = {"assignment_map": ((r"^state.*$", None),), "fallback_to_scratch": True}
    theirs, manager = restore(initializer, folder, **no_slots)
    manager.close()
    model.initial_checkpoint = str(folder)
    ours = initializer.from_scratch(jax.random.PRNGKey(0))
    for state in (theirs, ours):
        assert int(state.step) == 0
        found = flatten(flax.core.unfreeze(state.params))
        assert found.keys() == params.keys()
        assert all(np.asarray(found[name]).tobytes() == params[name].tobytes() for name in params)


def test_answers_and_scores_are_those_of_slm_jax(model):
    batch = batch_of(model)
    state = initializer_of(model, batch, optimizer=False).from_scratch(jax.random.PRNGKey(0))
    assert isinstance(state, train_state.InferenceState)
    # On one device: all of them would do the same.
    params, mutables = jax.device_get((state.params, state.flax_mutables))

    @jax.jit
    def compute(params: Any, mutables: Any, batch: Any) -> dict[str, Any]:
        variables = {"params": params, "frozen": mutables["frozen"]}
        return {
            "own_answers": greedy_decode(model.module, variables, batch, max_tokens=24),
            "own_losses": model.module.apply(variables, batch)["token_losses"],
            "with_aux": model.predict_batch_with_aux(params, batch, flax_mutables=mutables),
            "scores": model.score_batch(params, batch, flax_mutables=mutables),
            "eval": model.eval_fn(params, batch, mutables),
        }

    found = compute(params, mutables, batch)
    answers, aux = found["with_aux"]
    np.testing.assert_array_equal(answers, found["own_answers"])
    assert aux["scores"].shape == (4,) and (aux["scores"] < 0).all()
    expected = -(found["own_losses"] * batch["loss_weights"]).sum(axis=1)
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)
    loss, metrics = found["eval"]
    np.testing.assert_allclose(loss, -expected.sum() / batch["loss_weights"].sum(), rtol=1e-5)
    per_token = metrics["loss_per_nonpadding_target_token"].compute()
    assert float(per_token) == pytest.approx(float(loss), rel=1e-6)
    with pytest.raises(UserError, match="return_intermediates is True"):
        model.score_batch(params, batch, return_intermediates=True)


def test_t5x_alone_would_draw_the_foundations_and_is_refused(model):
    shapes = {name: array.shape for name, array in batch_of(model).items()}
    with pytest.raises(UserError, match=r"expected train_state_initializer_cls = @state\.SLMTrain"):
        utils.TrainStateInitializer(model.optimizer_def, model.get_initial_variables, shapes, partitioner())


def test_what_a_user_may_mistake_is_told(model):
    batch = batch_of(model)
    with pytest.raises(UserError, match=r"OPTIMIZER is MuonConfig, expected @optimizers\.AdamWConfig"):
        ConfiguredOptimizer(MuonConfig())
    with pytest.raises(UserError, match="parameter_partitioning_dims is 3, expected 1 or 2"):
        logical_axis_rules(3)
    del model.foundations["llm"]
    with pytest.raises(UserError, match=r"SLMModel\.foundations has no 'llm', which is frozen"):
        initializer_of(model, batch)


def test_every_gin_file_parses_and_every_axis_has_rules(model):
    files = [name for name in gin_config.packaged_gin_files() if name.startswith("t5x/")]
    assert files == ["t5x/demo.gin", "t5x/eval.gin", "t5x/model.gin", "t5x/train.gin"]
    gin_config.parse(["t5x/eval.gin", "t5x/demo.gin"])
    assert gin_config.missing_required() == ["CHECKPOINT_PATH", "CORPUS_DIR", "EVAL_OUTPUT_DIR"]
    assert {name for name, _ in logical_axis_rules(2)} - {"batch"} <= set(logical_factor_rules())
    assert dict(logical_axis_rules(2))["embed"] == "data" and dict(logical_axis_rules())["mlp"] == "model"
