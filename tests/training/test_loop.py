"""The loop: any mesh, kill -9, signals, non-finite steps, what is saved and said."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from toy import EMBED, MLP, VOCAB, ToyObjective, ToySource, toy_train

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.errors import EXIT_LOST, UserError
from slm_jax.multihost.hang import Watchdog
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.batches import check_same_plan
from slm_jax.training.loop import LoopConfig, train
from slm_jax.training.optimizers import AdafactorConfig, AdamWConfig, MuonConfig, ScheduleConfig
from slm_jax.training.phases import Phases
from slm_jax.training.preemption import stop_requests
from slm_jax.training.step_log import StepLog


def steps_of(model_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "steps.jsonl").read_text().splitlines()]


def start(model_dir: Path, steps: int, seed: int, delay: float, hangs_at: int = -1) -> subprocess.Popen:
    program = Path(__file__).with_name("toy.py")
    return subprocess.Popen(
        [sys.executable, str(program), str(model_dir), str(steps), str(seed), str(delay), str(hangs_at)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, model_dir: Path, step: int) -> None:
    log = model_dir / "steps.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_bytes().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: exit status {process.poll()}")


def test_kill_and_restart_repeat_every_bit(tmp_path, rng):
    steps, seed = 24, int(rng.integers(2**31))
    uninterrupted, killed = tmp_path / "a", tmp_path / "b"
    toy_train(uninterrupted, steps, seed=seed)
    # Beyond the first checkpoint, at any moment of a step.
    at = int(rng.integers(7, 18))
    process = start(killed, steps, seed, delay=0.05)
    wait_for_step(process, killed, at)
    time.sleep(float(rng.uniform(0, 0.05)))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = [int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved and max(saved) < steps

    process = start(killed, steps, seed, delay=0.0)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert re.search(r"going on from step (5|10|15|20)\b", said)
    assert steps_of(killed) == steps_of(uninterrupted)
    losses = [step["loss"] for step in steps_of(killed)]
    assert len(losses) == steps and losses[-1] < losses[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0(tmp_path, rng, number):
    seed = int(rng.integers(2**31))
    process = start(tmp_path, 100_000, seed, delay=0.02)
    wait_for_step(process, tmp_path, 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    last = steps_of(tmp_path)[-1]["step"]
    assert f"asked to stop: saved step {last}" in said
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved[-1] == last
    result = toy_train(tmp_path, last + 3, seed=seed)
    assert result.finished and result.step == last + 3
    assert [step["step"] for step in steps_of(tmp_path)] == list(range(1, last + 4))


def test_a_second_interrupt_ends_at_once(capfd):
    with stop_requests(0) as stop_after:
        assert not stop_after(1)
        signal.raise_signal(signal.SIGINT)
        assert stop_after(1)
        assert "interrupt once more to end at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests(0) as stop_after:
            signal.raise_signal(signal.SIGINT)
            assert not stop_after(1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_sigterm_saves_while_a_batch_does_not_come(tmp_path, rng):
    seed = int(rng.integers(2**31))
    process = start(tmp_path, 100_000, seed, delay=0.02, hangs_at=7)
    wait_for_step(process, tmp_path, 7)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "asked to stop: saved step 7;" in said, said
    assert toy_train(tmp_path, 9, seed=seed).step == 9
    assert [step["step"] for step in steps_of(tmp_path)] == list(range(1, 10))


def start_two(*words: str) -> list[subprocess.Popen]:
    """Starts two processes of `toy.py` that train together."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    program = str(Path(__file__).with_name("toy.py"))
    return [
        subprocess.Popen(
            [sys.executable, program, *words],
            env={
                **os.environ,
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def test_an_interrupt_of_one_process_has_both_save(tmp_path, rng):
    running = start_two(str(tmp_path), "100000", str(rng.integers(2**31)), "0.02", "-1")
    wait_for_step(running[0], tmp_path, 7)
    running[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    last = steps_of(tmp_path)[-1]["step"]
    assert f"asked to stop: saved step {last}" in said[0] and "interrupt once more" in said[1]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


def test_a_hang_is_told_by_every_process_and_ends_them(tmp_path):
    words = [str(tmp_path), "9", "1", "0.01", "3"]
    running = start_two(*words, "--hangs_in", "1", "--hang_seconds", "10")
    said = [process.communicate(timeout=120)[1] for process in running]
    here = f"of 2 (host {socket.gethostname()})"
    assert [process.returncode for process in running] == [EXIT_LOST, EXIT_LOST], said
    # Whoever notices first says so, and the other one heard of it or has noticed, too.
    told = [line for line in "".join(said).splitlines() if line.startswith("slm: no progress for 1")]
    assert told and f"process 1 {here} is in 'data wait' of step 4 for " in told[0], said
    assert f"process 0 {here} is in 'training' of step 4 for " in told[0]
    for err in said:
        assert "Thread 0x" in err and "loop.py" in err and "without a word" not in err
    assert re.search(r'toy.py", line \d+ in batches', said[1])


@pytest.mark.parametrize("call", ["save", "wait"])
def test_storage_that_stalls_is_noticed(tmp_path, monkeypatch, call):
    noticed, released = [], threading.Event()

    def end(self, place, held):
        noticed.append(place.what)
        if "checkpoint" in place.what:
            released.set()

    def stall(*_):
        assert released.wait(60)

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(RunCheckpoints, call, stall)
    toy_train(tmp_path, 3, hang_seconds=0.5)
    assert "'checkpoint' of step 3" in noticed


def test_batches_of_an_evaluation_are_progress(tmp_path, monkeypatch):
    noticed = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, place, held: noticed.append(place.what))
    phases = Phases()

    def evaluate(*_):
        for _ in range(12):
            phases.touch()
            time.sleep(0.1)
        return {}

    toy_train(tmp_path, 1, hang_seconds=0.5, evaluate=evaluate, phases=phases)
    assert not [what for what in noticed if "evaluation" in what]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((8, 1, 1), "adamw"),
        ((2, 2, 2), "adamw"),
        ((1, 8, 1), "adamw"),
        ((1, 2, 4), "adamw"),
        ((1, 4, 2), "adafactor"),
        ((2, 2, 2), "muon"),
    ],
)
def test_any_mesh_gives_the_losses_of_one_device(tmp_path, rng, shape, kind):
    seed = int(rng.integers(2**31))
    schedule = ScheduleConfig(peak=0.01, warmup_steps=2, decay="rsqrt")
    optimizer = {
        "adamw": AdamWConfig(schedule=schedule),
        "adafactor": AdafactorConfig(schedule=schedule, min_dim_size_to_factor=8),
        "muon": MuonConfig(schedule=schedule),
    }[kind]
    for name, mesh in {"one": make_mesh(devices=jax.devices()[:1]), "many": make_mesh(*shape)}.items():
        result = toy_train(tmp_path / name, 12, mesh=mesh, optimizer=optimizer, seed=seed)
    expected = jax.tree.map(lambda x: x.sharding.spec, result.state.params)
    assert expected["wi"] == jax.sharding.PartitionSpec("fsdp", "tensor")
    one, many = steps_of(tmp_path / "one"), steps_of(tmp_path / "many")
    assert [step["ids"] for step in one] == [step["ids"] for step in many]
    np.testing.assert_allclose([s["loss"] for s in many], [s["loss"] for s in one], rtol=1e-5)


def test_resumes_on_another_mesh(tmp_path, rng):
    seed = int(rng.integers(2**31))
    toy_train(tmp_path / "a", 12, seed=seed)
    toy_train(tmp_path / "b", 7, seed=seed, mesh=make_mesh(2, 2, 2))
    toy_train(tmp_path / "b", 12, seed=seed, mesh=make_mesh(1, 4, 2))
    one, many = steps_of(tmp_path / "a"), steps_of(tmp_path / "b")
    assert [step["ids"] for step in one] == [step["ids"] for step in many]
    np.testing.assert_allclose([s["loss"] for s in many], [s["loss"] for s in one], rtol=1e-5)


def test_background_saves_are_not_touched_by_later_steps(tmp_path, rng):
    """The state is donated right after a save begins; what is saved must be the state as it was."""
    seed = int(rng.integers(2**31))
    toy_train(tmp_path / "long", 20, seed=seed, checkpoint_period=1, keep_last=20)
    short = toy_train(tmp_path / "short", 9, seed=seed)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), short.state.params
    )
    saved = RunCheckpoints(tmp_path / "long" / "checkpoints").restore_params(shapes, step=9)
    jax.tree.map(np.testing.assert_array_equal, saved, short.state.params)


@pytest.mark.parametrize("poison", [1, 2])
def test_a_nonfinite_step_is_skipped_and_counted(tmp_path, rng, poison):
    seed = int(rng.integers(2**31))
    result = toy_train(tmp_path, 8, seed=seed, poisoned={3: poison, 6: poison}, dropout=0.0)
    assert result.metrics["nonfinite_total"] == 2
    assert result.metrics["nonfinite_in_a_row"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.state.params)))
    losses = [step["loss"] for step in steps_of(tmp_path)]
    assert not np.isfinite(losses[2]) and not np.isfinite(losses[5])
    assert np.isfinite(np.delete(losses, [2, 5])).all()
    assert np.isfinite(result.metrics["loss"])


def test_a_skipped_step_changes_nothing(tmp_path, rng):
    seed = int(rng.integers(2**31))
    clean = toy_train(tmp_path / "a", 4, seed=seed)
    poisoned = toy_train(tmp_path / "b", 6, seed=seed, poisoned={5: 1, 6: 2})
    for name in ("params", "opt_state"):
        one, two = getattr(clean.state, name), getattr(poisoned.state, name)
        one, two = (tree.inner_state if name == "opt_state" else tree for tree in (one, two))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_nonfinite_steps_in_a_row_stop_the_run_before_anything_is_saved(tmp_path, rng):
    poisoned = dict.fromkeys(range(7, 100), 1)
    with pytest.raises(UserError, match=r"4 steps in a row up to step 10.*step 5 is saved"):
        toy_train(
            tmp_path,
            100,
            seed=int(rng.integers(2**31)),
            poisoned=poisoned,
            max_nonfinite_in_a_row=3,
            log_period=50,
        )
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == ["5"]


def test_the_checkpoint_holds_what_trains_and_nothing_frozen(tmp_path):
    result = toy_train(tmp_path, 2)
    table = RunCheckpoints(tmp_path / "checkpoints").read_record(2)["parameters"]
    trained = 2 * EMBED * MLP
    assert EMBED * MLP == MLP * VOCAB
    assert (
        sum(int(np.prod(shape)) for path, (shape, _) in table.items() if path.startswith("params/"))
        == trained
    )
    # Two moments of the parameters, and counters.
    slots = [int(np.prod(shape)) for path, (shape, _) in table.items() if path.startswith("opt_state/")]
    assert sum(size for size in slots if size > 1) == 2 * trained
    assert not [path for path in table if "table" in path or "frozen" in path]
    assert set(result.frozen) == {"table"}


def test_keeps_the_best_by_a_metric_of_the_evaluation(tmp_path):
    scores = {3: 0.5, 6: 0.2, 9: 0.4, 12: 0.3}
    seen = []

    def evaluate(step, state, frozen):
        seen.append((step, int(state.step), sorted(frozen)))
        return {"asr/wer": scores[step]}

    result = toy_train(
        tmp_path,
        12,
        evaluate=evaluate,
        eval_period=3,
        checkpoint_period=100,
        keep_last=1,
        keep_best=1,
        best_metric="asr/wer",
    )
    assert seen == [(step, step, ["table"]) for step in scores]
    assert result.metrics["asr/wer"] == 0.3
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [6, 12]


def test_an_unknown_best_metric_is_told(tmp_path):
    with pytest.raises(UserError, match="'wer' is no metric of the evaluation: asr/wer"):
        toy_train(tmp_path, 2, evaluate=lambda *_: {"asr/wer": 1.0}, keep_best=1, best_metric="wer")


class Written:
    def __init__(self):
        self.scalars, self.flushed = {}, False

    def write_scalars(self, step, scalars):
        self.scalars.setdefault(step, {}).update(scalars)

    def flush(self):
        self.flushed = True


def test_says_what_it_does(tmp_path, capfd):
    writer = Written()
    toy_train(tmp_path, 8, writer=writer, evaluate=lambda *_: {"score": 1.5})
    said = capfd.readouterr().err
    assert "process 0 of 1: 8 of 8 devices (cpu)" in said
    assert "mesh: slice=1, data=1, fsdp=1, tensor=1" in said
    assert "params: 1,024 numbers, 4,096 bytes per device" in said
    assert "frozen: 256 numbers, 1,024 bytes per device" in said
    assert "first batch: " in said and "tokens int32[16, 6]" in said and "0: row-0" in said
    assert re.search(
        r"step 4/8  loss \d\.\d{4}  \S+ s/step  \S+ audio-h/s  "
        r"\S+ tokens/s/device  \S+ TFLOP/s/device  data wait \d+ %  ETA 0:00:0\d",
        said,
    )
    assert re.search(r"train step: traced and lowered in \d+\.\d s, compiled in \d+\.\d s", said)
    assert re.search(r"first step done after \d+\.\d s: ", said)
    assert "evaluation at step 8: score 1.5" in said
    assert sorted(writer.scalars) == [1, 4, 5, 8] and writer.flushed
    assert writer.scalars[8]["eval/score"] == 1.5
    names = {"loss", "weight", "grad_norm", "update_norm", "param_norm", "learning_rate", "accuracy"}
    assert {f"train/{name}" for name in names} <= set(writer.scalars[4])
    assert writer.scalars[4]["train/learning_rate"] == pytest.approx(0.01)
    assert "wi" in (tmp_path / "sharding_plan.txt").read_text()


def test_loaded_variables_replace_fresh_ones(tmp_path, rng, capfd):
    table = rng.normal(size=(VOCAB, EMBED)).astype(np.float16)
    wi = rng.normal(size=(EMBED, MLP)).astype(np.float32)
    asked = []

    def load(shapes):
        asked.append(sorted(shapes))
        found = {"frozen": {"table": jax.numpy.asarray(table)}}
        if "params" in shapes:
            found["params"] = {"wi": jax.numpy.asarray(wi)}
        return found

    mesh = make_mesh(2, 2, 2)
    optimizer = AdamWConfig(schedule=ScheduleConfig(peak=0.0))
    result = toy_train(tmp_path, 2, load_variables=load, mesh=mesh, optimizer=optimizer)
    # Frozen variables keep the dtype that they come with, and lie as the rules say.
    np.testing.assert_array_equal(result.frozen["table"], table)
    assert result.frozen["table"].dtype == np.float16
    assert result.frozen["table"].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert "frozen: 256 numbers, 128 bytes per device" in capfd.readouterr().err
    np.testing.assert_array_equal(result.state.params["wi"], wi)
    assert float(np.abs(result.state.params["wo"]).sum()) > 0
    toy_train(tmp_path, 3, load_variables=load, mesh=mesh, optimizer=optimizer)
    assert asked == [["frozen", "params"], ["frozen"]]


def test_a_foundation_that_does_not_fit_is_refused(tmp_path, rng):
    small = jax.numpy.zeros((VOCAB, 2))
    with pytest.raises(UserError, match=r"frozen/table of shape \[16, 2\], this model's has \[16, 16\]"):
        toy_train(tmp_path / "a", 1, load_variables=lambda _: {"frozen": {"table": small}})
    with pytest.raises(UserError, match="brings frozen/tabel, which this model lacks"):
        toy_train(tmp_path / "b", 1, load_variables=lambda _: {"frozen": {"tabel": small}})


def test_another_plan_is_refused(tmp_path):
    toy_train(tmp_path, 2, seed=1)
    with pytest.raises(UserError, match="made with another plan"):
        toy_train(tmp_path, 4, seed=2)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = toy_train(tmp_path, 4)
    again = toy_train(tmp_path, 4)
    assert again.finished and again.step == 4
    jax.tree.map(np.testing.assert_array_equal, first.state, again.state)
    assert len(steps_of(tmp_path)) == 4


@pytest.mark.parametrize("options", [{}, {"keep_best": 1, "best_metric": "wer"}])
def test_a_run_that_died_in_its_last_evaluation_evaluates_when_it_goes_on(tmp_path, options):
    evaluated = []

    def dies(step, state, frozen):
        raise KeyboardInterrupt

    def scores(step, state, frozen):
        evaluated.append((step, int(state.step)))
        return {"wer": 0.5}

    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, 4, evaluate=dies, **options)
    again = toy_train(tmp_path, 4, evaluate=scores, **options)
    assert again.finished and again.metrics["wer"] == 0.5 and evaluated == [(4, 4)]
    # It ended well: the same command has nothing left to do.
    assert toy_train(tmp_path, 4, evaluate=scores, **options).finished
    assert evaluated == [(4, 4)]
    toy_train(tmp_path, 6, evaluate=scores, **options)
    assert evaluated == [(4, 4), (6, 6)]
    # Steps that are taken again are scored again.
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, 6, evaluate=dies, **options)
    toy_train(tmp_path, 6, evaluate=scores, **options)
    assert evaluated[2:] == [(6, 6)]


def test_a_batch_that_does_not_spread_over_the_mesh_is_refused(tmp_path):
    mesh = make_mesh(8)
    with pytest.raises(UserError, match=r"12 is not divisible by the mesh's 8 batch shards; .* 8 or 16"):
        train(
            ToyObjective(),
            ToySource(mesh, rows_per_step=12),
            model_dir=tmp_path,
            config=LoopConfig(train_steps=1),
            optimizer=AdamWConfig(),
            mesh=mesh,
        )


@pytest.mark.parametrize("field", ["train_steps", "microbatches", "log_period", "eval_period"])
def test_periods_below_one_are_refused(field):
    with pytest.raises(UserError, match=f"{field} is 0"):
        dataclasses.replace(LoopConfig(train_steps=1, eval_period=1), **{field: 0})


@pytest.mark.parametrize("others", [[], [2]])
def test_processes_that_plan_other_rows_are_refused(monkeypatch, others):
    def allgather(digest):
        return np.stack([digest + np.uint32(process in others) for process in range(4)])

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    told = pytest.raises(UserError, match="process 2 plans other rows than process 0")
    with told if others else contextlib.nullcontext():
        check_same_plan("a plan")


def test_a_log_that_cannot_be_closed_keeps_no_save_from_its_end(tmp_path, monkeypatch):
    written, closed = StepLog.write, StepLog.close

    def write(self, step, *rest):
        if step == 5:
            raise UserError("cannot write steps.jsonl: the disk is full")
        written(self, step, *rest)

    def close(self):
        closed(self)
        raise UserError("cannot write steps.jsonl: it is full still")

    monkeypatch.setattr(StepLog, "write", write)
    monkeypatch.setattr(StepLog, "close", close)
    with pytest.raises(UserError, match="the disk is full"):
        toy_train(tmp_path, 9, log_period=1, checkpoint_period=4)
    assert [path.name for path in (tmp_path / "checkpoints").glob("4*")] == ["4"]
