"""Index tables: contents, rules, cache and errors."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import seqio

from slm_jax.data import host_tensorflow, index
from slm_jax.data.batch import BatchShape
from slm_jax.data.index import build_index
from slm_jax.data.index_table import _Shards
from slm_jax.data.plan import plan_mixture
from slm_jax.data.references import SPEECH, reference_of
from slm_jax.errors import BadExample, UserError
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.ast import register_ast
from slm_jax.tasks.registration import register_proportional_mixture, register_speech_task

LENGTHS = {"speech": 16_000, "inputs": 30, "targets": 12}
GOOD = {"audio": "a.wav", "duration": 0.5, "language": "en", "text": "book a table"}


def test_table_holds_what_the_pipeline_gives(write_corpus, vocabulary_path, tmp_path, vocabulary):
    path = write_corpus(40)
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)
    table = build_index("t", "train", LENGTHS | {"targets": 40}, tmp_path / "cache")
    examples = list(
        seqio.get_mixture_or_task("t").get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    )
    assert len(table) == len(examples) == 40
    for i, (example, found) in enumerate(zip(examples, table.references(), strict=True)):
        expected = reference_of(example, "t", str(path.parent))
        for name in ("id", "audio", "samples", "task", "language", "said"):
            assert getattr(found, name) == getattr(expected, name), name
        np.testing.assert_array_equal(found.inputs, expected.inputs)
        np.testing.assert_array_equal(found.targets, expected.targets)
        assert found.inputs.dtype == np.int32
        assert table.reference(i).id == found.id
        assert Path(str(found.audio)).exists()
    assert table.samples.tolist() == [int(example["samples"]) for example in examples]
    assert table.input_lengths.tolist() == [np.sum(example["inputs"] != SPEECH) for example in examples]
    assert table.target_lengths.tolist() == [len(example["targets"]) for example in examples]


BAD = {
    "unknown_language": {"language": "xx"},
    "missing_audio": {"audio": ""},
    "non_positive_duration": {"duration": 0},
    "speech_too_long": {"duration": 1.01},
    "inputs_too_long": {"topic": "hotel " * 40},
    "empty_target": {"text": " "},
    "targets_too_long": {"text": "station " * 13},
}


def test_rules_leave_out_and_count(write_manifest, vocabulary_path, tmp_path, caplog):
    lines = [
        {"id": f"{reason}-{i}", "topic": "", **GOOD, **bad} for reason, bad in BAD.items() for i in range(2)
    ]
    path = write_manifest([{"id": "good", "topic": "", **GOOD}, *lines])
    register_asr(
        "t",
        manifests={"train": path},
        vocabulary=vocabulary_path,
        languages=["en"],
        templates=["{topic} {speech}"],
    )
    with caplog.at_level("INFO", "slm_jax.data.index"):
        table = build_index("t", "train", LENGTHS, tmp_path / "cache")
    assert [reference.id for reference in table.references()] == ["good"]
    assert table.report.kept == 1
    assert table.report.rejected == dict.fromkeys(BAD, 2)
    assert table.report.examples == {reason: [f"{reason}-0", f"{reason}-1"] for reason in BAD}
    for reason in BAD:
        assert f"example {reason}-1 is rejected: {reason}" in caplog.text
    assert build_index("t", "train", LENGTHS, tmp_path / "cache").report == table.report
    # What evaluation asks of single examples is what the table asks of all at once.
    shape = BatchShape.from_feature_lengths(LENGTHS, rows=1, samples_per_position=160)
    for example in (
        seqio.get_mixture_or_task("t").get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    ):
        expected = example["id"].decode().split("-")[0]
        try:
            misfit = shape.misfit(reference := reference_of(example, "t"))
        except BadExample as bad:
            assert bad.reason == expected
        else:
            empty = "empty_target" if not len(reference.targets) else "good"
            assert (misfit.reason if misfit else empty) == expected


def test_layout_has_a_rule_of_its_own(write_manifest, vocabulary_path, tmp_path):
    path = write_manifest([{"id": "a", **GOOD}, {"id": "b", **GOOD, "duration": 0.9}])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path, templates=["{speech}"])
    # 0.5 s are 4 positions of 2,000 samples and EOS a fifth; 0.9 s are 8.
    table = build_index("t", "train", LENGTHS | {"layout": 5}, tmp_path, samples_per_position=2_000)
    assert table.report.rejected == {"layout_too_long": 1} and table.reference(0).id == "a"


def test_prompt_without_speech_is_text_alone(write_manifest, vocabulary_path, tmp_path):
    path = write_manifest([{"id": "a", **GOOD, "duration": 0}])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path, text_only=True)
    reference = build_index("t", "train", {"inputs": 60, "targets": 40}, tmp_path).reference(0)
    assert reference.audio is None and reference.samples == 0 and SPEECH not in reference.inputs


def test_cache_follows_contents(write_manifest, vocabulary_path, tmp_path, monkeypatch):
    builds = []
    build = index._build
    monkeypatch.setattr(index, "_build", lambda *args: builds.append(1) or build(*args))
    names = (f"t{i}" for i in itertools.count())

    def fingerprint(lines, lengths=LENGTHS, name="t", **options) -> str:
        path = write_manifest(lines, f"{next(names)}.jsonl")
        settings = {"manifests": {"train": path}, "vocabulary": vocabulary_path} | options
        register_asr(name, **settings)
        found = build_index(name, "train", lengths, tmp_path / "cache").fingerprint
        seqio.TaskRegistry.remove(name)
        return found

    lines = [{"id": str(i), **GOOD} for i in range(3)]
    first = fingerprint(lines)
    assert fingerprint(lines) == first and len(builds) == 1
    changes = [
        fingerprint([*lines, {"id": "x", **GOOD}]),
        fingerprint([lines[0], {**lines[1], "duration": 0.6}, lines[2]]),
        fingerprint(lines, templates=["book {speech}"]),
        fingerprint(lines, name="other"),
        fingerprint(lines, targets_eos=False),
    ]
    assert len({first, *changes}) == 6 and len(builds) == 6
    # Longer rows are another file, but the contents are the same where nothing was too long.
    assert fingerprint(lines, LENGTHS | {"targets": 13}) == first and len(builds) == 7


@pytest.fixture
def text_task(vocabulary_path):
    """Registers a task of lines of text from a source of SeqIO's own, and gives its ids."""

    def ids_of(source, cache) -> list[str]:
        def to_examples(dataset):
            return dataset.map(lambda line: {"id": line, "inputs": line, "targets": line})

        features = {
            name: seqio.Feature(seqio.SentencePieceVocabulary(str(vocabulary_path)))
            for name in ("inputs", "targets")
        }
        steps = [to_examples, seqio.preprocessors.tokenize]
        task = seqio.Task("lines", source, features, preprocessors=steps)
        table = build_index(task, "train", {"inputs": 60, "targets": 60}, cache)
        return [reference.id for reference in table.references()]

    return ids_of


def test_cache_follows_the_files_of_other_sources(text_task, tmp_path):
    file, cache = tmp_path / "lines.txt", tmp_path / "cache"
    for lines, tables in ((["book", "table"], 1), (["book", "table"], 1), (["book", "table", "two"], 2)):
        if not file.exists() or file.read_text().split() != lines:
            file.write_text("\n".join(lines))
        assert text_task(seqio.TextLineDataSource({"train": str(tmp_path / "*.txt")}), cache) == lines
        assert len(list(cache.iterdir())) == tables


def test_cache_follows_what_a_function_is_bound_to(text_task, tmp_path):
    lines, made = tmp_path / "lines.txt", []

    def source_of(words, told=True):
        def dataset(split, shuffle_files, seed=None):
            made.append(split)
            return host_tensorflow.tf.data.Dataset.from_tensor_slices(list(words))

        function = dataset if told else functools.partial(dataset, seed=lines)
        return seqio.FunctionDataSource(function, splits=["train"])

    for words, built in ((("book", "table"), 1), (("book", "table"), 0), (("two",), 1)):
        made.clear()
        assert text_task(source_of(words), tmp_path / "cache") == list(words)
        assert bool(made) == bool(built)
    # What cannot be told is read again every time, and leaves nothing.
    kept = sorted((tmp_path / "cache").iterdir())
    for words in (np.array(["call"]), np.array(["hotel"])):
        assert text_task(source_of(words), tmp_path / "cache") == words.tolist()
    assert text_task(source_of(("book",), told=False), tmp_path / "cache") == ["book"]
    assert sorted((tmp_path / "cache").iterdir()) == kept


def test_moved_corpus_keeps_its_index(write_manifest, vocabulary_path, tmp_path):
    lines = [{"id": "a", **GOOD}]
    here, there = tmp_path / "here", tmp_path / "there"
    found = []
    for folder in (here, there):
        folder.mkdir()
        path = write_manifest(lines).rename(folder / "m.jsonl")
        register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)
        table = build_index("t", "train", LENGTHS, tmp_path / "cache")
        assert table.reference(0).audio == str(folder / "a.wav")
        found.append(table.fingerprint)
        seqio.TaskRegistry.remove("t")
    assert found[0] == found[1] and len(list((tmp_path / "cache").iterdir())) == 1


def test_damaged_file_is_built_again(write_manifest, vocabulary_path, tmp_path, caplog):
    path = write_manifest([{"id": str(i), **GOOD} for i in range(5)])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)
    first = build_index("t", "train", LENGTHS, tmp_path / "cache").fingerprint
    (folder,) = (tmp_path / "cache").iterdir()
    for file in sorted(folder.iterdir()):
        contents = file.read_bytes()
        file.write_bytes(contents[:-9])
        assert build_index("t", "train", LENGTHS, tmp_path / "cache").fingerprint == first, file
        assert "is damaged" in caplog.text
        caplog.clear()
        file.unlink()
        assert build_index("t", "train", LENGTHS, tmp_path / "cache").fingerprint == first, file
        assert file.read_bytes() == contents
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_what_another_process_built_stays_where_it_is(write_manifest, vocabulary_path, tmp_path, monkeypatch):
    path = write_manifest([{"id": str(i), **GOOD} for i in range(5)])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)
    build_index("t", "train", LENGTHS, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    before = folder.stat().st_ino
    # A process that began before the index was there: to move it away would take it from those that open it.
    open_cached = index._open_cached
    answers = iter([lambda *args: None, open_cached])
    monkeypatch.setattr(index, "_open_cached", lambda *args: next(answers)(*args))
    build_index("t", "train", LENGTHS, tmp_path / "cache")
    assert folder.stat().st_ino == before and list((tmp_path / "cache").iterdir()) == [folder]


def test_two_that_build_at_once_do_not_disturb_each_other(
    write_manifest, vocabulary_path, tmp_path, monkeypatch
):
    path = write_manifest([{"id": str(i), **GOOD} for i in range(50)])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)
    fill, others = index._fill, []

    def fill_while_another_starts_and_ends(*args):
        if not others:
            others.append(None)
            others[0] = build_index("t", "train", LENGTHS, tmp_path / "cache")
        return fill(*args)

    monkeypatch.setattr(index, "_fill", fill_while_another_starts_and_ends)
    table = build_index("t", "train", LENGTHS, tmp_path / "cache")
    assert table.fingerprint == others[0].fingerprint
    # The one that was mapped first still reads what it did, though its file was replaced.
    assert [r.id for r in others[0].references()] == [r.id for r in table.references()]
    assert [folder.suffix for folder in (tmp_path / "cache").iterdir()] == [".index"]


def test_failed_build_leaves_nothing(write_manifest, vocabulary_path, tmp_path, monkeypatch):
    path = write_manifest([{"id": "a", **GOOD}])
    register_asr("t", manifests={"train": path}, vocabulary=vocabulary_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.TableWriter, "add", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        build_index("t", "train", LENGTHS, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            [{"id": "a", **GOOD, "duration": 9}],
            "yields nothing: 0 references; rejected: speech_too_long 1; TASK_FEATURE_LENGTHS['speech']",
        ),
        (
            [{"id": "b", **GOOD}, {"id": "a", **GOOD}, {"id": "b", **GOOD}],
            "id 'b' stands for two examples, references 1 and 3 of",
        ),
        (["{"], "line 1: not JSON"),
    ],
)
def test_manifests_that_give_no_index(write_manifest, vocabulary_path, tmp_path, lines, sentence: str):
    register_asr("t", manifests={"train": write_manifest(lines)}, vocabulary=vocabulary_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        build_index("t", "train", LENGTHS, tmp_path / "cache")


def test_names_that_are_not_there(write_manifest, vocabulary_path, tmp_path):
    path = write_manifest([{"id": "a", **GOOD}])
    register_asr("speech", manifests={"train": path}, vocabulary=vocabulary_path)
    register_asr("unread", manifests={"train": path}, vocabulary=tmp_path / "none.model")
    for name, split, sentence in (
        ("speach", "train", "unknown task 'speach'; did you mean 'speech'?"),
        ("speech", "tain", "task 'speech' has no split 'tain'; did you mean 'train'?"),
        ("unread", "train", "none.model cannot be read"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            build_index(name, split, LENGTHS, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"index folder .* cannot be written"):
        build_index("speech", "train", LENGTHS, tmp_path / "file")


def test_mixture_is_planned_from_its_tasks(write_corpus, vocabulary_path, tmp_path):
    manifests = {"train": write_corpus(12)}
    register_asr("asr", manifests=manifests, vocabulary=vocabulary_path)
    register_ast("ast", manifests=manifests, vocabulary=vocabulary_path, target_language="de")
    register_speech_task(
        "text",
        manifests=manifests,
        vocabulary=vocabulary_path,
        templates=["{speech}"],
        target="{text}",
        text_only=True,
        noise={"double": 0.3},
        repeats=2,
    )
    register_proportional_mixture("mix", ["asr", "ast", "text"])
    lengths = LENGTHS | {"inputs": 60, "targets": 40}
    shape = BatchShape.from_feature_lengths(lengths, rows=4, samples_per_position=640)
    plan = plan_mixture("mix", "train", lengths, shape, cache_dir=tmp_path / "cache", seed=1)
    assert [table.task for table in plan.tables] == ["asr", "ast", "text"]
    assert plan.rates == (12.0, 12.0, 12.0)
    rows = plan.rows(0, 60)
    found = {(placed.reference.task, placed.reference.id) for row in rows for placed in row}
    expected = {(task, f"u{i}") for task in ("asr", "ast") for i in range(12)}
    assert {pair for pair in found if pair[0] != "text"} == expected
    assert all(
        placed.reference.audio is None for row in rows for placed in row if placed.reference.task == "text"
    )
    with pytest.raises(UserError, match="unknown mixture or task 'mox'; did you mean 'mix'"):
        plan_mixture("mox", "train", lengths, shape, cache_dir=tmp_path, seed=1)


@pytest.mark.parametrize(
    ("paths", "starts"),
    [
        ("aaaabbbb", [0, 4, 8]),
        # Text alone between utterances of a file is no end of it.
        ("..aa.aa.b.bbb", [0, 8, 13]),
        ("abababab", []),
        ("........", []),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 20])
def test_stretches_of_one_file_are_found(paths, starts, step):
    found = _Shards()
    for start in range(0, len(paths), step):
        some = [None if path == "." else path for path in paths[start : start + step]]
        found.add(pa.array(some, pa.large_string()))
    assert found.starts(len(paths)) == starts
