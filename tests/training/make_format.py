"""Writes what `test_formats.py` reads for the format version of this checkout; run it when that is raised.

    python tests/training/make_format.py

It trains the toy of this folder, and leaves its run, a foundation model in both formats and what must be read
of them in `tests/training/data/format_N.tar.gz`, N being `provenance.FORMAT_VERSION`.
"""

import io
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from toy import toy_train

from slm_jax.checkpoints.foundation import save_foundation
from slm_jax.checkpoints.provenance import FORMAT_VERSION

DATA = Path(__file__).parent / "data"
# Of the run: its evaluation's metric keeps one more checkpoint than the newest two.
STEPS = 6
RUN = {"keep_best": 1, "best_metric": "wer", "eval_period": 2, "checkpoint_period": 3, "log_period": 1}


def scores(step: int, state: object, frozen: object) -> dict[str, float]:
    """An evaluation for which step 2 is the best."""
    return {"wer": abs(step - 2) / 10}


def model() -> dict[str, dict[str, np.ndarray]]:
    """Parameters of a foundation model, one dtype each."""
    rng = np.random.default_rng(5)
    return {
        "layer": {
            "kernel": rng.standard_normal((3, 4)).astype(np.float32),
            "scale": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
            "table": rng.integers(-127, 128, (2, 3)).astype(np.int8),
        }
    }


def main() -> int:
    """Writes the archive."""
    archive = DATA / f"format_{FORMAT_VERSION}.tar.gz"
    if archive.exists():
        print(f"{archive} exists; a version that was released stays as it is", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"format_{FORMAT_VERSION}"
        folder.mkdir()
        result = toy_train(folder / "run", STEPS, evaluate=scores, **RUN)
        shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)
        records = {
            form: save_foundation(folder / form, model(), kind="toy", config={"dim": 4}, format=form)
            for form in ("orbax", "safetensors")
        }
        expected = {
            "params": {
                jax.tree_util.keystr(path): np.asarray(leaf).astype(np.float64).ravel().tolist()
                for path, leaf in jax.tree_util.tree_leaves_with_path(result.state.params)
            },
            "fingerprints": {form: record.fingerprint for form, record in records.items()},
            # What a run that goes on learns; `main` of this file is what went before.
            "losses": [
                json.loads(line)["loss"] for line in (folder / "run" / "steps.jsonl").read_text().splitlines()
            ],
        }
        longer = Path(temporary) / "longer"
        shutil.copytree(folder / "run", longer)
        toy_train(longer, STEPS + 2, evaluate=scores, **RUN)
        expected["losses"] += [
            json.loads(line)["loss"] for line in (longer / "steps.jsonl").read_text().splitlines()[STEPS:]
        ]
        (folder / "expected.json").write_text(json.dumps(expected))
        DATA.mkdir(exist_ok=True)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.add(folder, folder.name)
        archive.write_bytes(packed.getvalue())
    print(f"{archive}: {archive.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
