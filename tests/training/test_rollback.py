"""Going back to a checkpoint and past rows: losses as without these rows, once, and safe under kills."""

import json
import os
import shutil
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


SEED = int(os.environ["SLM_TEST_SEED"])


def train(run: Path, steps: int, **options):
    return toy_train(run, steps, seed=SEED, keep_last=10, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 20 steps with checkpoints 5, 10, 15 and 20, to be copied."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, 20)
    return run


@pytest.fixture(scope="module")
def without_two(tmp_path_factory) -> list[dict]:
    """Steps of a run whose data lack the rows of two steps after the fifth."""
    run = tmp_path_factory.mktemp("without") / "run"
    train(run, 12, missing=(5 * ROWS, 2 * ROWS), checkpoint_period=100)
    return steps_of(run)


def test_a_run_that_went_back_learns_as_one_without_the_rows(tmp_path, whole, capfd):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    asked = Rollback(10, 3)
    train(run, 18, rollback=asked)
    said = capfd.readouterr().err
    aside = run / "checkpoints_rolled_back" / "1"
    assert f"rolled back to step 10: checkpoints 15, 20 are in {aside}" in said
    assert "going on from step 10; rows 160 to 207 of the plan are left out" in said
    assert saved(aside) == [15, 20]
    assert (aside / "steps.jsonl").read_bytes() == (whole / "steps.jsonl").read_bytes()
    # The same command, and one without the flags, go on; the rows stay behind.
    train(run, 21, rollback=asked)
    assert "going on from step 18; rows 160 to 207 of the plan are left out" in capfd.readouterr().err
    train(run, 24)
    train(tmp_path / "oracle", 24, missing=(10 * ROWS, 3 * ROWS), checkpoint_period=100)
    assert steps_of(run) == steps_of(tmp_path / "oracle")
    assert saved(run / "checkpoints_rolled_back") == [1]
    # Back once more: both stretches are left out.
    train(run, 22, rollback=Rollback(20, 1))
    assert "rows 160 to 207, 368 to 383 of the plan are left out" in capfd.readouterr().err
    assert saved(run / "checkpoints_rolled_back") == [1, 2]


def test_a_start_before_anything_new_is_saved_leaves_the_rows_out_too(tmp_path, whole, without_two):
    run = Path(shutil.copytree(whole, tmp_path / "run"))

    def dies(*_):
        raise KeyboardInterrupt

    for options in ({"rollback": Rollback(5, 2)}, {}):
        with pytest.raises(KeyboardInterrupt):
            # Every later checkpoint waits for an evaluation that never ends well.
            train(run, 12, evaluate=dies, eval_period=7, checkpoint_period=100, **options)
        assert saved(run / "checkpoints") == [5]
    train(run, 12, rollback=Rollback(5, 2), checkpoint_period=100)
    assert steps_of(run) == without_two


PROGRAM = """
import os, signal, sys
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
seed = int(os.environ["SLM_TEST_SEED"])
toy_train(sys.argv[1], 20, seed=seed, keep_last=10, rollback=rollback.Rollback(5, 2))
"""


def test_killed_between_moves_the_next_start_finishes_it(tmp_path, rng, whole, without_two):
    killed, moved = Path(shutil.copytree(whole, tmp_path / "killed")), int(rng.integers(3))
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(killed), str(moved)],
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
    assert len(saved(killed / "checkpoints")) == 4 - moved
    with pytest.raises(
        UserError, match="cut off, expected its own --rollback_to 5 --skip_steps 2 or neither"
    ):
        train(killed, 12, rollback=Rollback(5, 1))
    for flags in (Rollback(5, 2), None):
        run = Path(shutil.copytree(killed, tmp_path / str(flags)))
        train(run, 12, rollback=flags, checkpoint_period=100)
        assert steps_of(run) == without_two
        aside = run / "checkpoints_rolled_back" / "1"
        assert saved(aside) == [10, 15, 20]
        assert (aside / "steps.jsonl").read_bytes() == (whole / "steps.jsonl").read_bytes()
        assert saved(run / "checkpoints_rolled_back") == [1]


def test_what_cannot_be_is_told_in_a_sentence_and_moves_nothing(tmp_path, whole):
    with pytest.raises(UserError, match=r"--rollback_to 5: .* no checkpoint of it; nothing is saved yet"):
        train(tmp_path / "none", 10, rollback=Rollback(5))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for asked, seed, told in (
        (Rollback(6), SEED, r"--rollback_to 6: .* no checkpoint of it; the nearest saved one is 5"),
        (Rollback(5), SEED + 1, "made with another plan"),
    ):
        with pytest.raises(UserError, match=told):
            toy_train(run, 10, seed=seed, rollback=asked)
    assert saved(run / "checkpoints") == [5, 10, 15, 20]
    assert not (run / "rollbacks.json").exists()
    with pytest.raises(UserError, match="--skip_steps is -1, expected a whole number of at least 0"):
        Rollback(5, -1)
    (run / "rollbacks.json").write_text("[{")
    with pytest.raises(UserError, match=r"rollbacks.json is damaged"):
        train(run, 12)
