"""Spikes: the recurrence beside NumPy's, what is left out, resuming across them, what is told."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import toy_train

from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.group_norms import group_norms
from slm_jax.training.loop import LoopConfig
from slm_jax.training.optimizers import AdamWConfig, make_optimizer
from slm_jax.training.progress import StepRecord
from slm_jax.training.spikes import SpikeConfig, spike_lines

WATCHED = {"spike_zscore": 6.0, "spike_warmup_steps": 8, "spike_decay": 0.9}


def oracle(losses, norms, config: SpikeConfig):
    """Which steps are spikes, in float64, and their z-scores."""
    seen, row, spikes, scores = [], 0, [], []
    for values in zip(losses, norms, strict=True):
        if not np.isfinite(values).all() or values[1] == 0:
            spikes.append(False)
            scores.append((0.0, 0.0))
            continue
        z = np.zeros(2)
        if len(seen) >= config.warmup_steps:
            # Mean and variance by the weights that the recurrence stands for, not by the recurrence.
            weights = np.ones(1)
            for number in range(2, len(seen) + 1):
                weight = max(1 - config.decay, 1 / number)
                weights = np.append(weights * (1 - weight), weight)
            mean = weights @ np.array(seen)
            deviation = np.sqrt(weights @ np.square(np.array(seen) - mean))
            z = (np.array(values) - mean) / deviation
        high = z.max() > config.zscore
        if high and row >= config.max_in_a_row:
            seen, row, high = [], 0, False
        elif high:
            row += 1
        else:
            row = 0
        if not high:
            seen.append(values)
        spikes.append(high)
        scores.append(tuple(z))
    return spikes, np.array(scores)


@pytest.mark.parametrize("skip", [False, True])
def test_the_recurrence_is_that_of_numpy(rng, skip):
    config = SpikeConfig(5.0, skip, warmup_steps=10, decay=0.95, max_in_a_row=3)
    steps = 160
    losses, norms = rng.normal(3, 0.2, steps), rng.gamma(20, 0.1, steps)
    losses[[40, 41, 70]] = 8, 9, np.nan
    norms[[50, 90, 91]] = 30, np.inf, 0.0
    losses[120:] += 20  # another regime
    optimizer = make_optimizer(AdamWConfig(clip_norm=None), spikes=config)
    params = {"w": jnp.ones(())}
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    state, total, scores, skipped = optimizer.init(params), [], [], []
    for loss, norm in zip(losses, norms, strict=True):
        grad = {"w": jnp.float32(norm)}
        if not np.isfinite(loss):
            grad = {"w": jnp.float32(np.nan)}
        updates, state = update(grad, state, params, loss=jnp.float32(loss))
        total.append(int(state.spikes_total))
        scores.append((float(state.loss_zscore), float(state.grad_norm_zscore)))
        skipped.append(int(state.spikes_skipped))
        if skip and np.diff([0, *total])[-1]:
            assert float(updates["w"]) == 0
    expected, expected_scores = oracle(losses, norms, config)
    assert list(np.diff([0, *total]).astype(bool)) == expected
    assert np.flatnonzero(expected[:120]).tolist() == [40, 41, 50]
    assert np.flatnonzero(expected)[3:].tolist() == [120, 121, 122]
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-3, atol=1e-3)
    assert skipped[-1] == (6 if skip else 0)
    # Adam has seen what was finite and not left out.
    counts = {int(count) for _, count in optax.tree.get_all_with_path(state, "count")}
    assert counts == {steps - 2 - skipped[-1]}


def equal(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def is_left_out_and_told(model_dir, capfd, **options):
    """Takes 40 steps and, after a restart, one that is a spike: it changes nothing but what counts spikes."""
    before = toy_train(model_dir, 40, **options).state
    after = toy_train(model_dir, 41, **options)
    said = capfd.readouterr().err
    found = re.findall(
        r"spike at step (\d+) \(left out\): loss \S+ \(z (\S+)\), gradient norm .* of (.*)", said
    )
    assert [step for step, *_ in found] == ["41"], said
    assert float(found[0][1]) > 6 and found[0][2].startswith("row-640, row-641, ")
    assert found[0][2].endswith("row-647 and 8 more, see steps.jsonl")
    equal(before.params, after.state.params)
    one, two = before.opt_state, after.state.opt_state
    for name in ("inner_state", "loss", "grad_norm", "steps_counted"):
        equal(getattr(one, name), getattr(two, name))
    assert after.metrics["spikes_skipped"] == after.metrics["spikes_total"] == 1
    # Its line names all of its examples.
    lines = [json.loads(line) for line in (model_dir / "steps.jsonl").read_text().splitlines()]
    assert len(lines[40]["ids"]) == 16 and set(lines[39]) == {"step", "loss"}
    assert f"{lines[40]['loss_zscore']:.1f}" == found[0][1]
    assert f"(z {lines[40]['grad_norm_zscore']:.1f})" in said


SKIPPING = {"spiked": (41,), "spike_skip": True, "log_ids": False, "checkpoint_period": 100, **WATCHED}


def test_a_spike_is_left_out_and_told_on_a_mesh(tmp_path, rng, capfd):
    is_left_out_and_told(tmp_path, capfd, seed=int(rng.integers(2**31)), mesh=make_mesh(2, 2, 2), **SKIPPING)


def test_resumes_across_a_spike_bit_for_bit_and_may_begin_to_watch_at_any_checkpoint(tmp_path, rng, capfd):
    options = {"seed": int(rng.integers(2**31)), **SKIPPING}
    whole = toy_train(tmp_path / "a", 44, **options)
    assert capfd.readouterr().err.count("spike at step 41 (left out)") == 1
    is_left_out_and_told(tmp_path / "b", capfd, **options)
    parts = toy_train(tmp_path / "b", 44, **options)
    equal(whole.state, parts.state)
    # The step that was left out moved no schedule.
    assert whole.metrics["learning_rate"] == parts.metrics["learning_rate"]
    assert (tmp_path / "a" / "steps.jsonl").read_text() == (tmp_path / "b" / "steps.jsonl").read_text()
    # Off and on again: the optimizer goes on, the statistics begin afresh.
    off = toy_train(tmp_path / "b", 44, seed=options["seed"])
    equal(whole.state.opt_state.inner_state, off.state.opt_state)
    unwatched = toy_train(tmp_path / "b", 46, seed=options["seed"])
    # One of 46 steps was left out. The warm-up is over, so the learning rate would not show it.
    assert int(unwatched.state.opt_state.inner_state[1][2].count) == 45
    on = toy_train(tmp_path / "b", 48, **options)
    assert int(on.state.opt_state.steps_counted) == 2 and int(on.state.step) == 48


def test_told_only_it_is_taken(tmp_path, rng, capfd):
    options = {"seed": int(rng.integers(2**31)), "spiked": (41,), "checkpoint_period": 100}
    plain = toy_train(tmp_path / "a", 42, **options)
    told = toy_train(tmp_path / "b", 42, **options, **WATCHED)
    assert "spike at step 41: loss" in capfd.readouterr().err
    assert (told.metrics["spikes_total"], told.metrics["spikes_skipped"]) == (1, 0)
    equal(plain.state.params, told.state.params)


def test_each_process_points_at_the_file_with_its_own_examples():
    metrics = {
        "loss": 9.0,
        "grad_norm": 2.0,
        "loss_zscore": 7.0,
        "grad_norm_zscore": 0.5,
        "spikes_in_a_row": 1,
    }
    record = StepRecord(5, metrics, {row: (f"row-{row}",) for row in range(9)}, {})
    (line,) = spike_lines([record, record._replace(metrics={"loss": 9.0})], SpikeConfig(6.0), "steps.3.jsonl")
    assert line.startswith("spike at step 5: loss 9.0000 (z 7.0), gradient norm 2 (z 0.5), of row-0, ")
    assert line.endswith("row-7 and 1 more, see steps.3.jsonl")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"spike_zscore": 0}, "spike_zscore is 0, expected a number above 0"),
        ({"spike_zscore": float("inf")}, "spike_zscore is inf, expected a number above 0"),
        ({"spike_skip": True}, "spike_skip is True and spike_zscore is None"),
        ({"spike_zscore": 6.0, "spike_warmup_steps": 1}, "spike_warmup_steps is 1, expected .* at least 2"),
        ({"spike_zscore": 6.0, "spike_decay": 1.0}, "spike_decay is 1.0, expected a number between 0 and 1"),
        ({"spike_zscore": 6.0, "max_spikes_in_a_row": 0}, "max_spikes_in_a_row is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, told):
    with pytest.raises(UserError, match=told):
        LoopConfig(train_steps=1, **fields)


def test_norms_are_of_the_first_level_that_has_parts(rng, tmp_path):
    trees = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in "abc"}
    whole = {"adapter": {"layers": {"x": trees["a"], "y": trees["b"]}, "out": trees["c"]}}
    found = group_norms("grad_norm", whole)
    assert sorted(found) == ["grad_norm/adapter/layers", "grad_norm/adapter/out"]
    both = np.concatenate([trees["a"], trees["b"]])
    np.testing.assert_allclose(found["grad_norm/adapter/layers"], np.linalg.norm(both), rtol=1e-6)
    assert sorted(group_norms("n", {**whole, "llm": trees})) == ["n/adapter", "n/llm"]
    assert sorted(group_norms("n", {"adapter": {"w": trees["a"]}})) == ["n/adapter/w"]
    metrics = toy_train(tmp_path, 2).metrics
    for norm in ("grad_norm", "update_norm", "param_norm"):
        parts = [metrics[f"{norm}/{name}"] for name in ("wi", "wo")]
        np.testing.assert_allclose(metrics[norm], np.linalg.norm(parts), rtol=1e-5)
