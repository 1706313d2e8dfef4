"""Topline and cascade: the speech gives way to its transcript, and nothing else of the question changes."""

import numpy as np

from slm_jax.data.references import SPEECH, Reference, in_text
from slm_jax.evaluation.from_text import Transcriber, from_text, true_transcripts
from slm_jax.evaluation.predictor import Prediction, Rejected


def reference(number: int, inputs: list[int], audio: str | None = "a.wav", task: str = "task") -> Reference:
    samples = 100 if audio else 0
    return Reference(
        str(number), audio, samples, np.array(inputs, np.int32), np.zeros(0, np.int32), task, "en"
    )


def echo(references) -> list[Prediction]:
    """Repeats its input, and knows no speech."""
    for asked in references:
        assert asked.audio is None and asked.samples == 0 and SPEECH not in asked.inputs
    return [Prediction(asked.inputs.tolist()) for asked in references]


def test_the_transcript_stands_where_the_speech_stood(rng):
    said = rng.integers(2, 50, rng.integers(0, 9)).tolist()
    for at in range(3):
        inputs = [7, 8]
        inputs.insert(at, SPEECH)
        found = in_text(reference(0, inputs), said)
        assert found.inputs.tolist() == [7, 8][:at] + said + [7, 8][at:]
        assert found.inputs.tolist()[found.said[0] :][: found.said[1]] == said
    text = reference(0, [7, 8], None)
    assert in_text(text, said) is text


def test_the_topline_asks_about_the_true_transcript():
    transcribe = true_transcripts({("task", "1"): [5, 6], ("other", "1"): [9], ("task", "2"): []})
    asked = [reference(1, [7, SPEECH]), reference(1, [SPEECH, 8], task="other"), reference(2, [SPEECH])]
    found = from_text(asked, predict=echo, transcribe=transcribe)
    assert [answer.tokens for answer in found] == [[7, 5, 6], [9, 8], []]
    text = reference(3, [7, 8], None)
    assert from_text([text], predict=echo, transcribe=transcribe) == [Prediction([7, 8])]
    assert found[2].rejected and found[2].rejected.reason == "missing_text"


def test_the_cascade_transcribes_each_file_once_and_keeps_rejects():
    heard = []

    def hear(references) -> list[Prediction]:
        heard.extend((asked.audio, asked.inputs.tolist()) for asked in references)
        return [
            Prediction([], Rejected("too_long", "5 s")) if asked.audio == "b.wav" else Prediction([3, 4])
            for asked in references
        ]

    transcribe = Transcriber(hear, [2, SPEECH, 1], lambda tokens: [token + 10 for token in tokens])
    asked = [reference(n, [n, SPEECH], audio) for n, audio in enumerate(["a.wav", "b.wav", "a.wav"])]
    for _ in range(2):
        found = from_text(asked, predict=echo, transcribe=transcribe)
        assert [answer.tokens for answer in found] == [[0, 13, 14], [], [2, 13, 14]]
        assert found[1].rejected == Rejected("too_long", "5 s")
    assert heard == [("a.wav", [2, SPEECH, 1]), ("b.wav", [2, SPEECH, 1])]
