"""Rates of mixtures: what SeqIO makes of them, also nested, and one sentence for each mistake."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import seqio

from slm_jax.data.batch import BatchShape
from slm_jax.data.plan import plan_mixture
from slm_jax.errors import UserError
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.rates import PartRate
from slm_jax.tasks.registration import (
    register_hours_mixture,
    register_mixture,
    register_proportional_mixture,
    register_temperature_mixture,
)

SIZES = {"a": 40, "b": 7, "c": 13, "d": 3}
LENGTHS = {"speech": 160_000, "inputs": 60, "targets": 60}


@pytest.fixture
def hours(tmp_path, task_vocabulary, rng) -> dict[str, float]:
    """Registers tasks of those sizes; returns the hours of speech of each."""
    found = {}
    for name, count in SIZES.items():
        seconds = rng.integers(1, 10, count) / 2
        lines = [{"audio": "x.wav", "duration": float(length), "text": "the fox"} for length in seconds]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        register_asr(name, manifests={"train": path, "dev": path}, vocabulary=task_vocabulary)
        found[name] = float(seconds.sum()) / 3600
    return found


def rates(name: str) -> dict[str, float]:
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: mixture.get_rate(task) for task in mixture.tasks}


def test_proportional_to_examples_and_to_hours(hours):
    register_proportional_mixture("examples", ["a", "b"])
    assert rates("examples") == {"a": 40.0, "b": 7.0}
    register_hours_mixture("hours", ["a", "c"], split="dev")
    assert rates("hours") == pytest.approx({"a": hours["a"], "c": hours["c"]})


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 0.5])
@pytest.mark.parametrize("maximum", [None, 10, 1_000])
def test_temperature_is_that_of_t5(hours, temperature, maximum):
    register_temperature_mixture("mix", list(SIZES), temperature, maximum)
    expected = {
        name: seqio.mixing_rate_num_examples(
            seqio.TaskRegistry.get(name), maximum=maximum, temperature=temperature
        )
        for name in SIZES
    }
    assert rates("mix") == pytest.approx(expected)


def test_temperature_over_hours(hours):
    register_temperature_mixture("mix", ["a", "b"], 2.0, measure="hours")
    assert rates("mix") == pytest.approx({name: math.sqrt(hours[name]) for name in "ab"})


def test_a_mixture_within_a_mixture_shares_its_rate_as_seqio_has_it(hours):
    register_proportional_mixture("inner", ["a", "b"])
    register_mixture("deeper", {"inner": 1.0, "c": 3.0})
    register_mixture("outer", {"deeper": 2.0, "d": 1.0, "b": 0.5})
    # The same with SeqIO's own rates.
    seqio.MixtureRegistry.add("seqio_inner", [("a", 40), ("b", 7)])
    seqio.MixtureRegistry.add("seqio_deeper", [("seqio_inner", 1.0), ("c", 3.0)])
    seqio.MixtureRegistry.add("seqio_outer", [("seqio_deeper", 2.0), ("d", 1.0), ("b", 0.5)])
    assert rates("outer") == pytest.approx(rates("seqio_outer"))
    # b comes in by two ways.
    assert rates("outer") == pytest.approx({"a": 0.5 * 40 / 47, "b": 0.5 * 7 / 47 + 0.5, "c": 1.5, "d": 1.0})


def test_counted_rates_of_mixtures_are_those_of_their_tasks_together(hours):
    register_mixture("even", {"a": 1.0, "b": 1.0})
    for name, register, counts in (
        ("examples", register_proportional_mixture, {key: float(size) for key, size in SIZES.items()}),
        ("hours", register_hours_mixture, hours),
    ):
        register(name, ["even", "c"])
        together = counts["a"] + counts["b"]
        assert rates(name) == pytest.approx({"a": together / 2, "b": together / 2, "c": counts["c"]})
    register_temperature_mixture("flat", ["even", "c"], 2.0, maximum=30)
    half = math.sqrt(30) / 2
    assert rates("flat") == pytest.approx({"a": half, "b": half, "c": math.sqrt(13)})


def test_seqio_draws_from_a_nested_mixture_in_its_rates(hours):
    register_proportional_mixture("inner", ["a", "b"])
    register_mixture("outer", {"inner": 47.0, "c": 13.0})
    dataset = seqio.MixtureRegistry.get("outer").get_dataset(
        None, "train", seed=0, passthrough_features=["audio"]
    )
    # In proportion to their sizes, all are used up at about the same time.
    assert 30 < sum(1 for _ in dataset.take(2_000)) <= 2_000


def test_the_plan_has_every_task_once_in_its_rates(hours, tmp_path):
    register_proportional_mixture("inner", ["a", "b"])
    register_mixture("outer", {"inner": 2.0, "b": 1.0, "c": 1.0})
    shape = BatchShape.from_feature_lengths(LENGTHS, rows=4, samples_per_position=640)
    plan = plan_mixture("outer", "train", LENGTHS, shape, cache_dir=tmp_path / "index", seed=0)
    found = {table.task: rate for table, rate in zip(plan.tables, plan.rates, strict=True)}
    assert found == pytest.approx(rates("outer"))


Register = Callable[[], str]


@pytest.mark.parametrize(
    ("register", "told"),
    [
        (lambda: register_proportional_mixture("m", []), "mixture 'm' is empty, expected at least one task"),
        (lambda: register_mixture("m", {}), "mixture 'm' is empty"),
        (lambda: register_hours_mixture("m", ["aa"]), r"'m' names unknown task 'aa'; did you mean 'a'\?"),
        (
            lambda: register_mixture("m", {"inner_": 1.0}),
            r"names unknown task 'inner_'; did you mean 'inner'\?",
        ),
        (
            lambda: register_mixture("m", {"a": 0.0}),
            "mixture 'm': 'a' has rate 0.0, expected a positive number",
        ),
        (lambda: register_mixture("m", {"a": -1}), "'a' has rate -1, expected a positive number"),
        (lambda: register_mixture("m", {"a": float("nan")}), "'a' has rate nan, expected a positive number"),
        (lambda: register_mixture("m", {"a": "1"}), "'a' has rate '1', expected a positive number"),  # pyright: ignore
        (lambda: register_mixture("m", {"a": True}), "'a' has rate True, expected a positive number"),
        (lambda: register_mixture("m", {"inner": lambda part: 1.0}), "'inner' has rate <function"),
        (lambda: register_proportional_mixture("m", ["a", "b", "a"]), "mixture 'm' names 'a' twice"),
        (lambda: register_proportional_mixture("m", "ab"), "tasks is 'ab', expected a list of names"),
        (lambda: register_temperature_mixture("m", ["a"], 0), "'m': temperature is 0, expected a positive"),
        (lambda: register_temperature_mixture("m", ["a"], 2, -5), "'m': maximum is -5, expected a positive"),
        (
            lambda: register_temperature_mixture("m", ["a"], 2, measure="hour"),
            r"'m': measure is 'hour'; did you mean 'hours'\?",
        ),
    ],
)
def test_mistakes_when_a_mixture_is_registered(hours, register: Register, told: str):
    register_mixture("inner", {"a": 1.0})
    with pytest.raises(UserError, match=told):
        register()
    assert "m" not in seqio.MixtureRegistry.names()


def test_mistakes_when_rates_are_counted(hours, tmp_path, task_vocabulary):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fox"}')
    register_asr("silent", manifests={"train": path}, vocabulary=task_vocabulary, text_only=True)
    for name, register, told in (
        (
            "hours",
            lambda: register_hours_mixture("hours", ["silent"]),
            "'silent' has no hours in split 'train'",
        ),
        (
            "split",
            lambda: register_proportional_mixture("split", ["a"], split="tran"),
            r"task 'a' has no split 'tran'; did you mean 'train'\?",
        ),
    ):
        register()
        with pytest.raises(UserError, match=told):
            rates(name)


def test_rates_are_numbers_that_compare_by_what_they_count():
    one, same = (PartRate("m", "a", "hours", "train", 2.0) for _ in range(2))
    assert one == same != PartRate("m", "a", "examples", "train", 2.0)
    assert np.ndim(one.temperature) == 0 and not callable(one)
