"""Scores a run's model on a split: on speech, on the true transcripts, and as a cascade."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm_jax.evaluation.evaluator import Evaluator, TaskResult
from slm_jax.evaluation.from_text import Transcriber, from_text, true_transcripts

if TYPE_CHECKING:
    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.references import Reference

# What a cascade asks for its transcript, unless it is told otherwise.
TRANSCRIBE_PROMPT = "Transcribe the speech: {speech}"


class Evaluation:
    """Scores variables on the examples of a split, which are read once; made by `Wiring.evaluation`.

    Args:
      wired: the run.
      mixture_or_task: registered SeqIO name.
      split: of it.
      num_examples: of each task; None for all.
    """

    def __init__(self, wired: Wiring, mixture_or_task: str, split: str, num_examples: int | None = None):
        self._wired, self._split = wired, split
        features = wired.task_or_mixture(mixture_or_task).output_features
        self._inputs = features["inputs"].vocabulary
        self._evaluator = Evaluator(mixture_or_task, split, self._to_reference, num_examples)
        # Task and id of an example -> tokens of its true transcript; filled as examples are read.
        self._transcripts: dict[tuple[str, str], Sequence[int]] = {}

    def __call__(
        self, variables: Mapping[str, Any], speech_as: str = "audio", prompt: str = TRANSCRIBE_PROMPT
    ) -> dict[str, TaskResult]:
        """Returns results by task.

        Args:
          variables: `params` and `frozen`.
          speech_as: `audio`; `transcript`, the text topline; or `hypothesis`, the cascade.
          prompt: what the cascade asks for its transcript.
        """
        rows = self._wired.run.evaluated().batch_size
        answer = functools.partial(self._wired.predict, variables, rows=rows)
        if speech_as == "audio":
            return self._evaluator(answer())
        room = self._transcript_room()
        if speech_as == "transcript":
            transcribe = true_transcripts(self._transcripts)
        else:
            transcribe = self._transcriber(answer(max_tokens=room), prompt)
        predict = answer(transcript_tokens=room)
        return self._evaluator(functools.partial(from_text, predict=predict, transcribe=transcribe))

    def references(self) -> Mapping[str, Sequence[Reference]]:
        """Returns the references of each task."""
        return self._evaluator.references()

    def _to_reference(self, example: Mapping[str, Any], task: str) -> Reference:
        import seqio

        from slm_jax.data.references import reference_of

        # Audio paths of a manifest are relative to it; other sources give whole ones.
        audio_root = getattr(seqio.TaskRegistry.get(task).source, "audio_root", lambda split: "")
        if isinstance(said := example.get("text"), bytes):
            self._transcripts[task, example["id"].decode()] = self._inputs.encode(said.decode())
        return reference_of(example, task, audio_root(self._split))

    def _transcript_room(self) -> int:
        """Returns the most tokens of a transcript: of the longest true one, or of an answer."""
        self.references()
        longest = max(map(len, self._transcripts.values()), default=0)
        return max(longest, self._wired.run.evaluated().max_tokens)

    def _transcriber(self, answer: Any, prompt: str) -> Transcriber:
        from slm_jax.data.preprocessors import prompt_tokens

        inputs, targets = (self._wired.vocabulary(name) for name in ("inputs", "targets"))
        return Transcriber(
            answer,
            prompt_tokens(inputs, prompt).tolist(),
            lambda tokens: inputs.encode(targets.decode(tokens)),
        )
