"""What a run goes on from when its newest checkpoints are damaged."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from toy import toy_train

from slm_jax.checkpoints.checksums import DamagedCheckpoint
from slm_jax.errors import UserError
from slm_jax.training.rollback import Rollback

# Orbax reads several arrays at a time and asks for the outcome of the first that fails alone: Python then
# reports the others when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def losses(model_dir: Path) -> list[tuple[int, float]]:
    lines = (model_dir / "steps.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def damage(model_dir: Path, step: int, how: str, rng: np.random.Generator) -> None:
    folder = model_dir / "checkpoints" / str(step)
    data = max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    if how == "truncated":
        os.truncate(data, int(rng.integers(data.stat().st_size // 2)))
    elif how == "deleted":
        data.unlink()
    elif how == "number":
        # One bit of one number, far from what says how long anything is.
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1 << int(rng.integers(8))
        data.write_bytes(content)
    else:
        record = folder / "record" / "metadata"
        # Still JSON: the run would go on from other rows.
        record.write_text(record.read_text().replace('"rows_consumed": ', '"rows_consumed": 1'))


@pytest.mark.parametrize("how", ["truncated", "deleted", "number", "record"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, rng, capsys, how):
    toy_train(tmp_path / "whole", 14, log_period=1)
    toy_train(tmp_path / "run", 10, log_period=1, checkpoint_period=4, keep_last=3)
    for step in (8, 10):
        damage(tmp_path / "run", step, how, rng)
    capsys.readouterr()
    toy_train(tmp_path / "run", 14, log_period=1, checkpoint_period=4, keep_last=3)
    told = capsys.readouterr().err
    assert "going on from step 4; checkpoint" in told
    aside = tmp_path / "run" / "checkpoints_damaged"
    assert told.count("is damaged: ") == 2 and f"it lies in {aside / '10'} now" in told
    assert sorted(path.name for path in aside.iterdir()) == ["10", "8"]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    # Damaged once more, it finds another name.
    damage(tmp_path / "run", 14, how, rng)
    (aside / "14").mkdir()
    toy_train(tmp_path / "run", 14, checkpoint_period=4, keep_last=3)
    assert sorted(path.name for path in aside.iterdir()) == ["10", "14", "14.2", "8"]


def test_where_none_is_whole_nothing_begins_afresh_and_nothing_moves(tmp_path, rng):
    toy_train(tmp_path, 8, checkpoint_period=4)
    for step in (4, 8):
        damage(tmp_path, step, "deleted", rng)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/8 is damaged: .*; none older than that"):
        toy_train(tmp_path, 10)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["4", "8"]
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_a_store_that_does_not_answer_has_damaged_nothing(tmp_path, monkeypatch):
    toy_train(tmp_path, 8, checkpoint_period=4)

    def refused(*_, **__):
        raise ValueError("PERMISSION_DENIED: Error opening file")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", refused)
    with pytest.raises(UserError, match="cannot be read: PERMISSION_DENIED") as caught:
        toy_train(tmp_path, 10)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_another_plan_is_no_damage(tmp_path, rng):
    toy_train(tmp_path, 8, checkpoint_period=4)
    damage(tmp_path, 8, "number", rng)
    with pytest.raises(UserError, match="checkpoints/8 was made with another plan"):
        toy_train(tmp_path, 10, seed=1)
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_a_rollback_is_not_gone_behind(tmp_path, rng):
    toy_train(tmp_path, 12, checkpoint_period=4, keep_last=5)
    toy_train(tmp_path, 10, checkpoint_period=4, keep_last=5, rollback=Rollback(8, 1))
    for step in (8, 10):
        damage(tmp_path, step, "number", rng)
    # Step 4 is whole, and knows nothing of the rows that are left out after step 8.
    with pytest.raises(DamagedCheckpoint, match="checkpoints/10 is damaged"):
        toy_train(tmp_path, 12, checkpoint_period=4, keep_last=5)
