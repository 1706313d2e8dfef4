"""Evaluation of a registered task end to end, with the model's side played by a dictionary."""

import functools
import json
from typing import Any

import numpy as np
import pytest
import sacrebleu
import sentencepiece
import seqio

from slm_jax.data.host_tensorflow import tf
from slm_jax.data.references import SPEECH, Reference
from slm_jax.errors import BadExample, UserError
from slm_jax.evaluation import metrics
from slm_jax.evaluation.evaluator import Evaluator, write_results
from slm_jax.evaluation.predictor import Prediction, Rejected

TEXTS = ["The train leaves at nine.", "Two coffees", "where is platform seven", "Good evening", "a b c d"]
PROMPT = "say what you hear"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> seqio.SentencePieceVocabulary:
    folder = tmp_path_factory.mktemp("vocabulary")
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter([*TEXTS, PROMPT] * 20), model_prefix=str(folder / "pieces"), vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    return seqio.SentencePieceVocabulary(str(folder / "pieces.model"))


def register(name: str, vocabulary: seqio.Vocabulary, metric_fns, texts=tuple(TEXTS), **kwargs) -> str:
    # An empty split is the first of one text, so that its features still have their types.
    said = texts or ("none",)
    columns: Any = {
        "id": [f"{name}-{n}" for n in range(len(said))],
        "audio": [f"{n}.wav" for n in range(len(said))],
        "inputs": [[SPEECH, *vocabulary.encode(PROMPT)]] * len(said),
        "targets": tf.ragged.constant([[*vocabulary.encode(text), 1] for text in said], tf.int32),
        "targets_pretokenized": list(said),
    }

    def examples(split: str, shuffle_files: bool = False, seed: int | None = None):
        return tf.data.Dataset.from_tensor_slices(columns).take(len(texts))

    feature = seqio.Feature(vocabulary, add_eos=True)
    source: Any = seqio.FunctionDataSource(examples, splits=("validation",))
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[as_int32],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=metric_fns,
        **kwargs,
    )
    return name


def as_int32(dataset: Any) -> Any:
    return dataset.map(lambda example: {**example, "inputs": tf.cast(example["inputs"], tf.int32)})


def to_reference(example, task: str) -> Reference:
    if example["id"].endswith(b"-3"):
        raise BadExample("empty_target", "no text")
    return Reference(
        example["id"].decode(),
        example["audio"].decode(),
        16000,
        example["inputs"],
        example["targets"],
        task,
        "en",
    )


def answering(vocabulary: seqio.Vocabulary, answers: dict[int, str]):
    """A predictor that says `answers` by number, and cannot load the audio of example 1."""

    def predict(references):
        predictions = []
        for reference in references:
            number = int(reference.id.rsplit("-", 1)[1])
            if number == 1:
                predictions.append(Prediction([], Rejected("unreadable_audio", "1.wav: noise")))
            else:
                predictions.append(Prediction(list(vocabulary.encode(answers[number]))))
        return predictions

    return predict


ANSWERS = {0: "the train leaves at", 2: "where is platform seven", 4: "a b c d"}
SAID = ["the train leaves at", "", "where is platform seven", "", "a b c d"]


@pytest.fixture(scope="module")
def mixture(vocabulary) -> str:
    english = functools.partial(metrics.wer, language="en")
    register("eval_asr", vocabulary, [english, metrics.cer])
    register("eval_ast", vocabulary, [metrics.bleu, metrics.chrf], TEXTS[:3],
             postprocess_fn=lambda text, **_: text.upper())  # fmt: skip
    seqio.MixtureRegistry.add("eval_mixture", ["eval_asr", "eval_ast"], default_rate=1)
    return "eval_mixture"


def test_scores_and_hypotheses_of_every_task(mixture, vocabulary, tmp_path):
    results = Evaluator(mixture, "validation", to_reference)(answering(vocabulary, ANSWERS))
    assert list(results) == ["eval_asr", "eval_ast"]
    asr, ast = results["eval_asr"], results["eval_ast"]
    assert asr.metrics == {**metrics.wer(TEXTS, SAID, language="en"), **metrics.cer(TEXTS, SAID)}
    assert 0 < asr.metrics["wer"] < 100
    loud = [[text.upper() for text in texts[:3]] for texts in (TEXTS, SAID)]
    assert ast.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(loud[1], [loud[0]]).score)
    assert [line.prediction for line in ast.hypotheses] == loud[1]
    assert asr.rejects == {"empty_target": 1, "unreadable_audio": 1}
    assert asr.declarations["wer"].endswith("language en")
    assert "version:" in ast.declarations["bleu"]

    write_results(results, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "hypotheses/eval_asr.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == TEXTS
    assert [line["prediction"] for line in lines] == SAID
    assert lines[0] == {
        "id": "eval_asr-0", "target": TEXTS[0], "prediction": SAID[0], "audio": "0.wav", "prompt": PROMPT,
    }  # fmt: skip
    assert lines[1]["reject_reason"] == "unreadable_audio" and lines[1]["reject_detail"] == "1.wav: noise"
    assert lines[3]["reject_reason"] == "empty_target"
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["eval_asr"]["metrics"] == asr.metrics
    assert written["eval_asr"]["examples"] == 5
    assert written["eval_asr"]["rejects"] == asr.rejects
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypotheses", "metrics.json"]


def test_an_evaluator_scores_again_and_only_as_many_examples_as_asked(mixture, vocabulary):
    evaluator = Evaluator(mixture, "validation", to_reference, num_examples=3)
    worse = evaluator(answering(vocabulary, {**ANSWERS, 2: "seven"}))
    better = evaluator(answering(vocabulary, ANSWERS))
    assert len(better["eval_asr"].hypotheses) == 3
    assert better["eval_asr"].metrics == {
        **metrics.wer(TEXTS[:3], SAID[:3]), **metrics.cer(TEXTS[:3], SAID[:3])
    }  # fmt: skip
    assert worse["eval_asr"].metrics["wer"] > better["eval_asr"].metrics["wer"]


def test_the_converter_neither_trims_nor_pads(vocabulary):
    long = " ".join(TEXTS * 40)
    name = register("eval_long", vocabulary, [metrics.exact_match], [long, "Two coffees"])
    seen = []

    def predict(references):
        seen.extend(references)
        return [Prediction(reference.targets[:-1].tolist()) for reference in references]

    result = Evaluator(name, "validation", to_reference)(predict)[name]
    assert [len(reference.targets) for reference in seen] == [
        len(vocabulary.encode(text)) + 1 for text in (long, "Two coffees")
    ]
    assert result.metrics == {"exact_match": 100.0}
    assert [line.prediction for line in result.hypotheses] == [long, "Two coffees"]


def test_mistakes_are_told_in_one_sentence(mixture, vocabulary, tmp_path):
    with pytest.raises(UserError, match="no task or mixture 'eval_mixtur'; did you mean 'eval_mixture'"):
        Evaluator("eval_mixtur", "validation", to_reference)
    with pytest.raises(UserError, match="split: no task of 'eval_mixture' has a split 'valid'; did you mean"):
        Evaluator(mixture, "valid", to_reference)
    with pytest.raises(UserError, match="no task of 'eval_mute' declares metric_fns"):
        Evaluator(register("eval_mute", vocabulary, []), "validation", to_reference)
    with pytest.raises(UserError, match="task 'eval_void' has no examples in split 'validation'"):
        Evaluator(register("eval_void", vocabulary, [metrics.wer], []), "validation", to_reference)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot write results \(Not a directory\)"):
        write_results({}, tmp_path / "file")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_results({}, tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slm_jax.storage.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_results({}, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypotheses", "metrics.json"]


def test_a_task_without_metrics_is_named_and_left_to_training(vocabulary, caplog):
    register("eval_scored", vocabulary, [metrics.exact_match], ["Two coffees"])
    register("eval_silent", vocabulary, [])
    seqio.MixtureRegistry.add("eval_half", ["eval_scored", "eval_silent"], default_rate=1)
    results = Evaluator("eval_half", "validation", to_reference)(
        lambda asked: [Prediction([]) for _ in asked]
    )
    assert list(results) == ["eval_scored"]
    assert "task eval_silent declares no metric_fns and is not scored" in caplog.text


def test_predictions_of_ragged_length_come_back_whole(vocabulary, rng):
    texts = [" ".join(rng.choice(TEXTS, rng.integers(1, 4))) for _ in range(6)]
    name = register(f"eval_ragged_{rng.integers(1 << 30)}", vocabulary, [metrics.exact_match], texts)

    def predict(references):
        return [Prediction(np.trim_zeros(reference.targets)[:-1].tolist()) for reference in references]

    def keep_all(example, task):
        return to_reference({**example, "id": example["id"] + b"x"}, task)

    result = Evaluator(name, "validation", keep_all)(predict)[name]
    assert result.metrics == {"exact_match": 100.0} and result.rejects == {}
