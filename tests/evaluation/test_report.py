"""Tables, transcripts and summary.json as a person and a program read them."""

import io
import json
import math

import pytest
from rich.console import Console

from slm_jax.errors import UserError
from slm_jax.evaluation import report
from slm_jax.evaluation.evaluator import Hypothesis, TaskResult

BEFORE = {"asr_en": {"wer": 101.25, "cer": 97.0}, "qa": {"exact_match": 0.0}}
AFTER = {"asr_en": {"wer": 4.04, "cer": 1.5}, "qa": {"exact_match": 88.0}, "ast_de": {"bleu": 31.26}}


def results(sizes: dict[str, int]) -> dict[str, TaskResult]:
    return {
        task: TaskResult(
            {},
            {},
            tuple(Hypothesis(f"{task}-{n}", f"said {n}", f"[got] {n}", None, "Write:") for n in range(size)),
        )
        for task, size in sizes.items()
    }


def printed(draw) -> str:
    stream = io.StringIO()
    draw(Console(file=stream, width=100, color_system=None))
    return stream.getvalue()


def test_the_summary_has_the_published_format(tmp_path):
    report.write_summary(
        tmp_path / "summary.json", {"before": BEFORE, "after": AFTER}, {"corpus": 1.23456, "train": 60}
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "tasks": {
            "asr_en": {"wer": {"before": 101.25, "after": 4.04}, "cer": {"before": 97.0, "after": 1.5}},
            "qa": {"exact_match": {"before": 0.0, "after": 88.0}},
            "ast_de": {"bleu": {"before": None, "after": 31.26}},
        },
        "seconds": {"corpus": 1.235, "train": 60},
    }


def test_what_was_not_finite_is_null_and_not_invalid_json(tmp_path):
    columns = {"before": {"a": {"wer": math.nan}}, "after": {"a": {"wer": math.inf}}}
    report.write_summary(tmp_path / "s.json", columns, {})
    assert json.loads((tmp_path / "s.json").read_text())["tasks"] == {
        "a": {"wer": {"before": None, "after": None}}
    }


def test_a_summary_that_cannot_be_written_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"missing.summary\.json: cannot write the summary"):
        report.write_summary(tmp_path / "missing" / "summary.json", {}, {})


def test_the_table_lists_every_task_and_metric_once():
    text = printed(lambda console: console.print(report.table({"before": BEFORE, "after": AFTER})))
    rows = [line.replace("\u2502", " ").split() for line in text.splitlines()]
    assert ["asr_en", "wer", "101.2", "4.0"] in rows or ["asr_en", "wer", "101.3", "4.0"] in rows
    assert ["cer", "97.0", "1.5"] in rows
    assert ["ast_de", "bleu", "-", "31.3"] in rows


def test_a_column_may_know_other_tasks_than_the_others():
    columns = {"before": BEFORE, "after": AFTER, "topline": {"qa": {"exact_match": 99.0}}}
    text = printed(lambda console: console.print(report.table(columns)))
    rows = [line.replace("\u2502", " ").split() for line in text.splitlines()]
    assert ["qa", "exact_match", "0.0", "88.0", "99.0"] in rows
    assert ["ast_de", "bleu", "-", "31.3", "-"] in rows
    assert report.summary(columns, {})["tasks"]["ast_de"]["bleu"]["topline"] is None


def test_samples_name_their_audio():
    line = Hypothesis("x", "said", "got", "some/where.flac", "Write:")
    text = printed(lambda c: c.print(*report.sample_lines({"a": TaskResult({}, {}, (line,))})))
    assert "audio     some/where.flac" in text


def test_samples_are_drawn_evenly_without_repeats_and_markup_is_text():
    text = printed(
        lambda console: report.print_report(
            {"before": BEFORE, "after": AFTER}, results({"a": 9, "b": 1, "c": 9}), console
        )
    )
    heads = [line.split() for line in text.splitlines() if line[:1] in ("a", "b", "c") and "-" in line]
    assert len(heads) == 5 and len({name for _, name in heads}) == 5
    assert {task for task, _ in heads} == {"a", "b", "c"}
    assert text.count("[got]") == 5
    assert printed(lambda c: c.print(*report.sample_lines(results({"a": 2})))).count("expected") == 2


def test_a_rejected_example_says_so():
    line = Hypothesis("x", "said", "", "x.wav", "Write:", "unreadable_audio", "noise")
    text = printed(lambda c: c.print(*report.sample_lines({"a": TaskResult({}, {}, (line,))})))
    assert "(rejected: unreadable_audio)" in text
