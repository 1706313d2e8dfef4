"""What a run tells of its time: phases, rates without what is no training, programs, traces."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from toy import EMBED, MLP, TOKENS, VOCAB, ToyObjective, ToySource, toy_train

from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.loop import LoopConfig, train
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig
from slm_jax.training.phases import Phases, process_age, start_line
from slm_jax.training.profiling import ProfileSteps
from slm_jax.training.throughput import Throughput


class Written:
    def __init__(self):
        self.scalars = {}

    def write_scalars(self, step, scalars):
        self.scalars.setdefault(step, {}).update(scalars)

    def flush(self):
        pass


def test_seconds_count_for_the_innermost_phase_and_add_up():
    began, phases = time.monotonic(), Phases(3.0)
    with phases.phase("outer"):
        time.sleep(0.02)
        with phases.phase("inner"):
            assert phases.current == "inner"
            time.sleep(0.05)
    time.sleep(0.01)
    with pytest.raises(ValueError), phases.phase("inner"):
        raise ValueError
    assert phases.current == "other"
    seconds = phases.seconds()
    assert sum(seconds.values()) == pytest.approx(3 + time.monotonic() - began, abs=0.01)
    assert 0.02 <= seconds["outer"] < 0.05 <= seconds["inner"] and 0.01 <= seconds["other"] < 0.05
    assert start_line({"a": 1.25, "b": 0.01, "c": 2.0}) == "first step done after 3.3 s: a 1.2, c 2.0"


def test_the_age_of_the_process_goes_with_the_clock():
    first, began = process_age(), time.monotonic()
    time.sleep(0.1)
    assert first > 0 and process_age() - first == pytest.approx(time.monotonic() - began, abs=0.03)


def test_rates_leave_out_what_is_no_training():
    throughput = Throughput(2, peak_flops=1e9)
    time.sleep(0.05)
    throughput.add({"target_tokens": 10.0}, 4e6, 5e6)
    with throughput.apart("checkpoint"):
        time.sleep(0.2)
    rates = throughput.read(1)
    assert 0.04 < rates["step_seconds"] < 0.15 and 0.2 <= rates["checkpoint_seconds"] < 0.4
    assert rates["mfu_percent"] == pytest.approx(100 * 4e6 / rates["step_seconds"] / 2 / 1e9)
    assert rates["hfu_percent"] == pytest.approx(rates["mfu_percent"] * 5 / 4)
    assert "checkpoint_seconds" not in throughput.read(1)


def test_an_evaluation_a_save_and_the_start_stand_apart(tmp_path, capfd):
    def evaluate(*_):
        time.sleep(0.5)
        return {"score": 1.0}

    writer = Written()
    toy_train(
        tmp_path, 8, writer=writer, evaluate=evaluate, eval_period=4, checkpoint_period=8, peak_flops=1e12
    )
    said = capfd.readouterr().err
    last = writer.scalars[8]
    assert last["train/evaluation_seconds"] >= 0.5 > 8 * last["train/step_seconds"]
    assert re.search(r"step 8/8  .*MFU \d+\.\d HFU \d+\.\d %.*apart: .*evaluation 0\.\d s", said)
    model = TOKENS * 16 * (4 * EMBED * MLP + 6 * MLP * VOCAB)
    assert last["train/mfu_percent"] == pytest.approx(100 * model / last["train/step_seconds"] / 1e12)
    start = writer.scalars[1]
    total = start.pop("start/total_seconds")
    assert total == pytest.approx(sum(v for k, v in start.items() if k.startswith("start/")))
    assert {"start/tracing_seconds", "start/compiling_seconds", "start/first_step_seconds"} <= set(start)


def test_programs_are_written_and_steps_are_traced(tmp_path, capfd, monkeypatch):
    plain = toy_train(tmp_path / "a", 6)
    dump = tmp_path / "dump"
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, slowly(getattr(jax.profiler, name)))
    writer = Written()
    profiled = {"profile_steps": ProfileSteps(3, 4), "log_period": 6, "checkpoint_period": 6}
    found = toy_train(tmp_path / "b", 6, dump_program=dump, writer=writer, **profiled)
    # Looking on changes no bit.
    jax.tree.map(lambda x, y: (x == y).all() or pytest.fail("other bits"), plain.state, found.state)
    assert "HloModule jit_train_step" in (dump / "train_step.hlo.txt").read_text()
    assert "module @jit_train_step" in (dump / "train_step.stablehlo.txt").read_text()
    assert "dot_general" in (dump / "train_step.jaxpr.txt").read_text()
    assert "temp_size_in_bytes" in (dump / "train_step.memory.txt").read_text()
    traces = list((tmp_path / "b" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and b"jit_train_step" in traces[0].read_bytes()
    said = capfd.readouterr().err
    assert f"trace written to {tmp_path / 'b' / 'profile'}" in said
    # Neither the start of a trace nor its end is training.
    rates = writer.scalars[6]
    assert rates["train/profile_seconds"] >= 1.0 > 6 * rates["train/step_seconds"]
    assert re.search(r"step 6/6  .*apart: .*profile \d\.\d", said)


def slowly(function):
    def slow(*args):
        time.sleep(0.5)
        return function(*args)

    return slow


class TwoLengths(ToySource):
    """Batches whose rows are cut to fewer tokens, every second one."""

    def batches(self, rows_consumed, anchor=None):
        for number, placed in enumerate(super().batches(rows_consumed, anchor)):
            if number % 2:
                cut = {k: v[:, :4] if v.ndim == 2 else v for k, v in placed.arrays.items()}
                placed = placed._replace(arrays=jax.device_put(cut, self._sharding))
            yield placed


def test_each_batch_shape_has_its_program_and_counts_by_it(tmp_path, capfd):
    mesh, writer, dump = make_mesh(devices=jax.devices()[:1]), Written(), tmp_path / "dump"
    train(
        ToyObjective(),
        TwoLengths(mesh),
        model_dir=tmp_path / "run",
        config=LoopConfig(train_steps=4, log_period=1, peak_flops=1e12),
        optimizer=AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=2)),
        mesh=mesh,
        writer=writer,
        dump_program=dump,
    )
    said = capfd.readouterr().err
    assert len(re.findall("^train step: traced and lowered in ", said, re.M)) == 2
    assert said.count("step 2: batch shape number 2; compiling") == 1
    for stem, tokens in (("train_step", TOKENS), ("train_step.2", 4)):
        assert f"i32[16,{tokens}]" in (dump / f"{stem}.jaxpr.txt").read_text()
        assert (dump / f"{stem}.hlo.txt").is_file()
    for step in range(1, 5):
        told = writer.scalars[step]
        model = (4 if step % 2 == 0 else TOKENS) * 16 * (4 * EMBED * MLP + 6 * MLP * VOCAB)
        assert told["train/mfu_percent"] == pytest.approx(100 * model / told["train/step_seconds"] / 1e12)
        assert told["train/batch_shapes"] == min(step, 2)
        assert ("train/compile_seconds" in told) == (step <= 2)


def test_a_trace_ends_with_a_run_that_fails(tmp_path):
    def fails(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            toy_train(tmp_path, 4, evaluate=fails, eval_period=2, profile_steps=ProfileSteps(1, 9))
    assert toy_train(tmp_path, 6, profile_steps=ProfileSteps(5, 5)).finished
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_second_start_takes_the_step_from_the_persistent_cache(tmp_path):
    program, said = Path(__file__).with_name("toy.py"), []
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    for name in ("a", "b"):
        words = [sys.executable, str(program), str(tmp_path / name), "1", "0", "0", "-1"]
        done = subprocess.run(words, env={**os.environ, **cache}, capture_output=True, text=True, check=True)
        said.append(
            re.findall(r"train step: .* compiled in (\S+) s( \(from the persistent cache\))?", done.stderr)
        )
    assert [len(found) for found in said] == [1, 1]
    assert [bool(found[0][1]) for found in said] == [False, True]


@pytest.mark.parametrize("text", ["", "5", "5:", "0:3", "6:5", "a:b", "-1:4", "1:2:3", "\uff11:\uff12"])
def test_steps_to_trace_are_two_numbers(text):
    with pytest.raises(UserError, match=r"--profile_steps is .*, expected .* such as 100:105"):
        ProfileSteps.parse(text)
    assert ProfileSteps.parse("100:105") == (100, 105)


def test_steps_to_trace_that_are_not_taken_are_told(tmp_path, capfd):
    with pytest.raises(UserError, match=r"--profile_steps is '7:9' and LoopConfig.train_steps 6, expected"):
        ProfileSteps(7, 9).check(6)
    ProfileSteps(6, 9).check(6)
    toy_train(tmp_path, 2)
    toy_train(tmp_path, 3, profile_steps=ProfileSteps(1, 2))
    assert "no trace: none of steps 1 to 2 was taken by this start" in capfd.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("peak", [0, -1.0, True, "989e12", float("nan"), float("inf")])
def test_a_peak_is_a_rate(peak):
    with pytest.raises(UserError, match="peak_flops is"):
        LoopConfig(train_steps=1, peak_flops=peak)
