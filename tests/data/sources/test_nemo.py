"""NeMo manifests, with audio in files and in tar archives as its own script writes them."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from slm_jax.data.sources import NemoSource, nemo
from slm_jax.data.sources.tar_index import tar_members
from slm_jax.errors import UserError


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def entry_of(clip: Any, **more: Any) -> dict[str, Any]:
    entry = {"audio_filepath": f"clips/{clip.path.name}", "duration": clip.seconds, "text": clip.text}
    return entry | more


def test_files_beside_a_manifest(tmp_path: Path, clips, check_audio):
    entries = [entry_of(clip, lang="en", pnc=True, speaker=7, note=None) for clip in clips]
    entries[0]["audio_filepath"] = str(clips[0].path)
    source = NemoSource({"train": write(tmp_path / "m.json", entries)})
    check_audio(source, {str(i): clip.samples for i, clip in enumerate(clips, 1)})
    columns = source.columns("train")
    assert columns["text"].tolist() == [clip.text for clip in clips]
    assert set(columns["language"]) == {"en"}
    assert (columns["pnc"][0], columns["speaker"][0], columns["note"][0]) == ("true", "7", "")


def test_fields_of_canary(tmp_path: Path):
    entries = [
        {"audio_filepath": "a.wav", "duration": 1, "source_lang": "en", "target_lang": "de", "answer": "ja"},
        {"audio_filepath": "b.wav", "duration": 2, "source_lang": "en", "target_lang": "en", "text": "no"},
        {"audio_filepath": "c.wav", "duration": 2, "source_lang": "en", "target_lang": "fr", "text": "non"},
    ]
    columns = NemoSource({"train": write(tmp_path / "m.json", entries)}).columns("train")
    assert columns["language"].tolist() == ["en"] * 3
    assert columns["translations.de"].tolist() == ["ja", "", ""]
    assert columns["translations.fr"].tolist() == ["", "", "non"]
    assert columns["answer"].tolist() == ["ja", "", ""]
    assert "translations.en" not in columns


def test_offsets_are_stretches(tmp_path: Path, rng: np.random.Generator, load_all):
    wave = rng.integers(-9_000, 9_000, 32_000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    common = {"audio_filepath": "a.wav", "text": "x"}
    entries = [common | {"offset": 0.25, "duration": 0.5}, common | {"offset": 0, "duration": 1.0}]
    loaded = load_all(NemoSource({"train": write(tmp_path / "m.json", entries)}))
    np.testing.assert_array_equal(loaded["1"][1], wave[4_000:12_000])
    np.testing.assert_array_equal(loaded["2"][1], wave[:16_000])


def tarred(folder: Path, clips: list[Any], shards: int) -> dict[str, np.ndarray]:
    """Writes clips as NeMo's convert_to_tarred_audio_dataset does; returns samples by id, shard by shard."""
    folder.mkdir()
    everything, expected = [], {}
    for shard in range(shards):
        entries = []
        with tarfile.open(folder / f"audio_{shard}.tar", "w") as archive:
            for clip in clips[shard::shards]:
                name = str(clip.path.with_suffix("")).replace("/", "_").replace(".", "_") + clip.path.suffix
                archive.add(clip.path, name)
                entries.append(entry_of(clip, audio_filepath=name, shard_id=shard))
                expected[f"manifest_{shard}-{len(entries)}"] = clip.samples
            if clip.path.suffix == ".flac":
                again = name.replace(".flac", "-sub1.flac")
                entries.append(
                    entry_of(clip, audio_filepath=again, shard_id=shard, offset=0.1, duration=0.15)
                )
        write(folder / "sharded_manifests" / f"manifest_{shard}.json", entries)
        everything += entries
    write(folder / "tarred_audio_manifest.json", everything)
    return expected


def test_a_tarred_dataset(tmp_path: Path, clips, check_audio, load_all):
    expected = tarred(tmp_path / "tarred", clips, 3)
    tars = {"train": tmp_path / "tarred" / "audio__OP_0..2_CL_.tar"}
    manifests = tmp_path / "tarred" / "sharded_manifests" / "manifest_{0..2}.json"
    check_audio(NemoSource({"train": manifests}, tars=tars), expected)
    whole = NemoSource({"train": tmp_path / "tarred" / "tarred_audio_manifest.json"}, tars=tars)
    loaded = load_all(whole)
    for (_, found), samples in zip(loaded.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(found, samples[: len(found)])


def test_an_archive_is_passed_over_once(tmp_path: Path, clips, rng, monkeypatch, caplog):
    tarred(tmp_path / "tarred", clips, 5)
    lines = (tmp_path / "tarred" / "tarred_audio_manifest.json").read_text().splitlines()
    manifest, scanned = tmp_path / "shuffled.json", []
    monkeypatch.setattr(nemo, "tar_members", lambda path: (scanned.append(path), tar_members(path))[1])
    source = NemoSource({"train": manifest}, tars={"train": tmp_path / "tarred"})
    places = set()
    for _ in range(3):
        manifest.write_text("\n".join(rng.permutation(lines).tolist()))
        columns = source.columns("train")
        places.add(frozenset(zip(columns["audio"], columns["part"], strict=True)))
    archives = sorted(map(str, (tmp_path / "tarred").glob("*.tar")))
    assert (sorted(scanned), len(places)) == (archives, 1)
    path = Path(archives[0])
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-1])
    for _ in range(2):
        caplog.clear()
        source.columns("train")
        assert f"{path} breaks off after" in caplog.text
    assert scanned[5:] == [str(path)]


def test_a_member_of_several_lines(tmp_path: Path, clips, load_all):
    flac = next(clip for clip in clips if clip.path.suffix == ".flac")
    tarred(tmp_path / "tarred", [flac], 1)
    manifest = tmp_path / "tarred" / "sharded_manifests" / "manifest_0.json"
    source = NemoSource({"train": manifest}, tars={"train": tmp_path / "tarred"})
    whole, stretch = load_all(source).values()
    assert re.fullmatch(r"bytes=\d+,\d+", whole[0].part)
    assert stretch[0].part.startswith(f"{whole[0].part}&t=0.1,")
    assert len(stretch[1]) == 2_400
    if flac.rate == 16_000:
        np.testing.assert_array_equal(stretch[1], flac.samples[1_600:4_000])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("no", "line 1: not JSON"),
        ("[1]", "line 1: found list, expected an object"),
        ('{"audio_filepath": "a", "duration": "1"}', "field 'duration' is '1', expected a number of seconds"),
        ('{"audio_filepath": "a"}', "field 'duration' is missing"),
        (
            '{"audio_file_path": "a", "duration": 1}',
            "'audio_filepath' is missing; did you mean 'audio_file_path'?",
        ),
        ('{"audio_filepath": "a", "duration": 1, "id": ""}', "field 'id' is empty"),
        (
            '{"audio_filepath": "a", "duration": 1, "text": "a\\ud83d"}',
            "m.json, line 1: half a surrogate pair stands in it, expected Unicode text",
        ),
        (
            '{"audio_filepath": "a", "duration": 1, "note": {"\\udc00": 1}}',
            "m.json, line 1: half a surrogate pair stands in it, expected Unicode text",
        ),
        ("", "hold no references"),
    ],
)
def test_mistakes_in_a_manifest(tmp_path: Path, line: str, sentence: str):
    (tmp_path / "m.json").write_text(line + "\n")
    with pytest.raises(UserError, match=re.escape(sentence)):
        NemoSource({"train": tmp_path / "m.json"}).columns("train")


def test_archives_out_of_step(tmp_path: Path, clips):
    tarred(tmp_path / "tarred", clips, 2)
    manifests = [tmp_path / "tarred" / "sharded_manifests" / f"manifest_{i}.json" for i in (1, 0)]
    tars = {"train": tmp_path / "tarred" / "audio_{0..1}.tar"}
    with pytest.raises(UserError, match=r"manifest_1.json, line 1: .*audio_0.tar has no member"):
        NemoSource({"train": manifests}, tars=tars).columns("train")
    with pytest.raises(UserError, match="has 2 manifests and 3 tar shards"):
        NemoSource({"train": manifests}, tars={"train": tmp_path / "tarred" / "audio_{0..2}.tar"}).columns(
            "train"
        )
    write(tmp_path / "one.json", [entry_of(clips[0], shard_id=5)])
    with pytest.raises(UserError, match="'shard_id' is 5; choose from 0, 1"):
        NemoSource({"train": tmp_path / "one.json"}, tars=tars).columns("train")
    write(tmp_path / "list.json", [entry_of(clips[0], shard_id=[1])])
    with pytest.raises(UserError, match=r"'shard_id' is \[1\]; choose from 0, 1"):
        NemoSource({"train": tmp_path / "list.json"}, tars=tars).columns("train")
    with pytest.raises(UserError, match="tars name split 'test'"):
        NemoSource({"train": tmp_path / "one.json"}, tars={"test": tmp_path})
    (tmp_path / "tarred" / "audio_0.tar").write_bytes(b"x" * 2_000)
    with pytest.raises(UserError, match=r"audio_0.tar is no plain tar archive"):
        NemoSource({"train": manifests[1]}, tars={"train": tmp_path / "tarred" / "audio_0.tar"}).columns(
            "train"
        )
