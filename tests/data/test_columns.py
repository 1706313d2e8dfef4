"""Preprocessors on columns give what SeqIO's pipeline gives, value for value."""

import itertools
import json

import numpy as np
import pytest
import seqio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_jax.data import index, index_table
from slm_jax.data.columns import Pipeline
from slm_jax.data.index import build_index
from slm_jax.data.sources import ManifestSource
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.errors import UserError
from slm_jax.tasks.registration import register_speech_task

# JSON has no lone surrogates that UTF-8 could hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
references = st.lists(
    st.fixed_dictionaries(
        {"text": texts, "language": st.sampled_from(["en", "de", "xx", ""]), "topic": texts},
        optional={
            "audio": st.just("a.wav"),
            "duration": st.floats(0, 3),
            "translations": st.just({"de": "x"}),
        },
    ).map(lambda line: line | {"duration": line.get("duration", 1.0)}),
    min_size=1,
    max_size=20,
)
templates = st.lists(
    st.sampled_from(
        [
            "{speech}",
            "Say: {speech} ",
            "{topic} {speech} ({language_name})",
            "{topic}",
            "é{speech}{topic}",
        ]
    ),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(
    lines=references,
    templates=templates,
    text_only=st.booleans(),
    targets_eos=st.booleans(),
    repeats=st.integers(1, 3),
    in_bytes=st.booleans(),
    languages=st.sampled_from([None, ["en"], ["en", "de"]]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_columns_are_what_seqio_gives(
    lines, templates, text_only, targets_eos, repeats, in_bytes, languages, tmp_path, vocabulary_path
):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    vocabulary = ByteVocabulary() if in_bytes else vocabulary_path
    register_speech_task(
        "t",
        manifests={"train": path},
        vocabulary=vocabulary,
        templates=templates,
        target="{text}",
        text_only=text_only,
        transcript="<{text}>",
        targets_eos=targets_eos,
        repeats=repeats,
        languages=languages,
    )
    task = seqio.TaskRegistry.get("t")
    try:
        assert Pipeline.fits(task)
        pairs = [list(index._chunks(task, "train", 0)), list(index._by_seqio(task, "train", 0))]
    finally:
        seqio.TaskRegistry.remove("t")
    ours, theirs = map(joined, pairs)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values == theirs[name], name


def joined(chunks: list) -> dict[str, list]:
    """All chunks as one, the lists of numbers as lists."""
    found: dict[str, list] = {}
    for chunk in chunks:
        for name in ("id", "audio", "part", "language", "samples", "reject"):
            found.setdefault(name, []).extend(chunk[name].tolist())
        for name in ("inputs", "targets", "inputs_speech"):
            offsets, values = chunk[name].offsets.tolist(), chunk[name].values.tolist()
            found.setdefault(name, []).extend(values[i:j] for i, j in itertools.pairwise(offsets))
    return found


def test_both_ways_give_the_same_table(write_corpus, vocabulary_path, tmp_path, monkeypatch):
    lengths = {"speech": 8_000, "inputs": 40, "targets": 40}
    options = {"vocabulary": vocabulary_path, "templates": ["a {speech}", "{speech} b"], "target": "{text}"}
    register_speech_task("t", manifests={"train": write_corpus(60)}, **options)
    fast = build_index("t", "train", lengths, tmp_path / "fast")
    monkeypatch.setattr(Pipeline, "fits", lambda task: False)
    slow = build_index("t", "train", lengths, tmp_path / "slow")
    assert fast.fingerprint == slow.fingerprint and fast.report == slow.report
    assert fast.report.rejected and len(fast)
    np.testing.assert_array_equal(fast.lengths, slow.lengths)


def test_tables_do_not_depend_on_chunks(write_corpus, vocabulary_path, tmp_path, monkeypatch):
    path = write_corpus(50)
    options = {"vocabulary": vocabulary_path, "templates": ["{speech}"], "target": "{text}"}
    register_speech_task("t", manifests={"train": path}, **options)
    lengths = {"speech": 8_000, "inputs": 40, "targets": 40}
    whole = build_index("t", "train", lengths, tmp_path / "whole")
    columns = ManifestSource({"train": path}).columns("train")

    def in_sevens(self, split):
        for start in range(0, 50, 7):
            yield {name: values[start : start + 7] for name, values in columns.items()}

    monkeypatch.setattr(ManifestSource, "chunks", in_sevens)
    monkeypatch.setattr(index_table, "_ROWS", 8)
    parts = build_index("t", "train", lengths, tmp_path / "parts")
    assert parts.fingerprint == whole.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(index_table, "_ROWS", 8)
    at = np.random.default_rng(0).permutation(len(whole))[:20]
    for one, other in zip(parts.take(at), [whole_reference(whole, i) for i in at], strict=True):
        assert one.id == other.id and one.samples == other.samples
        np.testing.assert_array_equal(one.inputs, other.inputs)


def whole_reference(table, i):
    # The whole table is one batch: reading it in steps of 8 would look for others.
    return list(table._references(table._batch(0)))[i]


def test_tasks_with_other_steps_go_through_seqio(write_manifest, vocabulary_path, tmp_path):
    path = write_manifest([{"text": "book a table", "language": "en"}])
    register_speech_task(
        "t",
        manifests={"train": path},
        vocabulary=vocabulary_path,
        templates=["{speech}"],
        target="{text}",
        text_only=True,
        noise={"double": 1.0},
    )
    assert not Pipeline.fits(seqio.TaskRegistry.get("t"))
    table = build_index("t", "train", {"inputs": 60, "targets": 40}, tmp_path)
    # Every token of the transcript twice, and EOS.
    assert table.input_lengths.tolist() == [2 * (table.target_lengths[0] - 1) + 1]


@pytest.mark.parametrize("template", ["{topc} {speech}", "{speech}"])
def test_field_that_no_reference_has(write_manifest, vocabulary_path, tmp_path, template):
    path = write_manifest([{"text": "a", "topic": "b", "language": "en"}])
    target = "{text}" if "topc" in template else "{topc}"
    register_speech_task(
        "t", manifests={"train": path}, vocabulary=vocabulary_path, templates=[template], target=target
    )
    with pytest.raises(UserError, match=r"reads field 'topc'; did you mean 'topic'\?"):
        build_index("t", "train", {"inputs": 60, "targets": 40, "speech": 100}, tmp_path)
    assert not list(tmp_path.glob("*.index"))
