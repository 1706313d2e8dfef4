"""Published corpora on miniature folders in exactly their layouts, from the files to decoded audio."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import seqio
import soundfile

from slm_jax.data import audio_files
from slm_jax.data.index import IndexTable, build_index
from slm_jax.data.references import Reference
from slm_jax.data.sources import ReferenceSource
from slm_jax.data.sources.corpora.base import CorpusSource
from slm_jax.data.sources.corpora.common_voice import CommonVoiceSource
from slm_jax.data.sources.corpora.fleurs import FleursSource
from slm_jax.data.sources.corpora.gigaspeech import GigaSpeechSource
from slm_jax.data.sources.corpora.librispeech import LibriSpeechSource
from slm_jax.data.sources.corpora.mls import MLSSource
from slm_jax.data.sources.corpora.slue import SlueVoxPopuliSource
from slm_jax.errors import UserError
from slm_jax.tasks import (
    common_voice,
    covost2,
    fleurs,
    gigaspeech,
    librispeech,
    mls,
    slue,
    voxpopuli,
)

LENGTHS = {"speech": 160_000, "inputs": 200, "targets": 200}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def write_audio(rng) -> Callable[..., int]:
    """Writes a recording in the format of the path's ending; returns its samples at 16 kHz."""

    def write(path: Path, seconds: float | None = None, rate: int = 16_000) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = round((rng.uniform(0.4, 0.9) if seconds is None else seconds) * 16_000)
        wave = np.sin(np.arange(samples * rate // 16_000) * 0.05) * 0.3
        kinds = {".opus": ("OGG", "OPUS"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", None)}
        format_, subtype = kinds.get(path.suffix, (None, None))
        soundfile.write(path, wave, rate, format=format_, subtype=subtype)
        return samples

    return write


def lay(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def row(*values: object) -> str:
    return "\t".join(map(str, values))


def index_of(name: str, split: str, tmp_path: Path) -> IndexTable:
    return build_index(name, split, LENGTHS, tmp_path / "index")


def source_of(name: str) -> ReferenceSource:
    source = seqio.TaskRegistry.get(name).source
    assert isinstance(source, ReferenceSource)
    return source


def target_of(name: str, reference: Reference) -> str:
    vocabulary = seqio.TaskRegistry.get(name).output_features["targets"].vocabulary
    return vocabulary.decode(reference.targets.tolist())


def loaded(name: str, split: str, tmp_path: Path) -> dict[str, tuple[str, int]]:
    """id -> target and samples of each reference, once its audio was decoded in full."""
    found = {}
    for reference in index_of(name, split, tmp_path).references():
        audio = audio_files.load_utterance(reference)
        assert np.abs(audio.samples).max() > 1_000
        assert abs(len(audio.samples) - reference.samples) <= audio_files.HOP
        found[reference.id] = (target_of(name, reference), reference.samples)
    return found


def test_librispeech(tmp_path, task_vocabulary, write_audio):
    root = tmp_path / "LibriSpeech"
    for split, chapters in {
        "train-clean-100": ["103/1240", "19/198"],
        "train-clean-360": ["14/208"],
        "train-other-500": ["20/205"],
        "dev-clean": ["84/121123"],
        "test-clean": ["61/70968"],
    }.items():
        for chapter in chapters:
            stem = chapter.replace("/", "-")
            lay(
                root / split / chapter / f"{stem}.trans.txt",
                f"{stem}-0000 THE QUICK FOX",
                f"{stem}-0001 JUDGE THE DOG",
            )
    samples = {
        id_: write_audio(root / split / folder / f"{id_}.flac")
        for split, folder, id_ in (
            ("train-clean-100", "103/1240", "103-1240-0000"),
            ("train-clean-100", "103/1240", "103-1240-0001"),
            ("train-clean-100", "19/198", "19-198-0000"),
        )
    }
    name = librispeech.register_librispeech(root, vocabulary=task_vocabulary)
    table = index_of(name, "train-clean-100", tmp_path)
    # One file of the four is missing.
    assert (table.report.kept, table.report.rejected) == (3, {"non_positive_duration": 1})
    assert loaded(name, "train-clean-100", tmp_path) == {
        "103-1240-0000": ("the quick fox", samples["103-1240-0000"]),
        "103-1240-0001": ("judge the dog", samples["103-1240-0001"]),
        "19-198-0000": ("the quick fox", samples["19-198-0000"]),
    }
    # A file that arrives later changes the index.
    write_audio(root / "train-clean-100/19/198/19-198-0001.flac")
    assert index_of(name, "train-clean-100", tmp_path).report.kept == 4

    source = LibriSpeechSource(root)
    columns = source.columns("train")
    assert columns["id"].tolist()[::2] == ["103-1240-0000", "19-198-0000", "14-208-0000", "20-205-0000"]
    assert columns["text"][0] == "THE QUICK FOX"
    assert (columns["speaker"][2], columns["chapter"][2], set(columns["language"])) == ("19", "198", {"en"})
    assert source.num_input_examples("train") == 8
    assert source.columns("validation")["id"].tolist() == ["84-121123-0000", "84-121123-0001"]
    clean = LibriSpeechSource(root, {"train": ("train-clean-100",)})
    assert clean.num_input_examples("train") == 4 and clean.definition() != source.definition()
    for wrong, told in (
        (lambda: source.columns("dev-other"), "no folder .*dev-other; choose from dev-clean, test-clean"),
        (
            lambda: source.columns("train-clean-10"),
            "no split 'train-clean-10'; did you mean 'train-clean-100'",
        ),
        (lambda: LibriSpeechSource(root, {"t": ["train"]}), "split 't' joins unknown 'train'"),
        (lambda: LibriSpeechSource(root, case="lowre"), "case is 'lowre'; did you mean 'lower'"),
    ):
        with pytest.raises(UserError, match=told):
            wrong()


@pytest.mark.parametrize(("folder", "ending"), [("mls_german", "flac"), ("mls_german_opus", "opus")])
def test_mls(tmp_path, task_vocabulary, write_audio, folder, ending):
    root = tmp_path / folder
    ids = ["4800_10003_000000", "4800_10003_000001", "2497_1614_000003"]
    for split in ("train", "dev", "test"):
        lay(root / split / "transcripts.txt", *(row(id_, "the quick fox") for id_ in ids))
        lay(
            root / split / "segments.txt",
            *(row(id_, "http://archive.org/b.mp3", 10.25 * i, 10.25 * i + 0.5) for i, id_ in enumerate(ids)),
        )
    lay(root / "train/limited_supervision/9hr/handles.txt", ids[0])
    lay(root / "train/limited_supervision/1hr/0/handles.txt", ids[2])
    rate = 48_000 if ending == "opus" else 16_000
    for id_ in ids:
        speaker, book, _ = id_.split("_")
        write_audio(root / "train/audio" / speaker / book / f"{id_}.{ending}", 0.5, rate)
    name = mls.register_mls(root, vocabulary=task_vocabulary)
    assert name == "mls_de_asr"
    assert loaded(name, "train", tmp_path) == dict.fromkeys(ids, ("the quick fox", 8_000))
    by_times = mls.register_mls(root, vocabulary=task_vocabulary, name="times", lengths="segments")
    assert loaded(by_times, "train", tmp_path) == dict.fromkeys(ids, ("the quick fox", 8_000))
    assert MLSSource(root, limited=True).columns("train")["id"].tolist() == [ids[0], ids[2]]
    assert MLSSource(root, limited=True).num_input_examples("validation") == 3
    assert set(MLSSource(root).columns("train")["language"]) == {"de"}
    lay(root / "train/segments.txt", row(ids[0], "u", 0, 1))
    for wrong, told in (
        (lambda: MLSSource(tmp_path / "mls_germna"), "names no language; did you mean 'mls_german'"),
        (lambda: MLSSource(root, lengths="header"), "lengths is 'header'; did you mean 'headers'"),
        (lambda: MLSSource(root, lengths="segments").columns("train"), f"no line for '{ids[1]}'"),
        (lambda: MLSSource(tmp_path / "mls_dutch").columns("dev"), "there is no folder .*mls_dutch/dev"),
    ):
        with pytest.raises(UserError, match=told):
            wrong()


def test_common_voice(tmp_path, task_vocabulary, write_audio):
    root = tmp_path / "cv-corpus-17.0-2024-03-15" / "sv-SE"
    header = row(
        "client_id", "path", "sentence_id", "sentence", "up_votes", "age", "gender", "accents", "locale"
    )
    clips = [f"common_voice_sv-SE_{number}.mp3" for number in (17, 18, 19)]
    lines = [row("ab", clip, "s", 'the "quick" fox', 2, "", "", "", "sv-SE") for clip in clips]
    for split in ("train", "dev", "test", "validated", "other", "invalidated"):
        lay(root / f"{split}.tsv", header, *lines)
    for clip in clips:
        write_audio(root / "clips" / clip, 0.8, 32_000)
    name = common_voice.register_common_voice(root, vocabulary=task_vocabulary)
    assert name == "common_voice_sv_asr"
    found = loaded(name, "train", tmp_path)
    assert list(found) == [clip.removesuffix(".mp3") for clip in clips]
    assert {samples for _, samples in found.values()} <= set(range(12_800, 16_000))
    # Newer releases tell the lengths; what is not among them is looked up.
    lay(root / "clip_durations.tsv", row("clip", "duration[ms]"), row(clips[0], 805), row(clips[1], 801))
    source = CommonVoiceSource(root)
    columns = source.columns("validation")
    assert columns["samples"].tolist()[:2] == [12_880, 12_816] and columns["samples"][2] >= 12_800
    assert loaded(name, "train", tmp_path)["common_voice_sv-SE_17"][1] == 12_880
    assert columns["text"][0] == 'the "quick" fox' and columns["speaker"][0] == "ab"
    assert (columns["language"][0], columns["locale"][0]) == ("sv", "sv-SE")
    # The first releases name clips without their ending.
    lay(root / "train.tsv", row("client_id", "path", "sentence", "accent"), row("c", "ff00", "fox", "south"))
    assert source.columns("train")["audio"].tolist() == [str(root / "clips/ff00.mp3")]
    for text, told in (
        (row("client_id", "path", "sentense"), "train.tsv has no column 'sentence'; did you mean 'sentense'"),
        (f"{header}\n{row('a', 'b')}", "train.tsv, line 2: found 2 values, expected 9"),
        (header, "split 'train' holds no references"),
        ("", "has no column 'client_id'"),
    ):
        lay(root / "train.tsv", text)
        with pytest.raises(UserError, match=told.replace("[", r"\[")):
            source.columns("train")
    (root / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"train.tsv does not exist"):
        source.columns("train")
    (root / "train.tsv").write_bytes(b"client_id\tpath\tsentence\n\xff")
    with pytest.raises(UserError, match=r"train.tsv is not UTF-8 text: byte 24"):
        source.columns("train")


@pytest.mark.parametrize("first", ["id_", "id"])
def test_voxpopuli(tmp_path, task_vocabulary, write_audio, first):
    root = tmp_path / "transcribed_data" / "de"
    header = row(first, "raw_text", "normalized_text", "speaker_id", "split", "gender", "is_gold_transcript")
    ids = ["20180613-0900-PLENARY-3-de_20180613-09_04_02_2", "20090112-0900-PLENARY-9-de_1"]
    for split in ("train", "dev", "test"):
        lines = [row(id_, "The Quick Fox.", "the quick fox", 7, split, "female", "True") for id_ in ids]
        lay(root / f"asr_{split}.tsv", header, *lines)
    samples = [write_audio(root / id_[:4] / f"{id_}.ogg") for id_ in ids]
    name = voxpopuli.register_voxpopuli(root, vocabulary=task_vocabulary, target="{raw_text}")
    assert name == "voxpopuli_de_asr"
    found = loaded(name, "validation", tmp_path)
    assert [samples for _, samples in found.values()] == samples and list(found) == ids
    columns = source_of(name).columns("train")
    assert (columns["text"][0], columns["speaker"][0], columns["gender"][0]) == (
        "the quick fox",
        "7",
        "female",
    )
    lay(root / "asr_test.tsv", row("name", "normalized_text", "speaker_id"), row("x", "fox", 1))
    with pytest.raises(UserError, match=r"asr_test.tsv has no column 'id_' nor 'id'"):
        index_of(name, "test", tmp_path)


def test_fleurs(tmp_path, task_vocabulary, write_audio):
    root = tmp_path / "fleurs"
    texts = {"de_de": "Der Fuchs!", "en_us": "The fox!", "cmn_hans_cn": "Fuchs"}
    samples = {}
    for language, text in texts.items():
        for split in ("train", "dev", "test"):
            lines = []
            for number, sentence in enumerate((5, 5, 1_000 + len(text))):
                file = f"{number}{len(language)}1234.wav"
                count = write_audio(root / language / "audio" / split / file)
                samples[f"{language}/{file.removesuffix('.wav')}", split] = count
                spelled = " ".join(text)
                lines.append(row(sentence, file, text, text.lower(), spelled, count, "FEMALE"))
            lay(root / language / f"{split}.tsv", *lines)
    name = fleurs.register_fleurs_asr(root, languages=("de_de", "cmn_hans_cn"), vocabulary=task_vocabulary)
    assert name == "fleurs_de_zh_asr"
    found = loaded(name, "train", tmp_path)
    assert {id_: count for id_, (_, count) in found.items()} == {
        id_: count for (id_, split), count in samples.items() if split == "train" and "en_us" not in id_
    }
    name = fleurs.register_fleurs_ast(
        root, languages=("de_de", "en_us"), target_language="en_us", vocabulary=task_vocabulary
    )
    # Only two recordings of German have an English sentence; English is none of English.
    report = index_of(name, "validation", tmp_path).report
    assert (report.kept, report.rejected) == (2, {"empty_target": 4})
    both = fleurs.register_fleurs_ast(
        root,
        languages=("de_de", "en_us"),
        target_language="en_us",
        vocabulary=task_vocabulary,
        name="both",
        same_language="transcribe",
    )
    assert index_of(both, "validation", tmp_path).report.kept == 5
    name = fleurs.register_fleurs_language_id(
        root, languages=("de_de", "cmn_hans_cn"), vocabulary=task_vocabulary
    )
    rows = seqio.get_mixture_or_task(name).get_dataset(None, "test", shuffle=False).as_numpy_iterator()
    assert [row["targets_pretokenized"] for row in rows] == [b"German"] * 3 + [b"Chinese"] * 3
    columns = FleursSource(root, ["de_de"], ["en_us", "cmn_hans_cn"]).columns("train")
    assert columns["translations.en"].tolist() == ["The fox!", "The fox!", ""]
    assert columns["translations.zh"][0] == "Fuchs" and columns["normalized_text"][0] == "der fuchs!"
    assert (columns["sentence"][0], columns["locale"][0], columns["gender"][0]) == ("5", "de_de", "female")
    with pytest.raises(UserError, match="languages is 'de_de', expected a list"):
        FleursSource(root, "de_de")
    with pytest.raises(UserError, match=r"there is no folder .*de_ed, expected train.tsv in it"):
        FleursSource(root, ["de_ed"]).columns("train")
    lay(root / "de_de" / "test.tsv", row(1, "a.wav", "x", "x", "x", "many", "MALE"))
    with pytest.raises(UserError, match="column 'num_samples' is 'many', expected a number"):
        FleursSource(root, ["de_de"]).columns("test")


def test_covost2(tmp_path, task_vocabulary, write_audio):
    root, clips = tmp_path / "covost", tmp_path / "cv-corpus-4" / "de" / "clips"
    for split in ("train", "dev", "test"):
        lay(
            root / f"covost_v2.de_zh-CN.{split}.tsv",
            row("path", "sentence", "translation", "client_id"),
            row("common_voice_de_1.mp3", r"Er sagt \"Fuchs\"", "quick fox", "c1"),
            row("common_voice_de_2.mp3", "Hund", r"a \\ dog", "c2"),
        )
    for number in (1, 2):
        write_audio(clips / f"common_voice_de_{number}.mp3", rate=48_000)
    name = covost2.register_covost2(
        root, clips=clips, source_language="de", target_language="zh-CN", vocabulary=task_vocabulary
    )
    assert name == "covost2_de_zh_ast"
    assert next(iter(loaded(name, "validation", tmp_path).values()))[0] == "quick fox"
    columns = source_of(name).columns("train")
    assert columns["text"].tolist() == ['Er sagt "Fuchs"', "Hund"]
    assert columns["translations.zh"].tolist() == ["quick fox", "a \\ dog"]
    rows = seqio.get_mixture_or_task(name).get_dataset(None, "test", shuffle=False).as_numpy_iterator()
    assert all(b"Chinese" in row["inputs_pretokenized"] for row in rows)


def test_gigaspeech(tmp_path, task_vocabulary, write_audio, monkeypatch):
    root = tmp_path / "GigaSpeech"

    def segment(number: int, start: float, end: float, text: str, *subsets: str) -> dict:
        return {
            "sid": f"POD1_S{number:07}",
            "speaker": "N/A",
            "begin_time": start,
            "end_time": end,
            "text_tn": text,
            "subsets": [f"{{{name}}}" for name in subsets],
        }

    long = [
        segment(0, 0.25, 1.0, "THE FOX <COMMA> QUICK <PERIOD>", "XL", "L"),
        segment(1, 1.5, 3.75, "DOG <QUESTIONMARK>", "XL"),
        segment(2, 4.0, 4.5, "FOX <EXCLAMATIONPOINT>", "XL"),
    ]
    held = [
        segment(3, 0.0, 1.0, "<MUSIC>", "DEV"),
        segment(4, 1.0, 2.0, "THE FOX", "DEV"),
        segment(5, 2.0, 2.5, "<SIL>", "DEV"),
    ]
    audios = [
        {"title": "T]", "aid": "POD1", "path": "audio/podcast/P0001/POD1.opus", "segments": long},
        {"title": "U", "aid": "YOU2", "path": "audio/youtube/P0002/YOU2.opus", "segments": held},
    ]
    document = {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": audios, "more": [1]}
    lay(root / "GigaSpeech.json", json.dumps(document, indent=2))
    for audio in audios:
        write_audio(root / audio["path"], 5.0, 48_000)
    name = gigaspeech.register_gigaspeech(root, vocabulary=task_vocabulary)
    found = loaded(name, "train", tmp_path)
    assert {id_: samples for id_, (_, samples) in found.items()} == {
        "POD1_S0000000": 12_000,
        "POD1_S0000001": 36_000,
        "POD1_S0000002": 8_000,
    }
    columns = source_of(name).columns("train")
    assert columns["text"].tolist() == ["the fox, quick.", "dog?", "fox!"]
    table = index_of(name, "validation", tmp_path)
    assert (table.report.kept, table.report.rejected) == (1, {"garbage_utterance": 2})
    assert index_of(name, "L", tmp_path).report.kept == 1
    plain = GigaSpeechSource(root, marks=False).columns("XL")
    assert plain["text"].tolist() == ["THE FOX QUICK", "DOG", "FOX"]
    assert plain["part"].tolist() == ["t=0.25,1.0", "t=1.5,3.75", "t=4.0,4.5"]
    # The document is read in pieces, of any size.
    monkeypatch.setattr("slm_jax.data.sources.corpora.gigaspeech._BLOCK", 7)
    again = GigaSpeechSource(root, marks=False).columns("XL")
    assert again["id"].tolist() == plain["id"].tolist()
    whole = (root / "GigaSpeech.json").read_text()
    for text, told in (
        (whole[:-400], "GigaSpeech.json breaks off or is no JSON"),
        ('{"audio": []}', "has no list 'audios'"),
        ('{"audios": [{"segments": [{"sid": "a"}]}]}', "audio 0 is not as published .KeyError"),
        (
            '{"audios": [{"segments": [{"subsets": ["{XL}"], "begin_time": "", "end_time": 1}]}]}',
            "audio 0 is not as published .ValueError.*could not convert string to float",
        ),
    ):
        lay(root / "GigaSpeech.json", text)
        with pytest.raises(UserError, match=told):
            GigaSpeechSource(root).columns("XL")


def test_slue_voxpopuli(tmp_path, task_vocabulary, write_audio):
    root = tmp_path / "slue-voxpopuli"
    header = ("id", "raw_text", "normalized_text", "speaker_id", "split", "raw_ner", "normalized_ner")
    rows = [
        (
            "20131007-en_7",
            "",
            "the fox in the dog house",
            "None",
            "s",
            "[]",
            "[['LAW', 15, 9], ['DATE', 4, 3]]",
        ),
        ("20131007-en_8", "", '"the ""quick"" fox"', "3", "s", "[]", "None"),
        ("20131007-en_9", "", "the dog", "3", "s", "[]", "[['EVENT', 4, 3]]"),
    ]
    for split in ("fine-tune", "dev"):
        lay(root / f"slue-voxpopuli_{split}.tsv", row(*header), *(row(*values) for values in rows))
    lay(root / "slue-voxpopuli_test_blind.tsv", row(*header[:5]), *(row(*values[:5]) for values in rows))
    for split in ("fine-tune", "dev", "test"):
        for id_, *_ in rows:
            write_audio(root / split / f"{id_}.ogg")
    name = slue.register_slue_ner(root, vocabulary=task_vocabulary)
    source = source_of(name)
    assert source.columns("train")["entities"].tolist() == ["WHEN: fox; LAW: dog house", "none", "none"]
    assert source.columns("train")["text"][1] == 'the "quick" fox'
    published = SlueVoxPopuliSource(root, tags="published").columns("dev")["entities"].tolist()
    assert published == ["DATE: fox; LAW: dog house", "none", "EVENT: dog"]
    assert len(loaded(name, "validation", tmp_path)) == 3
    with pytest.raises(UserError, match="yields nothing: 0 references; rejected: empty_target 3"):
        index_of(name, "test", tmp_path)
    asr = slue.register_slue_asr(root, vocabulary=task_vocabulary)
    assert asr == "slue_voxpopuli_asr" and len(loaded(asr, "test", tmp_path)) == 3
    lay(root / "slue-voxpopuli_dev.tsv", row(*header), row("a", "", "b", "c", "d", "[]", "[['LAW', 1]]"))
    with pytest.raises(UserError, match=r"slue-voxpopuli_dev.tsv, a: normalized_ner is"):
        source.columns("dev")
    with pytest.raises(UserError, match="tags is 'combine'; did you mean 'combined'"):
        SlueVoxPopuliSource(root, tags="combine")
    with pytest.raises(UserError, match="is no corpus of it; did you mean 'slue-voxceleb'"):
        slue.register_slue_asr(tmp_path / "slue-voxcelb", vocabulary=task_vocabulary)


def test_slue_voxceleb(tmp_path, task_vocabulary, write_audio):
    root = tmp_path / "slue-voxceleb"
    header = row("id", "normalized_text", "sentiment", "speaker_id", "start_second", "end_second")
    ids = ["id10012_0AXjxNXiEzo_00001", "id10013_x_00002", "id10014_x_00003"]
    kinds = ["Positive", "<mixed>", "Negative"]
    lines = [row(id_, "the fox", kind, "id1", 0.5, 1.75) for id_, kind in zip(ids, kinds, strict=True)]
    for split in ("fine-tune", "dev"):
        lay(root / f"slue-voxceleb_{split}.tsv", header, *lines)
        for id_ in ids:
            write_audio(root / f"{split}_raw" / f"{id_}.flac", 2.0)
    name = slue.register_slue_sentiment(root, vocabulary=task_vocabulary)
    table = index_of(name, "train", tmp_path)
    assert (table.report.kept, table.report.rejected) == (2, {"unknown_label": 1})
    found = loaded(name, "train", tmp_path)
    assert {samples for _, samples in found.values()} == {20_000}
    rows = seqio.get_mixture_or_task(name).get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
    rows = list(rows)
    assert [row["targets_pretokenized"].decode() for row in rows] == kinds
    assert all(b"Positive, Neutral, Negative" in row["inputs_pretokenized"] for row in rows)
    asr = slue.register_slue_asr(root, vocabulary=task_vocabulary)
    assert len(loaded(asr, "dev", tmp_path)) == 3


def test_fingerprints_change_with_settings_texts_and_files(tmp_path, write_audio):
    root = tmp_path / "LibriSpeech"
    lay(root / "dev-clean/1/2/1-2.trans.txt", "1-2-0000 FOX")
    write_audio(root / "dev-clean/1/2/1-2-0000.flac")
    prints: list[str] = []

    def add(source: CorpusSource, split: str = "dev-clean") -> None:
        assert source.content_fingerprint(split) == source.content_fingerprint(split)
        prints.append(source.content_fingerprint(split))

    add(LibriSpeechSource(root))
    assert LibriSpeechSource(root).content_fingerprint("validation") == prints[0]
    add(LibriSpeechSource(root, case="lower"))
    lay(root / "dev-clean/1/2/1-2.trans.txt", "1-2-0000 DOG")
    add(LibriSpeechSource(root))
    write_audio(root / "dev-clean/1/2/1-2-0000.flac", 1.5)
    add(LibriSpeechSource(root))
    assert len(set(prints)) == 4
