"""What a source or a task holds, counted from its index alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from slm_jax.data.describe import describe_source, describe_table
from slm_jax.data.index import build_index
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import ManifestSource, ShardSource
from slm_jax.errors import UserError
from slm_jax.tasks.asr import register_asr


def in_order(function, jobs) -> None:
    for job in jobs:
        function(job)


def lines_of(rng: np.random.Generator, count: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for i in range(count):
        line: dict[str, object] = {"id": f"u{i}", "text": "word " * int(rng.integers(1, 9))}
        if rng.random() < 0.8:
            line |= {"audio": "none.wav", "duration": float(rng.integers(0, 30)) / 4}
        if rng.random() < 0.7:
            line["language"] = str(rng.choice(["en", "de", "cs"]))
        if rng.random() < 0.5:
            line["translations"] = {"de": "Übersetzung"[: int(rng.integers(0, 12))]}
        lines.append(line)
    return lines


def test_a_manifest_is_counted(write_manifest, rng: np.random.Generator, monkeypatch):
    lines = lines_of(rng, 200)
    path = write_manifest(list(lines))
    found = describe_source(ManifestSource({"train": path}), "train")
    kept = [line for line in lines if line.get("duration", 1)]
    spoken = [line for line in kept if "audio" in line]
    assert (found.name, found.split, found.examples) == (str(path), "train", len(kept))
    assert found.hours == pytest.approx(sum(float(str(line["duration"])) for line in spoken) / 3600)
    languages = Counter(str(line.get("language", "")) for line in kept)
    assert {code: examples for code, (examples, _) in found.languages.items()} == languages
    assert list(found.languages.values()) == sorted(found.languages.values(), key=lambda pair: -pair[0])
    assert sum(hours for _, hours in found.languages.values()) == pytest.approx(found.hours)
    assert found.lengths["speech"].count == len(spoken)
    texts = [str(line["text"]) for line in kept]
    assert found.lengths["text"].total == sum(map(len, texts))
    assert found.characters["text"] == Counter("".join(texts))
    translations: list[Any] = [line["translations"] for line in kept if "translations" in line]
    translated = [str(texts["de"]) for texts in translations if texts["de"]]
    assert found.lengths["translations.de"].count == len(translated)
    assert found.characters["translations.de"] == Counter("".join(translated))
    silent = [str(line["id"]) for line in lines if line not in kept]
    assert found.rejected == ({"non_positive_duration": len(silent)} if silent else {})
    assert found.rejected_ids.get("non_positive_duration", []) == silent
    assert json.loads(json.dumps(found.to_json()))["examples"] == len(kept)


def test_shards_know_what_was_left_out(write_manifest, tmp_path: Path):
    soundfile.write(tmp_path / "good.wav", np.ones(16_000, np.int16), 16_000)
    good = {"audio": "good.wav", "duration": 1.0, "text": "aab", "language": "en"}
    lines = [{"id": f"g{i}", **good} for i in range(9)]
    lines += [{"id": f"b{i}", "audio": "none.wav", "duration": 1.0, "text": "x"} for i in range(2)]
    manifests = {split: write_manifest(list(lines), f"{split}.jsonl") for split in ("train", "dev")}
    for split in manifests:
        prepare(ManifestSource(manifests), split, tmp_path / "to", in_order, max_bad_share=0.2)
    found = describe_source(ShardSource(tmp_path / "to"), "train")
    assert found.name == str(tmp_path / "to")
    assert (found.examples, found.hours) == (9, pytest.approx(9 / 3600))
    assert found.languages == {"en": (9, pytest.approx(9 / 3600))}
    assert (found.rejected, found.rejected_ids) == ({"missing_file": 2}, {"missing_file": ["b0", "b1"]})
    text = list(found.lines(examples_of_rejects=1))
    assert text[-1] == "\nrejected, missing_file 2: b0, ..."
    assert "\ntext: 2 characters, by frequency: ab" in text
    assert "\nspeech, seconds: shortest 1, median 1, 95 % up to 1, longest 1, in all 9" in text


@pytest.mark.parametrize("line", ['{"split": "tr', '{"split": "train"}', "[]", "null"])
def test_a_list_of_rejects_that_is_damaged(write_manifest, tmp_path: Path, line: str):
    source = ManifestSource({"train": write_manifest([{"id": "a", "text": "x"}])})
    prepare(source, "train", tmp_path / "to", in_order)
    (tmp_path / "to/rejects.jsonl").write_text(line)
    sentence = "rejects.jsonl, line 1 is damaged; remove the file and prepare its splits again"
    with pytest.raises(UserError, match=sentence):
        describe_source(ShardSource(tmp_path / "to"), "train")
    with pytest.raises(UserError, match=sentence):
        prepare(source, "train", tmp_path / "to", in_order)
    (tmp_path / "to/rejects.jsonl").unlink()
    prepare(source, "train", tmp_path / "to", in_order)
    assert describe_source(ShardSource(tmp_path / "to"), "train").examples == 1


def test_a_task_is_counted_from_its_index(
    write_manifest, vocabulary_path: Path, tmp_path: Path, rng: np.random.Generator
):
    lines = [line for line in lines_of(rng, 150) if "audio" in line]
    path = write_manifest(list(lines))
    task = register_asr(
        "described", manifests={"train": path}, vocabulary=vocabulary_path, languages=("en", "de")
    )
    limits = {"speech": 6 * 16_000, "inputs": 60, "targets": 60}
    table = build_index(task, "train", limits, tmp_path)
    found = describe_table(table)
    references = list(table.references())
    assert (found.name, found.split, found.examples) == ("described", "train", len(references))
    assert set(found.languages) == {"en", "de"}
    for code, (examples, hours) in found.languages.items():
        spoken = [reference.samples for reference in references if reference.language == code]
        assert (examples, hours) == (len(spoken), pytest.approx(sum(spoken) / 16_000 / 3600))
    assert found.lengths["targets"].total == sum(len(reference.targets) for reference in references)
    assert found.lengths["inputs"].longest == max(reference.input_tokens for reference in references)
    assert found.rejected == dict(sorted(table.report.rejected.items()))
    assert sum(found.rejected.values()) + found.examples == len(lines)
    for reason, ids in found.rejected_ids.items():
        assert len(ids) == found.rejected[reason]
