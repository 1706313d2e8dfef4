"""Runs of a T5 on text alone, beside which nothing is frozen: it is saved whole, and gone on from."""

from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import load_foundation, read_foundation
from slm_jax.cli import gin_config
from slm_jax.cli.run import Run
from slm_jax.cli.train import train
from slm_jax.cli.wiring import Wiring, subtree
from slm_jax.models.quantization import is_quantized
from slm_jax.training.loop import TrainResult


def text_run(workshop, folder: Path, *more: str) -> Run:
    """The shipped T5's recipe on one of its tasks, with few rows, to save the T5 in `folder`/llm."""
    places = {
        "CORPUS_DIR": workshop.folder / "corpus",
        "MODEL_DIR": folder / "run",
        "LLM_OUTPUT": folder / "llm",
    }
    bindings = [binding for binding in workshop.bindings(folder, 2) if binding.startswith("t5.preset.")]
    bindings += [f"{name}={str(path)!r}" for name, path in places.items()]
    bindings += ["TRAIN_STEPS=2", "WARMUP_STEPS=1", "BATCH_SIZE=8", "run.Run.save_dtype=None"]
    bindings += ["MIXTURE_OR_TASK_NAME='demo_text_translate_es'"]
    gin_config.parse(["recipes/demo_t5.gin"], [*bindings, *more])
    return gin_config.build(Run)


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory) -> tuple[Path, TrainResult]:
    """A run to its end, and the folder in which it saved its T5."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_CACHE_DIR", str(workshop.folder / "cache"))
        return folder, train(text_run(workshop, folder))


def test_the_whole_t5_is_saved_as_it_trained(trained):
    folder, result = trained
    assert result.finished and not jax.tree.leaves(result.frozen)
    record = read_foundation(folder / "llm")
    assert record.kind == "t5" and record.fingerprint == fingerprint(result.state.params)
    saved = load_foundation(folder / "llm", "t5", result.state.params)
    jax.tree.map(np.testing.assert_array_equal, saved, result.state.params)


def test_another_run_goes_on_from_it(workshop, trained, tmp_path):
    folder, result = trained
    run = text_run(workshop, tmp_path, f"FOUNDATIONS={{'llm': {str(folder / 'llm')!r}}}")
    begins = Wiring(run).fresh_variables()
    jax.tree.map(np.testing.assert_array_equal, begins["params"], result.state.params)


def test_nothing_frozen_is_no_part_and_holds_no_int8():
    assert not is_quantized({}) and not is_quantized(None)
    kernel = {"kernel": np.zeros((2, 2), np.int8)}
    assert is_quantized({"llm": kernel})
    assert subtree({}, ()) is None and subtree({"llm": {}}, ("llm",)) is None
    assert subtree({"llm": kernel}, ()) == {"llm": kernel}
    assert subtree({"llm": kernel}, ("llm",)) is kernel and subtree({"llm": kernel}, ("encoder",)) is None
