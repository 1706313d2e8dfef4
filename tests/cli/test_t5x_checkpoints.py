"""What a run has trained goes to a checkpoint of T5X and back, bit for bit; T5X itself is not needed here."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.sources.t5x import T5XTensors
from slm_jax.checkpoints.to_t5x import write_t5x
from slm_jax.cli import gin_config
from slm_jax.cli.run import Run, load_run
from slm_jax.cli.wiring import Wiring

STEP = 7


def wiring_of(workshop, run: Path, *more: str) -> Wiring:
    gin_config.parse(["recipes/quickstart.gin"], workshop.bindings(run, 4, more))
    return Wiring(gin_config.build(Run))


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of T5X, and its parameters by path."""
    folder = tmp_path_factory.mktemp("t5x") / f"checkpoint_{STEP}"
    folder.mkdir()
    random = np.random.default_rng(0)
    shapes = flatten(wiring_of(workshop, folder.parent / "run").shapes.state.params)
    params = {name: random.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()}
    # Bits that arithmetic would lose.
    params["adapter/out/kernel"].flat[:3] = np.array([np.nan, -0.0, 1e-42], np.float32)
    write_t5x(folder, unflatten(params), STEP)
    return folder, params


def to_run_words(workshop, source: Path, run: Path, *more: str) -> list[str]:
    bindings = [line for line in workshop.bindings(run, 4, more) if not line.startswith("MODEL_DIR")]
    flags = [f"--gin.{line}" for line in bindings]
    words = ["convert", "--from", str(source), "--to_run", str(run)]
    return [*words, "--gin_file", "recipes/quickstart.gin", *flags]


def bits_of(array: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, array.dtype.name, np.asarray(array).tobytes()


def test_to_a_run_and_back_keeps_every_bit(workshop, trained, slm_here, tmp_path):
    source, params = trained
    run = tmp_path / "run"
    done = slm_here(to_run_words(workshop, source, run))
    assert done.status == 0, done.err
    assert done.out.strip() == str(run)

    found = flatten(jax.device_get(Wiring(load_run(run)).trained_variables()["params"]))
    assert found.keys() == params.keys()
    assert all(bits_of(found[name]) == bits_of(params[name]) for name in params)

    done = slm_here(["convert", "--from", str(run), "--to_t5x", str(tmp_path / "back")])
    assert done.status == 0, done.err
    back = T5XTensors(tmp_path / "back")
    assert back.where == done.out.strip() == str(tmp_path / "back" / f"checkpoint_{STEP}")
    assert back.parameters() == T5XTensors(source).parameters()
    assert all(bits_of(back.parameter(name)) == bits_of(params[name]) for name in params)
    assert back.read("state.step") == STEP


def test_another_run_begins_with_it(workshop, trained, slm_here, tmp_path):
    source, params = trained
    run = tmp_path / "run"
    assert slm_here(to_run_words(workshop, source, run)).status == 0
    begin = f"run.Run.init_from={str(run)!r}", "run.Run.init_optimizer='fresh'"
    wired = wiring_of(workshop, tmp_path / "second", *begin)
    begun = wired.load_foundations({"params": wired.shapes.state.params})["params"]
    assert all(
        bits_of(leaf) == bits_of(params[name]) for name, leaf in flatten(jax.device_get(begun)).items()
    )


def test_to_run_refuses_what_is_of_another_model(workshop, trained, slm_here, tmp_path):
    source, _ = trained
    run = tmp_path / "run"
    done = slm_here(to_run_words(workshop, source, run, "adapters.AdapterConfig.mlp_dim=48"))
    assert done.status == 2 and not run.exists()
    assert "is of another model: parameter adapter/layers/mlp/w" in done.err
    for words, sentence in (
        (to_run_words(workshop, tmp_path / "none", run), "is no T5X checkpoint"),
        (to_run_words(workshop, source, source), "exists and is not an empty directory"),
    ):
        done = slm_here(words)
        assert done.status == 2 and sentence in done.err, done.err
    assert not run.exists()


def test_to_t5x_takes_the_step_that_is_asked_for(workshop, trained, slm_here, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert slm_here(to_run_words(workshop, trained[0], run)).status == 0
    words = ["convert", "--from", str(run), "--to_t5x", str(out)]
    done = slm_here([*words, "--step", "8"])
    assert done.status == 2 and "holds no checkpoint of step 8; " in done.err, done.err
    assert slm_here([*words, "--step", "7"]).status == 0
    done = slm_here(words)
    assert done.status == 2 and "checkpoint_7 exists and is not an empty directory" in done.err
    done = slm_here(["convert", "--from", str(out), "--to_t5x", str(tmp_path / "other")])
    assert done.status == 2 and "is no run, expected a directory of slm train" in done.err
    with contextlib.closing(RunCheckpoints(run / "checkpoints", read_only=True)) as checkpoints:
        assert checkpoints.all_steps() == [7]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--to a --to_run b", "expected one of --to, --to_hf, --to_t5x, --to_run"),
        ("--to_run b", "--to_run needs --gin_file"),
        ("--to_t5x b --gin_file runs/train.gin", "--gin_file has no meaning with --to_t5x"),
        ("--to b --gin.SEED=1", "reads no gin, so --gin.SEED=1 has no meaning here"),
        ("--to b --step 3", "--step has no meaning with --to"),
        ("--to_t5x gs://bucket/b", "--to_t5x is gs://bucket/b, expected a local folder, to be copied there"),
        ("--to_t5x b --dtype int8", "--dtype has no meaning with --to_t5x, which keeps every bit"),
    ],
)
def test_flags_that_have_no_meaning_are_refused(slm_here, words, sentence):
    done = slm_here(["convert", "--from", "somewhere", *words.split()])
    assert done.status == 2 and sentence in done.err, done.err
