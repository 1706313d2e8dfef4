"""Going back to a checkpoint and past rows: losses as without these rows, once, and safe under kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy import toy_train

from slm_jax.errors import UserError
from slm_jax.training.rollback import Rollback

ROWS = 16


def steps_of(model_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "steps.jsonl").read_text().splitlines()]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def train(run: Path, steps: int, seed: int, **options):
    return toy_train(run, steps, seed=seed, keep_last=10, **options)


def test_a_run_that_went_back_learns_as_one_without_the_rows(tmp_path, rng, capfd):
    seed = int(rng.integers(2**31))
    run, oracle = tmp_path / "run", tmp_path / "oracle"
    train(run, 20, seed)
    before = (run / "steps.jsonl").read_bytes()
    asked = Rollback(10, 3)
    train(run, 18, seed, rollback=asked)
    said = capfd.readouterr().err
    aside = run / "checkpoints_rolled_back" / "1"
    assert f"rolled back to step 10: checkpoints 15, 20 are in {aside}" in said
    assert "going on from step 10; rows 160 to 207 of the plan are left out" in said
    assert saved(aside) == [15, 20] and (aside / "steps.jsonl").read_bytes() == before
    # The same command, and one without the flags, go on; the rows stay behind.
    train(run, 21, seed, rollback=asked)
    assert "going on from step 18; rows 160 to 207 of the plan are left out" in capfd.readouterr().err
    train(run, 24, seed)
    train(oracle, 24, seed, missing=(10 * ROWS, 3 * ROWS))
    assert steps_of(run) == steps_of(oracle)
    assert saved(run / "checkpoints_rolled_back") == [1]
    # Back once more: both stretches are left out.
    train(run, 22, seed, rollback=Rollback(20, 1))
    assert "rows 160 to 207, 368 to 383 of the plan are left out" in capfd.readouterr().err
    assert saved(run / "checkpoints_rolled_back") == [1, 2]


def test_a_start_before_anything_new_is_saved_leaves_the_rows_out_too(tmp_path, rng):
    seed = int(rng.integers(2**31))
    train(tmp_path / "run", 10, seed)

    def dies(*_):
        raise KeyboardInterrupt

    for options in ({"rollback": Rollback(5, 2)}, {}):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", 9, seed, evaluate=dies, eval_period=7, **options)
        assert saved(tmp_path / "run" / "checkpoints") == [5]
    train(tmp_path / "run", 9, seed, rollback=Rollback(5, 2))
    train(tmp_path / "oracle", 9, seed, missing=(5 * ROWS, 2 * ROWS))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "oracle")


PROGRAM = """
import os, signal, sys
from pathlib import Path
from toy import toy_train
from slm_jax.training import rollback
left, move = int(sys.argv[2]), rollback._move_checkpoint
def moves(path, aside):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(path, aside)
rollback._move_checkpoint = moves
toy_train(sys.argv[1], 20, seed=int(sys.argv[3]), keep_last=10, rollback=rollback.Rollback(5, 2))
"""


@pytest.mark.parametrize("flags", [True, False])
def test_killed_between_moves_the_next_start_finishes_it(tmp_path, rng, flags):
    seed, moved = int(rng.integers(2**31)), int(rng.integers(3))
    run = tmp_path / "run"
    train(run, 20, seed)
    before = (run / "steps.jsonl").read_bytes()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), str(moved), str(seed)],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(saved(run / "checkpoints")) == 4 - moved
    train(run, 12, seed, rollback=Rollback(5, 2) if flags else None)
    train(tmp_path / "oracle", 12, seed, missing=(5 * ROWS, 2 * ROWS))
    assert steps_of(run) == steps_of(tmp_path / "oracle")
    aside = run / "checkpoints_rolled_back" / "1"
    assert saved(aside) == [10, 15, 20] and (aside / "steps.jsonl").read_bytes() == before
    assert saved(run / "checkpoints_rolled_back") == [1]


def test_what_cannot_be_is_told_in_a_sentence_and_moves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"--rollback_to 5: .* no checkpoint of it; nothing is saved yet"):
        toy_train(tmp_path, 10, rollback=Rollback(5))
    toy_train(tmp_path, 10)
    for asked, seed, told in (
        (Rollback(6), 0, r"--rollback_to 6: .* no checkpoint of it; the nearest saved one is 5"),
        (Rollback(5), 1, "made with another plan"),
    ):
        with pytest.raises(UserError, match=told):
            toy_train(tmp_path, 10, seed=seed, rollback=asked)
    assert saved(tmp_path / "checkpoints") == [5, 10]
    assert not (tmp_path / "rollbacks.json").exists()
    with pytest.raises(UserError, match="--skip_steps is -1, expected a whole number of at least 0"):
        Rollback(5, -1)
    (tmp_path / "rollbacks.json").write_text("[{")
    with pytest.raises(UserError, match=r"rollbacks.json is damaged"):
        toy_train(tmp_path, 12)
