"""Checkpoints of every format version stay readable; `make_format.py` wrote them."""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from make_format import DATA, RUN, STEPS, model, scores
from toy import toy_train

from slm_jax.checkpoints.foundation import load_foundation, read_foundation
from slm_jax.checkpoints.manager import MARKER_FILE, RunCheckpoints
from slm_jax.checkpoints.provenance import FORMAT_VERSION
from slm_jax.errors import UserError

VERSIONS = range(1, FORMAT_VERSION + 1)


@pytest.fixture
def saved(tmp_path, request) -> Path:
    """The folder of a version; one that is missing is an error."""
    with tarfile.open(DATA / f"format_{request.param}.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / f"format_{request.param}"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("saved", VERSIONS, indirect=True)
def test_a_run_goes_on(saved):
    expected = json.loads((saved / "expected.json").read_text())
    assert losses(saved / "run") == expected["losses"][:STEPS]
    result = toy_train(saved / "run", STEPS, evaluate=scores, **RUN)
    found = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64).ravel().tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(result.state.params)
    }
    assert found == expected["params"]
    toy_train(saved / "run", STEPS + 2, evaluate=scores, **RUN)
    # A later release of JAX may round otherwise.
    np.testing.assert_allclose(losses(saved / "run"), expected["losses"], rtol=1e-5)


@pytest.mark.parametrize("saved", VERSIONS, indirect=True)
def test_what_is_kept_is_known_with_its_metrics(saved):
    checkpoints = RunCheckpoints(saved / "run" / "checkpoints", 2, 1, "wer", read_only=True)
    assert checkpoints.all_steps() == [2, 4, 6] and checkpoints.best_step() == 2
    record = checkpoints.read_record(6)
    assert record["cursor"]["rows_consumed"] == 16 * STEPS and record["metrics"] == {"wer": 0.4}
    assert record["provenance"]["packages"].keys() >= {"jax", "orbax-checkpoint"}
    checkpoints.close()


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
@pytest.mark.parametrize("saved", VERSIONS, indirect=True)
def test_a_foundation_model_loads(saved, form):
    expected = json.loads((saved / "expected.json").read_text())["fingerprints"][form]
    assert read_foundation(saved / form).fingerprint == expected
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model())
    found = load_foundation(saved / form, "toy", shapes, config={"dim": 4})
    jax.tree.map(np.testing.assert_array_equal, found, model())


@pytest.mark.parametrize("saved", [FORMAT_VERSION], indirect=True)
def test_a_newer_version_is_refused(saved):
    marker = saved / "run" / MARKER_FILE
    marker.write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    before = sorted(path.name for path in (saved / "run").rglob("*"))
    with pytest.raises(UserError, match=f"format_version is {FORMAT_VERSION + 1}, this release reads up to"):
        toy_train(saved / "run", STEPS + 1, evaluate=scores, **RUN)
    assert sorted(path.name for path in (saved / "run").rglob("*")) == before
    shutil.rmtree(saved)
