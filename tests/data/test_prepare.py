"""Any source becomes speech shards: what goes where, what is left out, and breaking off changes nothing."""

import errno
import functools
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from object_servers import without_other_storage

from slm_jax import object_stores, storage
from slm_jax.data import prepare as prepare_module
from slm_jax.data import shards
from slm_jax.data.audio_files import load_utterance
from slm_jax.data.index import build_index
from slm_jax.data.on_beam import run_on_beam
from slm_jax.data.prepare import ShardJob, prepare
from slm_jax.data.sources import ManifestSource, ParquetSource, ReferenceSource, ShardSource
from slm_jax.errors import RemoteError, UserError
from slm_jax.tasks.asr import register_asr


def in_order(function: Callable[[ShardJob], None], jobs: Sequence[ShardJob]) -> None:
    for job in jobs:
        function(job)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(write_corpus) -> ManifestSource:
    """60 utterances."""
    return ManifestSource({"train": write_corpus(60)})


@pytest.fixture
def broken(write_manifest, tmp_path: Path) -> ManifestSource:
    """Ten references, of which four cannot be used: three reasons."""
    soundfile.write(tmp_path / "good.wav", np.ones(1_600, np.int16), 16_000)
    (tmp_path / "junk.wav").write_bytes(b"junk")
    lines = [{"id": f"g{i}", "audio": "good.wav", "duration": 0.1, "text": "x"} for i in range(6)]
    lines.insert(1, {"id": "b0", "audio": "junk.wav", "duration": 1, "text": "x"})
    lines.insert(3, {"id": "b1", "audio": "none.wav", "duration": 1, "text": "x"})
    lines.insert(5, {"id": "b2", "audio": "none.wav", "duration": 1, "text": "x"})
    lines.append({"id": "b3", "audio": "good.wav", "duration": 0, "text": "x"})
    return ManifestSource({"train": write_manifest(list(lines))})


def test_what_is_trained_on_is_bit_for_bit_the_source(
    tmp_path: Path, rng: np.random.Generator, write_manifest, vocabulary_path: Path
):
    lines = []
    for i, (rate, channels, name) in enumerate(
        [
            (16_000, 1, "a.wav"),
            (44_100, 2, "b.flac"),
            (8_000, 1, "c.ogg"),
            (48_000, 1, "d.wav"),
            (16_000, 2, "e.wav"),
        ]
    ):
        wave = 1.2 * rng.uniform(-1, 1, (int(rate * rng.uniform(0.2, 0.9)), channels))
        subtype = "FLOAT" if name == "d.wav" else None
        soundfile.write(tmp_path / name, wave, rate, subtype=subtype)
        lines.append(
            {"id": f"u{i}", "audio": name, "duration": round(len(wave) / rate, 2), "text": "call a table",
             "language": "en", "translations": {"de": "Was it"}}
        )  # fmt: skip
    lines.append({"id": "words", "text": "call"})
    manifest = ManifestSource({"train": write_manifest(lines)})
    for codec in shards.CODECS:
        prepare(manifest, "train", tmp_path / codec, in_order, count=2, codec=codec)
    tables = []
    for name, source in (
        ("files", manifest), *((codec, ShardSource(tmp_path / codec)) for codec in shards.CODECS)
    ):  # fmt: skip
        task = register_asr(
            name, source=source, vocabulary=vocabulary_path, templates=("Transcribe: {speech}",)
        )
        lengths = {"speech": 16_000, "inputs": 40, "targets": 40}
        tables.append(list(build_index(task, "train", lengths, tmp_path / "cache").references()))
    for expected, *found in zip(*tables, strict=True):
        speech = load_utterance(expected).samples
        for reference in found:
            assert (reference.id, reference.language) == (expected.id, expected.language)
            np.testing.assert_array_equal(reference.inputs, expected.inputs)
            np.testing.assert_array_equal(reference.targets, expected.targets)
            np.testing.assert_array_equal(load_utterance(reference).samples, speech)
            assert reference.samples == len(speech)
    columns = ShardSource(tmp_path / "flac").columns("train")
    assert columns["translations.de"].tolist() == ["Was it"] * 5 + [""]
    assert columns["audio"][-1] == "" and columns["text"][-1] == "call"


def test_references_keep_their_order_in_equal_shares(source: ManifestSource, tmp_path: Path):
    entry = prepare(source, "train", tmp_path / "to", in_order, count=7)
    assert [shard.records for shard in entry.shards] == [8, 9, 8, 9, 8, 9, 9]
    assert ShardSource(tmp_path / "to").columns("train")["id"].tolist() == [f"u{i}" for i in range(60)]
    assert entry.samples == int(source.columns("train")["samples"].sum())


def test_shuffled_references_lie_by_their_ids(source: ManifestSource, tmp_path: Path):
    entry = prepare(source, "train", tmp_path / "to", in_order, count=4, shuffle=True)
    for number, shard in enumerate(entry.shards):
        ids = shards.read_index(str(tmp_path / "to"), shard.name).table["id"].to_pylist()
        digests = [hashlib.blake2b(f"u{i}".encode(), digest_size=8).digest() for i in range(60)]
        expected = [i for i in range(60) if int.from_bytes(digests[i], "little") % 4 == number]
        assert ids == [f"u{i}" for i in expected]


@pytest.mark.parametrize("shuffle", [False, True])
def test_lists_that_are_put_down_early_hold_the_same(source, tmp_path: Path, monkeypatch, shuffle: bool):
    prepare(source, "train", tmp_path / "whole", in_order, count=5, shuffle=shuffle)
    monkeypatch.setattr(prepare_module, "_HELD", 16)
    monkeypatch.setattr(prepare_module, "_ROWS", 3)
    monkeypatch.setattr(source, "chunks", functools.partial(_small_chunks, source.chunks))
    prepare(source, "train", tmp_path / "early", in_order, count=5, shuffle=shuffle)
    assert files_of(tmp_path / "early") == files_of(tmp_path / "whole")


def _small_chunks(chunks, split: str):
    for columns in chunks(split):
        for start in range(0, len(columns["id"]), 7):
            yield {name: values[start : start + 7] for name, values in columns.items()}


def test_the_number_of_shards_follows_the_hours(source: ManifestSource, tmp_path: Path, monkeypatch):
    assert len(prepare(source, "train", tmp_path / "a", in_order).shards) == 1
    seconds = source.columns("train")["samples"].sum() / 16_000
    monkeypatch.setattr(prepare_module, "_SHARD_SECONDS", int(seconds / 2.5))
    assert len(prepare(source, "train", tmp_path / "b", in_order).shards) == 3


def test_broken_off_anywhere_it_ends_the_same(
    source: ManifestSource, tmp_path: Path, rng: np.random.Generator, monkeypatch
):
    prepare(source, "train", tmp_path / "whole", in_order, count=6, shuffle=True)
    whole = files_of(tmp_path / "whole")
    left = 0

    def load(reference):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return load_utterance(reference)

    def in_any_order(function, jobs):
        for place in rng.permutation(len(jobs)):
            function(jobs[place])

    monkeypatch.setattr(prepare_module, "load_utterance", load)
    run = functools.partial(prepare, source, "train", tmp_path / "to", in_any_order, count=6, shuffle=True)
    for _ in range(100):
        left = int(rng.integers(0, 30))
        try:
            run()
            break
        except KeyboardInterrupt:
            there = files_of_shards(tmp_path / "to")
            assert there.items() <= whole.items()
            assert not (tmp_path / "to/shards.json").exists()
    assert files_of(tmp_path / "to") == whole
    left = 0
    run()
    assert files_of(tmp_path / "to") == whole


def files_of_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


KILLED = """
import os, random, signal, sys, threading
from slm_jax.data import prepare as module
from slm_jax.data.sources import ManifestSource

write, seconds = module.write_shard, float(sys.argv[3])

def in_order(function, jobs):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for job in jobs:
        function(job)
    threading.Event().wait()

module.prepare(ManifestSource({"train": sys.argv[1]}), "train", sys.argv[2], in_order, count=20)
"""


def test_killed_and_gone_on_it_ends_the_same(write_corpus, tmp_path: Path, rng: np.random.Generator):
    manifest = write_corpus(300)
    seconds = rng.uniform(0.01, 0.3)
    words = [sys.executable, "-c", KILLED, str(manifest), str(tmp_path / "to"), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name: path.read_bytes() for path in (tmp_path / "to").glob("train-*")}
    source = ManifestSource({"train": manifest})
    lines: list[str] = []
    prepare(source, "train", tmp_path / "to", in_order, count=20, report=lines.append)
    prepare(source, "train", tmp_path / "whole", in_order, count=20)
    whole = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "to") == whole
    assert left.items() <= whole.items()
    finished = sum(name.endswith(".parquet") for name in left)
    assert lines[0].endswith(f"{20 - finished} of 20 shards of split train are to be written")


def test_beam_in_this_process_and_in_two_others_writes_the_same(source: ManifestSource, tmp_path: Path):
    prepare(source, "train", tmp_path / "plain", in_order, count=5)
    for workers in (1, 2):
        run = functools.partial(run_on_beam, workers=workers)
        prepare(source, "train", tmp_path / f"beam{workers}", run, count=5)
        assert files_of(tmp_path / f"beam{workers}") == files_of(tmp_path / "plain")


def test_splits_share_a_directory_whichever_came_first(source: ManifestSource, broken, tmp_path: Path):
    both = ManifestSource({"dev": broken.manifest("train"), "train": source.manifest("train")})
    # The fixtures wrote the same file, one after the other: what counts is that there are two splits.
    for name, order in (("a", ["train", "dev"]), ("b", ["dev", "train"])):
        for split in order:
            prepare(both, split, tmp_path / name, in_order, count=2, max_bad_share=0.5)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    found = ShardSource(tmp_path / "a")
    assert set(found.splits) == {"train", "dev"}
    assert found.num_input_examples("dev") == 6


def test_a_bucket_holds_what_a_folder_holds(source: ManifestSource, tmp_path: Path):
    prepare(source, "train", tmp_path / "local", in_order, count=3)
    bucket = f"ram://{tmp_path.name}/{os.getpid()}"
    entry = prepare(source, "train", bucket, in_order, count=3)
    assert entry == shards.read_description(str(tmp_path / "local"))["train"]
    for name, content in files_of(tmp_path / "local").items():
        assert shards.storage.read(f"{bucket}/{name}") == content
    assert prepare(ShardSource(bucket), "train", tmp_path / "again", in_order, count=3).records == 60


def test_shards_are_a_source_of_shards(source: ManifestSource, tmp_path: Path):
    prepare(source, "train", tmp_path / "flac", in_order, count=3)
    prepare(ShardSource(tmp_path / "flac"), "train", tmp_path / "pcm", in_order, count=4, codec="pcm16")
    prepare(ShardSource(tmp_path / "pcm"), "train", tmp_path / "back", in_order, count=3)
    for end in ("array_record", "parquet"):
        for path in (tmp_path / "flac").glob(f"*.{end}"):
            found = (tmp_path / "back" / path.name).read_bytes()
            # The indices say from what they were made.
            assert end == "parquet" or found == path.read_bytes()


# ---- what is left out


def test_what_is_left_out_is_counted_and_listed(broken: ManifestSource, tmp_path: Path):
    run = functools.partial(prepare, broken, "train", tmp_path / "to", in_order, count=3)
    with pytest.raises(UserError, match="4 of 10 references are rejected") as error:
        run()
    assert str(error.value) == (
        "4 of 10 references are rejected (missing_file 2, non_positive_duration 1, unreadable_audio 1), more "
        f"than --max_bad_share 0.05; they are listed in {tmp_path}/to/rejects.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "to/rejects.jsonl").read_text().splitlines()]
    assert [(line["split"], line["id"], line["reason"]) for line in lines] == [
        ("train", "b0", "unreadable_audio"),
        ("train", "b1", "missing_file"),
        ("train", "b2", "missing_file"),
        ("train", "b3", "non_positive_duration"),
    ]
    assert "none.wav does not exist" in lines[1]["detail"]
    with pytest.raises(UserError, match="they are unfinished"):
        ShardSource(tmp_path / "to")
    written: list[ShardJob] = []
    entry = prepare(
        broken,
        "train",
        tmp_path / "to",
        lambda function, jobs: written.extend(jobs),
        count=3,
        max_bad_share=0.4,
    )
    assert not written and entry.records == 6
    assert entry.rejected == {"missing_file": 2, "non_positive_duration": 1, "unreadable_audio": 1}
    assert shards.read_description(str(tmp_path / "to"))["train"] == entry
    assert ShardSource(tmp_path / "to").columns("train")["id"].tolist() == [f"g{i}" for i in range(6)]


def test_junk_inside_a_container_leaves_the_same_bytes_again(tmp_path: Path):
    good = shards.encode_speech(np.ones(1_600, np.int16), "pcm16")
    rows = [{"bytes": data, "path": ""} for data in (good, b"junk", b"RIFF" + bytes(60))]
    table = pa.table({"audio": rows, "text": ["a", "b", "c"], "duration": [0.1] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource({"train": tmp_path / "a.parquet"})
    for to in ("one", "two"):
        # What is opened lies at another address each time.
        kept = [io.BytesIO(bytes(size)) for size in range(50)]
        prepare(source, "train", tmp_path / to, in_order, count=1, max_bad_share=1)
        assert kept
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    rejects = (tmp_path / "one" / "rejects.jsonl").read_text()
    assert rejects.count("a.parquet") == 2 and "object at" not in rejects


def test_where_all_is_left_out_there_are_no_shards(write_manifest, tmp_path: Path):
    source = ManifestSource({"train": write_manifest([{"audio": "none.wav", "duration": 1, "text": "x"}])})
    with pytest.raises(UserError, match=r"1 of 1 references are rejected \(missing_file 1\)"):
        prepare(source, "train", tmp_path / "to", in_order, max_bad_share=1.0)


# ---- mistakes


class Listed(ReferenceSource):
    """References of these ids, text alone, in two chunks."""

    def __init__(self, ids: list[str]):
        self.ids = ids
        super().__init__(("train",))

    def chunks(self, split):
        for ids in (self.ids[:2], self.ids[2:]):
            if ids:
                empty = np.full(len(ids), "", object)
                numbers = {"samples": np.zeros(len(ids), np.int32)}
                yield {"id": np.array(ids, object), "audio": empty, "text": empty, **numbers}

    def content_fingerprint(self, split):
        return str(self.ids)

    def definition(self):
        return self.ids


def test_an_id_that_stands_twice(tmp_path: Path):
    with pytest.raises(UserError, match="id 'b' stands for two references, numbers 2 and 4 of split"):
        prepare(Listed(["a", "b", "c", "b"]), "train", tmp_path / "to", in_order)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("then", [["a", "b", "c"], ["a"], ["a", "c"]])
def test_a_source_that_changes_while_it_is_read(write_manifest, tmp_path: Path, monkeypatch, then: list[str]):
    def write(ids: list[str]) -> Path:
        return write_manifest([{"id": id_, "text": "x"} for id_ in ids])

    source = ManifestSource({"train": write(["a", "b"])})
    share_out = prepare_module._share_out

    def late(*arguments: Any) -> Any:
        write(then)
        return share_out(*arguments)

    monkeypatch.setattr(prepare_module, "_share_out", late)
    with pytest.raises(
        UserError, match=rf"changed while it was read \(2 references at first, {len(then)} then"
    ):
        prepare(source, "train", tmp_path / "to", in_order, count=2)
    monkeypatch.undo()
    entry = prepare(source, "train", tmp_path / "to", in_order, count=1)
    assert entry.records == len(then)


def test_a_source_of_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="split 'train' of Listed/train has no references"):
        prepare(Listed([]), "train", tmp_path / "to", in_order)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"codec": "flack"}, r"--format is 'flack'; did you mean 'flac'\?"),
        ({"count": 5}, "--shards is 5, and there are 4 references to share out"),
        ({"count": 0}, "--shards is 0, expected a whole number of at least 1"),
        ({"max_bad_share": 5.0}, "--max_bad_share is 5.0, expected a share from 0 to 1"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options, sentence: str):
    with pytest.raises(UserError, match=sentence):
        prepare(Listed(list("abcd")), "train", tmp_path / "to", in_order, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"runner": "FlinkRuner"}, r"--runner is 'FlinkRuner'; did you mean 'FlinkRunner'\?"),
        ({"workers": 0}, "--workers is 0, expected a whole number"),
        (
            {"runner": "SparkRunner", "workers": 2},
            "--workers is of DirectRunner; give SparkRunner its options",
        ),
        ({"options": {"projekt": "x"}}, r"--beam projekt: Beam has no such option; did you mean 'project'\?"),
        ({"options": {"qqqqq": "x"}}, r"--beam qqqqq: Beam has no such option$"),
        (
            {"options": {"direct_num_workers": "many"}},
            "--beam: argument --direct_num_workers: invalid int value: 'many'$",
        ),
        ({"runner": "DataflowRunner"}, "--runner DataflowRunner: the pipeline failed: .*Missing.*project"),
    ],
)
def test_runners_and_options_that_beam_lacks(options, sentence: str):
    with pytest.raises(UserError, match=sentence):
        run_on_beam(print, ["never"], **options)


def test_beam_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"Apache Beam is not installed: pip install 'slm_jax\[beam\]'"):
        run_on_beam(print, ["never"])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_is_told_in_one_sentence(workers: int, tmp_path: Path):
    # A function that the processes of the workers find by its name.
    jobs = [str(tmp_path / name / "lost") for name in "ab"]
    with pytest.raises(UserError, match=r"pipeline failed: .*No such file or directory: '.*/lost'") as error:
        run_on_beam(os.stat, jobs, workers=workers)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_is_told_once(workers: int, tmp_path: Path, capfd, caplog):
    with pytest.raises(UserError, match="pipeline failed: FileNotFoundError: "):
        run_on_beam(os.stat, [str(tmp_path / name) for name in "ab"], workers=workers)
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.name.startswith("apache_beam")]
    assert logging.getLogger("apache_beam").level == logging.NOTSET


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_finds_wrong_is_its_own_sentence(workers: int, tmp_path: Path):
    jobs = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match=r"^the directory of shards .*/[ab] does not exist$"):
        run_on_beam(shards.read_description, jobs, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_whose_storage_is_away_is_nobodys_mistake(workers: int, monkeypatch):
    settings = {"ENDPOINT_URL": "http://127.0.0.1:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name in os.environ.keys() - without_other_storage().keys():
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "0.1")
    object_stores.store.cache_clear()
    try:
        with pytest.raises(RemoteError, match=r"^cannot read s3://bucket/[ab] in 1 attempt: [^\n\[]*$"):
            run_on_beam(storage.read, [f"s3://bucket/{name}" for name in "ab"], workers=workers)
    finally:
        object_stores.store.cache_clear()


def test_a_split_whose_name_is_none_of_files(tmp_path: Path):
    with pytest.raises(
        UserError, match="split 'a/b' is to name files of shards, expected a name without '/'"
    ):
        prepare(Listed(["a"]), "a/b", tmp_path / "to", in_order)
    assert not (tmp_path / "to").exists()


def test_a_directory_of_something_else(tmp_path: Path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/thesis.tex.partial").write_text("x")
    with pytest.raises(UserError, match=r"--to .*/to holds 'thesis.tex.partial', expected an empty"):
        prepare(Listed(["a"]), "train", tmp_path / "to", in_order)
    assert (tmp_path / "to/thesis.tex.partial").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--to .*/file cannot be made: File exists"):
        prepare(Listed(["a"]), "train", tmp_path / "file", in_order)


@pytest.mark.parametrize("function", ["make_folder", "list_folder"])
def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch, function: str):
    real = getattr(prepare_module.storage, function)

    def refuse(path: str) -> Any:
        if path.endswith("to") and function == "make_folder":
            return real(path)
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(prepare_module.storage, function, refuse)
    with pytest.raises(UserError, match=r"--to .*/to cannot be written: Permission denied$"):
        prepare(Listed(["a"]), "train", tmp_path / "to", in_order)


def test_a_directory_made_from_something_else(source: ManifestSource, write_manifest, tmp_path: Path):
    def only_first(function, jobs):
        function(jobs[0])

    def run(run_jobs, **options: Any):
        return prepare(source, "train", tmp_path / "to", run_jobs, **options)

    with pytest.raises(UserError, match="shard train-00001-of-00003 was not written; run the command again"):
        run(only_first, count=3)
    for finished in (False, True):
        if finished:
            run(in_order, count=3)
        for options, said in (
            ({"count": 4}, "with shards 3, and 4 is asked for"),
            ({"count": 3, "codec": "pcm16"}, "with format flac, and pcm16 is asked for"),
            ({"count": 3, "shuffle": True}, "with shuffle False, and True is asked for"),
        ):
            with pytest.raises(UserError, match=f"split 'train' was made {said}; name another directory"):
                run(in_order, **options)
    lines = Path(source.manifest("train")).read_text().splitlines()
    write_manifest([*lines[:-1], lines[-1].replace('"en"', '"de"')])
    changed = ManifestSource({"train": source.manifest("train")})
    with pytest.raises(UserError, match="was made from another source, or before this one was changed"):
        prepare(changed, "train", tmp_path / "to", in_order, count=3)


def test_a_shard_that_is_lost_is_written_again(source: ManifestSource, tmp_path: Path):
    run = functools.partial(prepare, source, "train", tmp_path / "to", in_order, count=4)
    run()
    whole = files_of(tmp_path / "to")
    (tmp_path / "to/train-00001-of-00004.array_record").unlink()
    (tmp_path / "to/train-00002-of-00004.parquet").unlink()
    cut = tmp_path / "to/train-00003-of-00004.array_record"
    cut.write_bytes(cut.read_bytes()[:1000])
    run()
    assert files_of(tmp_path / "to") == whole
    # As of a command that was killed after the last shard.
    (tmp_path / "to/.prepare-train").mkdir()
    (tmp_path / "to/.prepare-train/00000-00000.arrow").write_bytes(b"")
    (tmp_path / f"to/.train-00001-of-00004.parquet.{'0' * 32}.partial").write_bytes(b"")
    run()
    assert files_of(tmp_path / "to") == whole


def test_two_commands_at_once(source: ManifestSource, tmp_path: Path):
    def second(function, jobs):
        with pytest.raises(UserError, match="another command is writing there"):
            prepare(source, "train", tmp_path / "to", in_order)
        in_order(function, jobs)

    prepare(source, "train", tmp_path / "to", second)
    assert ShardSource(tmp_path / "to").num_input_examples("train") == 60
