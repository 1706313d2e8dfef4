"""Where the wall time of a run went, over starts that were killed, stopped and rolled back."""

import json
import time

import numpy as np
import pytest
from toy import toy_train

from slm_jax.cli.main import main
from slm_jax.training.goodput import FOLDER, Attempt, goodput, read_attempts
from slm_jax.training.rollback import Rollback


def attempt(began: float, first_step: int, step: int, **seconds: float) -> Attempt:
    named = {name.replace("_", " "): value for name, value in seconds.items()}
    return Attempt(began, first_step, step, named)


def test_steps_that_are_taken_again_do_not_count():
    found = goodput(
        [
            attempt(0.0, 0, 10, load=5.0, compile=2.0, training=20.0, data_wait=1.0, checkpoint=2.0),
            # Killed: went on 10 s later from step 8.
            attempt(40.0, 8, 20, load=4.0, training=24.0, evaluation=2.0),
        ]
    )
    assert found.wall == 70.0 == pytest.approx(sum(found.seconds.values()))
    assert found.seconds == pytest.approx(
        {
            "start": 9.0,
            "compilation": 2.0,
            "steps": 16.0 + 24.0,
            "steps taken twice": 4.0,
            "data wait": 1.0,
            "checkpoints": 2.0,
            "evaluation": 2.0,
            "down": 10.0,
        }
    )
    assert found.lost_steps == 2 and found.starts == 2 and found.share == pytest.approx(40 / 70)
    assert found.line().startswith("goodput 57.1 % of 70 s in 2 starts, 2 steps taken twice: down 14.3 %")


def test_a_rollback_takes_back_steps_of_several_starts():
    found = goodput(
        [
            attempt(0.0, 0, 10, training=10.0),
            attempt(10.0, 10, 20, training=10.0),
            attempt(20.0, 5, 8, training=3.0),
        ]
    )
    assert found.seconds == pytest.approx({"steps": 5.0 + 3.0, "steps taken twice": 15.0})
    assert found.lost_steps == 15


def test_what_another_release_tells_besides(tmp_path):
    (tmp_path / FOLDER).mkdir()
    told = {"began": 1.0, "first_step": 0, "step": 2, "seconds": {"training": 1.0}, "until": 2.0}
    (tmp_path / FOLDER / "1000.json").write_text(json.dumps(told))
    assert read_attempts(tmp_path) == [attempt(1.0, 0, 2, training=1.0)]


def test_a_run_is_none_the_worse_for_a_damaged_account(tmp_path, capfd):
    toy_train(tmp_path, 1)
    (tmp_path / FOLDER / "1000.json").write_text("{")
    assert toy_train(tmp_path, 2).step == 2
    assert "goodput is unknown: " in capfd.readouterr().err


def test_a_start_that_took_no_step():
    found = goodput([attempt(0.0, 3, 3, load=5.0, training=1.0), attempt(9.0, 3, 4, training=1.0)])
    assert found.seconds == pytest.approx({"start": 6.0, "down": 3.0, "steps": 1.0})
    assert found.lost_steps == 0


def test_random_starts_add_up_to_the_wall_time(rng: np.random.Generator):
    for _ in range(50):
        attempts, now, saved = [], 0.0, 0
        for _ in range(rng.integers(1, 6)):
            step = saved + int(rng.integers(0, 9))
            names = rng.choice(["training", "data wait", "restore", "evaluation", "other"], 3, replace=False)
            attempts.append(
                Attempt(now, saved, step, {str(name): float(rng.uniform(0, 9)) for name in names})
            )
            now = attempts[-1].until + float(rng.uniform(0, 5))
            saved = int(rng.integers(0, step + 1))
        found = goodput(attempts)
        assert found.wall == pytest.approx(attempts[-1].until - attempts[0].began)
        assert 0 <= found.share <= 1 and all(value >= 0 for value in found.seconds.values())


def test_a_run_tells_of_all_its_starts(tmp_path, capsys):
    began = time.time()
    toy_train(tmp_path, 6)
    # Five steps are saved, the sixth is too; back by a step, and three more.
    toy_train(tmp_path, 8, rollback=Rollback(5, 0))
    wall = time.time() - began
    first, second = read_attempts(tmp_path)
    assert (first.first_step, first.step, second.first_step, second.step) == (0, 6, 5, 8)
    assert first.until <= second.began
    found = goodput([first, second])
    assert found.lost_steps == 1 and 0 < found.share < 1 and found.wall <= wall
    assert {"start", "steps", "compilation", "checkpoints", "down"} <= found.seconds.keys()
    said = capsys.readouterr().err
    assert f"goodput {100 * found.share:.1f} % of" in said.splitlines()[-1]

    assert main(["goodput", "--run", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == found.line() and len(lines) == 1 + len(found.seconds)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["goodput", "--run", str(tmp_path)]) == 2
    assert "holds no record of a training" in capsys.readouterr().err
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "1.json").write_text(json.dumps({"began": 0}))
    assert main(["goodput", "--run", str(tmp_path)]) == 2
    assert "1.json is damaged" in capsys.readouterr().err
