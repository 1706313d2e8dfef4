"""Families of tasks: what each asks, answers and leaves out, from the manifest to the index."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import seqio
import soundfile

from slm_jax.data import audio_files
from slm_jax.data.index import IndexTable, build_index
from slm_jax.data.references import SPEECH
from slm_jax.errors import UserError
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.ast import register_ast
from slm_jax.tasks.biasing import register_biasing
from slm_jax.tasks.continuation import register_continuation
from slm_jax.tasks.instruction import register_spoken_instruction
from slm_jax.tasks.labels import register_classification, register_keyword, register_slots
from slm_jax.tasks.language_id import register_language_id
from slm_jax.tasks.spoken_qa import register_spoken_qa
from slm_jax.tasks.text import register_text, register_text_translation

LANGUAGES = ["en", "de", "fr", "es", "xx"]
COMMON: dict[str, object] = {
    "duration": 1.0,
    "text": "the quick brown fox",
    "translations": {"de": "der Fuchs", "fr": ""},
    "instruction": "judge the fox",
    "response": "quick",
    "question": "who jumps",
    "context": "the fox jumps over the dog",
    "answer": "the fox",
    "slots": "animal: fox; speed: quick",
    "cut": "0.25",
    "cut_words": "2",
}

WriteManifest = Callable[..., Path]


@pytest.fixture
def write(tmp_path) -> WriteManifest:
    def write(count: int = 40, name: str = "train.jsonl", **changes: Callable[[int], object]) -> Path:
        path = tmp_path / name
        lines = []
        for i in range(count):
            line = COMMON | {"id": f"u{i}", "audio": f"{i}.wav", "language": LANGUAGES[i % 5]}
            line |= {field: value(i) for field, value in changes.items()}
            lines.append(json.dumps({field: value for field, value in line.items() if value is not None}))
        path.write_text("\n".join(lines))
        return path

    return write


def rows(name: str) -> list[dict]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
    return [
        {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
        for row in dataset.as_numpy_iterator()
    ]


def asked(name: str) -> set[tuple[str, str]]:
    return {(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in rows(name)}


def index_of(name: str, tmp_path: Path) -> IndexTable:
    return build_index(name, "train", {"speech": 32_000, "inputs": 300, "targets": 99}, tmp_path / "index")


@pytest.fixture
def given(write, task_vocabulary) -> dict:
    return {"manifests": {"train": write()}, "vocabulary": task_vocabulary}


def test_prompts_in_the_language_of_the_speech(given):
    register_asr("asr", prompt_language="speech", **given)
    by_language: dict[str, set[str]] = {}
    for row in rows("asr"):
        by_language.setdefault(row["language"], set()).add(row["inputs_pretokenized"])
    for language, told in {
        "en": {"Transcribe", "Write", "What", "Transcript"},
        "de": {"Transkribiere", "Schreibe", "Was", "Verschriftliche", "Transkript"},
        "fr": {"Transcrivez", "Écrivez", "Que", "Transcription"},
        "es": {"Transcribe", "Escribe", "¿Qué", "Transcripción"},
        # There are no prompts in it.
        "xx": {"Transcribe", "Write", "What", "Transcript"},
    }.items():
        assert {prompt.split()[0] for prompt in by_language[language]} <= told
        assert len(by_language[language]) > 1
    register_asr("german", prompt_language="de", **given)
    assert {prompt.split()[0] for prompt, _ in asked("german")} <= {
        "Transkribiere", "Schreibe", "Was", "Verschriftliche", "Transkript",
    }  # fmt: skip
    assert any("Spanisch" in prompt for prompt, _ in asked("german"))
    for wrong, told in (
        (
            {"prompt_language": "it"},
            "task 'wrong': prompt_language is 'it', and there are no templates in it",
        ),
        ({"prompt_language": "speech", "templates": ["{speech}"]}, "task 'wrong': .* templates by language"),
        ({"order": "speech"}, "task 'wrong': order is 'speech'; "),
        ({"templates": "aser"}, "task 'wrong': there is no set of prompt templates 'aser'; did|expected"),
        (
            {"prompt_language": "speech", "templates": {"en": ["{speech}"], "de": ["hör zu"]}},
            "task 'wrong': prompt template 'hör zu' has no {speech}",
        ),
    ):
        with pytest.raises(UserError, match=told):
            register_asr("wrong", **(given | wrong))


def test_translation_names_its_language_in_that_of_the_prompt(given):
    register_ast("ast", target_language="de", prompt_language="speech", **given)
    names = {"en": "German", "de": "Deutsch", "fr": "allemand", "es": "alemán", "xx": "German"}
    assert all(names[row["language"]] in row["inputs_pretokenized"] for row in rows("ast"))
    assert {target for _, target in asked("ast")} == {"der Fuchs"}
    register_ast("inline", target_language="de", templates=["auf {target_language} {speech}"], **given)
    assert asked("inline") == {("auf German {speech}", "der Fuchs")}
    register_ast(
        "inline_de",
        target_language="de",
        templates=["auf {target_language} {speech}"],
        prompt_language="de",
        **given,
    )
    assert asked("inline_de") == {("auf Deutsch {speech}", "der Fuchs")}


def test_speech_in_the_target_language_is_left_out_or_transcribed(given, tmp_path):
    register_ast("fr", target_language="fr", **given)
    with pytest.raises(UserError, match="yields nothing: 0 references; rejected: empty_target 40"):
        index_of("fr", tmp_path)
    register_ast("fr_too", target_language="fr", same_language="transcribe", **given)
    report = index_of("fr_too", tmp_path).report
    assert (report.kept, report.rejected) == (8, {"empty_target": 32})
    with pytest.raises(UserError, match="task 'w': same_language is 'transcibe'; did you mean 'transcribe'"):
        register_ast("w", target_language="fr", same_language="transcibe", **given)


def test_order_of_speech_and_text(given):
    for order, holds in (("speech_first", str.startswith), ("speech_last", str.endswith)):
        register_asr(order, order=order, prompt_language="speech", **given)
        assert all(holds(prompt, "{speech}") for prompt, _ in asked(order))


def test_templates_of_a_file_and_of_text_alone(given, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('en = ["Hear {speech}!"]\nde = ["Höre {speech}!"]\n')
    register_asr("file", templates=path, prompt_language="speech", **given)
    assert {prompt for prompt, _ in asked("file")} == {"Hear {speech}!", "Höre {speech}!"}
    register_asr("text", templates=path, prompt_language="speech", text_only=True, **given)
    assert {p for p, _ in asked("text")} == {"Hear the quick brown fox!", "Höre the quick brown fox!"}
    assert all(SPEECH not in row["inputs"] for row in rows("text"))


def test_a_spoken_instruction_is_answered(given):
    register_spoken_instruction("do", **given)
    assert {target for _, target in asked("do")} == {"quick"}
    assert all("{speech}" in prompt and "judge" not in prompt for prompt, _ in asked("do"))


def test_questions_are_spoken_or_written(given):
    register_spoken_qa("heard", spoken="question", **given)
    assert all("the fox jumps" in p and "who" not in p and "{speech}" in p for p, _ in asked("heard"))
    register_spoken_qa("read", spoken="passage", **given)
    assert all("who jumps" in p and "over" not in p and "{speech}" in p for p, _ in asked("read"))
    assert {target for _, target in asked("heard") | asked("read")} == {"the fox"}
    for spoken in ("question", "passage"):
        register_spoken_qa(f"{spoken}_text", spoken=spoken, text_only=True, **given)
        assert all("who jumps" in p and "the fox jumps over" in p for p, _ in asked(f"{spoken}_text"))
    with pytest.raises(UserError, match="task 'w': spoken is 'questions'; did you mean 'question'"):
        register_spoken_qa("w", spoken="questions", **given)


def test_phrase_lists(write, task_vocabulary, tmp_path):
    manifest = write(phrases=lambda i: f"name{i}; fox{i}")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"other{i}" for i in range(30)))
    given = {"manifests": {"train": manifest}, "vocabulary": task_vocabulary, "distractors": (2, 4)}
    templates = ["[{phrase_list}] {speech}"]

    def lists(name: str) -> list[tuple[str, list[str]]]:
        return [
            (row["id"][1:], row["inputs_pretokenized"].split("]")[0].removeprefix("[").split(", "))
            for row in rows(name)
        ]

    register_biasing("file", distractor_file=names, templates=templates, **given)
    for number, listed in lists("file"):
        assert {f"name{number}", f"fox{number}"} < set(listed)
        assert (
            4 <= len(listed) <= 6 and sum(phrase.startswith("other") for phrase in listed) == len(listed) - 2
        )
    register_biasing("others", absent=0.5, templates=templates, **given)
    present = [f"name{number}" in listed for number, listed in lists("others")]
    assert 5 < sum(present) < 35
    assert {phrase[:3] for _, listed in lists("others") for phrase in listed} == {"nam", "fox"}
    register_biasing("packaged", **given)
    assert all("{speech}" in prompt and "name" in prompt for prompt, _ in asked("packaged"))
    # The same again, as every command does.
    register_biasing("file", distractor_file=names, templates=templates, **given)
    before = index_of("file", tmp_path).fingerprint
    names.write_text("\n".join(f"new{i}" for i in range(30)))
    seqio.TaskRegistry.remove("file")
    register_biasing("file", distractor_file=names, templates=templates, **given)
    assert index_of("file", tmp_path).fingerprint != before


def test_rare_words_are_the_phrases(given, tmp_path):
    common, names = tmp_path / "common.txt", tmp_path / "names.txt"
    common.write_text("the\nbrown\n")
    names.write_text("lazy\ndog\n")
    register = functools.partial(
        register_biasing, "rare", distractors=1, common_words=common, distractor_file=names, **given
    )
    assert register() == register() == "rare"
    assert all("quick" in prompt and "fox" in prompt for prompt, _ in asked("rare"))
    recall = seqio.TaskRegistry.get("rare").metric_fns[-1]
    assert recall(["the quick brown fox"], ["the quick dog"]) == {"rare_word_recall": 50.0}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"distractors": -1}, "distractors is -1, expected a whole number"),
        ({"distractors": (3, 1)}, r"distractors is \(3, 1\), expected a number, or the least and the most"),
        ({"distractors": 1, "absent": 1.5}, "absent is 1.5, expected a share from 0 to 1"),
        ({"distractors": 1, "separator": ""}, "separator is empty"),
        ({"distractors": 1, "common_words": "x.txt"}, "common_words needs a distractor_file"),
        ({"distractors": 1, "distractor_split": "tran"}, "no split 'tran'; did you mean 'train'"),
        ({"distractors": 1, "manifests": None}, "give either `manifests` or `source`"),
    ],
)
def test_mistakes_in_phrase_lists(given, settings, told):
    with pytest.raises(UserError, match=told):
        register_biasing("wrong", **given | settings)


def test_continuation(write, task_vocabulary, tmp_path, rng):
    manifest = write(
        10,
        cut=lambda i: "2.0" if i == 0 else "0.25",
        cut_words=lambda i: "4" if i == 1 else "2",
        continuation=lambda i: "over the dog",
    )
    wave = rng.integers(-20_000, 20_000, 16_000).astype(np.int16)
    for i in range(10):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16_000)
    given = {"manifests": {"train": manifest}, "vocabulary": task_vocabulary}
    register_continuation("whole", **given)
    assert {target for _, target in asked("whole")} == {"over the dog"}
    assert {reference.samples for reference in index_of("whole", tmp_path).references()} == {16_000}
    register_continuation("cut", cut="cut", **given)
    report = index_of("cut", tmp_path).report
    assert (report.kept, report.rejected) == (9, {"bad_cut": 1})
    register_continuation("words", cut="cut", cut_words="cut_words", **given)
    table = index_of("words", tmp_path)
    assert (table.report.kept, table.report.rejected) == (8, {"bad_cut": 2})
    assert {row["targets_pretokenized"] for row in rows("words")} == {"brown fox", ""}
    for reference in table.references():
        assert audio_files.load_utterance(reference).samples.tolist() == wave[:4_000].tolist()
    register_continuation("text", cut="cut", cut_words="cut_words", text_only=True, **given)
    assert any("the quick" in p and "brown" not in p for p, _ in asked("text"))
    with pytest.raises(UserError, match="cut_words is 'cut_words' without `cut`"):
        register_continuation("wrong", cut_words="cut_words", **given)


def test_slots_keywords_and_classes(write, task_vocabulary, tmp_path):
    manifest = write(keyword=lambda i: ["yes", "no", "maybe"][i % 3], label=lambda i: "calm")
    given = {"manifests": {"train": manifest}, "vocabulary": task_vocabulary}
    register_slots("slots", slot_names=["animal", "speed"], **given)
    assert {target for _, target in asked("slots")} == {"animal: fox; speed: quick"}
    assert all("animal, speed" in prompt for prompt, _ in asked("slots"))
    register_keyword("keyword", keywords=["yes", "no"], **given)
    assert all("yes, no" in prompt for prompt, _ in asked("keyword"))
    report = index_of("keyword", tmp_path).report
    assert (report.kept, report.rejected) == (27, {"unknown_label": 13})
    register_classification("class", labels=("calm", "{loud}"), **given)
    assert all("calm, {loud}" in prompt and target == "calm" for prompt, target in asked("class"))
    for wrong, told in (
        (lambda: register_keyword("w", keywords=["yes"], **given), "expected two or more different texts"),
        (lambda: register_keyword("w", keywords=["a", "a"], **given), "expected two or more different texts"),
        (lambda: register_classification("w", labels="calm", **given), "labels is 'calm'"),
        (
            lambda: register_slots("w", slot_names="animal", **given),
            "slot_names is 'animal', expected a list",
        ),
    ):
        with pytest.raises(UserError, match=told):
            wrong()


def test_language_identification(given, tmp_path):
    register_language_id("name", languages=["en", "de"], **given)
    assert {target for _, target in asked("name")} >= {"English", "German"}
    assert index_of("name", tmp_path).report.rejected == {"unknown_language": 24}
    register_language_id("code", answer="code", **given)
    assert {target for _, target in asked("code")} == set(LANGUAGES)
    register_language_id("german", prompt_language="de", **given)
    assert {"Englisch", "Deutsch", "Französisch", "Spanisch", "xx"} == {t for _, t in asked("german")}
    with pytest.raises(UserError, match="task 'w': answer is 'names'; did you mean 'name'"):
        register_language_id("w", answer="names", **given)
    with pytest.raises(UserError, match="prompt_language 'speech' tells the answer"):
        register_language_id("w", prompt_language="speech", **given)


def test_text_alone(write, task_vocabulary, tmp_path):
    manifest = write(audio=lambda i: None, duration=lambda i: None, english=lambda i: "a fox")
    given = {"manifests": {"train": manifest}, "vocabulary": task_vocabulary}
    register_text("ask", **given)
    assert asked("ask") == {("judge the fox", "quick")}
    register_text_translation("de", target_language="de", text="english", **given)
    assert all("a fox" in p and "German" in p and target == "der Fuchs" for p, target in asked("de"))
    register_text_translation("de_too", target_language="de", prompt_language="speech", **given)
    assert any("Deutsch" in prompt for prompt, _ in asked("de_too"))
    for name in ("ask", "de", "de_too"):
        table = index_of(name, tmp_path)
        assert len(table) == 40 and table.samples.max() == 0
        assert all(reference.audio is None for reference in table.references())
    with pytest.raises(
        UserError, match=r"task 'w': prompt template 'a {speech}' holds {speech}, expected text"
    ):
        register_text("w", templates=["a {speech}"], **given)


def test_registering_twice_and_in_another_way(given, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb")
    definitions = (
        functools.partial(register_asr, prompt_language="speech"),
        functools.partial(register_biasing, distractors=1, distractor_file=names),
        functools.partial(register_biasing, distractors=2, distractor_file=names),
        functools.partial(register_continuation, cut="cut", cut_words="cut_words"),
        functools.partial(register_ast, target_language="de"),
        functools.partial(register_ast, target_language="de", same_language="transcribe"),
        functools.partial(register_language_id, answer="code"),
    )
    for number, define in enumerate(definitions):
        assert define(f"t{number}", **given) == define(f"t{number}", **given)
        for other in definitions:
            if other is not define:
                with pytest.raises(UserError, match=f"the name 't{number}' is taken"):
                    other(f"t{number}", **given)
