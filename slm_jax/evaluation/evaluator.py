"""Scores per task through SeqIO's evaluator, and every hypothesis as a line of JSON.

SeqIO decides which examples a task has, how texts are postprocessed and which metrics count; the model
side is handed in as one callable from references to predictions. SeqIO and TensorFlow load on first use.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from slm_jax import storage
from slm_jax.errors import BadExample, UserError, nearest
from slm_jax.evaluation.metrics import MetricFn, declaration
from slm_jax.evaluation.predictor import Prediction, Rejected

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    from slm_jax.data.references import Reference

    Predict = Callable[[Sequence[Reference]], Sequence[Prediction]]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One line of a hypotheses file.

    Attributes:
      id: of the example.
      target: reference text, postprocessed as the task says.
      prediction: the model's text, postprocessed likewise; empty where the example was rejected.
      audio: path of the audio, or None for a text-only example.
      prompt: text input of the model.
      reject_reason: reason code where the model was not asked, or None.
      reject_detail: what was found, or None.
    """

    id: str
    target: str
    prediction: str
    audio: str | None
    prompt: str
    reject_reason: str | None = None
    reject_detail: str | None = None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Scores and hypotheses of one task.

    Attributes:
      metrics: name -> value, in percent where the name is one of `evaluation.metrics`.
      declarations: metric function -> what its value depends on: normaliser or sacrebleu signature.
      hypotheses: one for each example, in the task's order.
    """

    metrics: dict[str, float]
    declarations: dict[str, str]
    hypotheses: tuple[Hypothesis, ...]

    @property
    def rejects(self) -> dict[str, int]:
        """Examples that got an empty hypothesis because they are bad, by reason code."""
        reasons = (line.reject_reason for line in self.hypotheses if line.reject_reason is not None)
        return dict(sorted(collections.Counter(reasons).items()))


logger = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """An example, its reference or why it has none, and what the model answered."""

    example: Mapping[str, Any]
    reference: "Reference | None"
    prediction: Prediction


class Evaluator:
    """Scores predictors on one split of a task or mixture; the examples are read once.

    Args:
      mixture_or_task: registered SeqIO name.
      split: such as `validation`.
      to_reference: makes the reference of a SeqIO example (feature name -> NumPy value) of a named task;
        where it raises BadExample the hypothesis is empty and the reason is kept.
      num_examples: only so many examples of each task, from its start; all by default.

    Raises:
      UserError: an unknown name, a split that no task has, no task with metrics, or a task without examples.
    """

    def __init__(
        self,
        mixture_or_task: str,
        split: str,
        to_reference: "Callable[[Mapping[str, Any], str], Reference]",
        num_examples: int | None = None,
    ):
        # First, so that TensorFlow never sees an accelerator.
        import slm_jax.data.host_tensorflow  # noqa: F401, I001
        import seqio

        _check_names(mixture_or_task, split)
        self._to_reference = to_reference
        self._evaluator = seqio.Evaluator(
            mixture_or_task,
            feature_converter=_reference_converter(),
            eval_split=split,
            num_examples=num_examples,
            # Metrics in another thread would outlive a run that is stopped.
            async_compute_metrics=False,
        )
        for name, examples in self._evaluator.cached_task_datasets.items():
            if not int(examples.cardinality()):
                raise UserError(f"task {name!r} has no examples in split {split!r}, expected at least one")

    def __call__(self, predict: "Predict") -> dict[str, TaskResult]:
        """Returns the result of every task, by name."""
        asked: dict[str, list[_Asked]] = {}
        # SeqIO tells a predict function the dataset but not the task, and asks task by task in this order.
        tasks = iter(self._evaluator.eval_tasks)

        def predict_fn(
            dataset: "tf.data.Dataset", model_feature_shapes: Mapping[str, int] | None = None
        ) -> list[tuple[int, list[int]]]:
            del model_feature_shapes  # references have no shape of their own
            name = next(tasks).name
            asked[name] = self._ask([example for _, example in dataset.as_numpy_iterator()], name, predict)
            return list(enumerate(_padded([answer.prediction.tokens for answer in asked[name]])))

        metrics, _ = self._evaluator.evaluate(compute_metrics=True, predict_fn=predict_fn)
        return {
            task.name: TaskResult(
                metrics={name: float(value) for name, value in metrics.result()[task.name].items()},
                declarations=_declarations(task),
                hypotheses=tuple(_hypothesis(task, answer) for answer in asked[task.name]),
            )
            for task in self._evaluator.eval_tasks
        }

    def references(self) -> "dict[str, list[Reference]]":
        """Returns the references of all examples that are good, by task, without asking any model."""
        found: dict[str, list[Reference]] = {}
        for task in self._evaluator.eval_tasks:
            examples = list(self._evaluator.cached_task_datasets[task.name].as_numpy_iterator())
            found[task.name] = []
            for example in examples:
                with contextlib.suppress(BadExample):
                    found[task.name].append(self._to_reference(example, task.name))
        return found

    def _ask(self, examples: Sequence[Mapping[str, Any]], task: str, predict: "Predict") -> list[_Asked]:
        references: list[Reference | None] = []
        rejects: dict[int, Rejected] = {}
        for position, example in enumerate(examples):
            try:
                references.append(self._to_reference(example, task))
            except BadExample as bad:
                references.append(None)
                rejects[position] = Rejected(bad.reason, bad.detail)
        predictions = iter(predict([reference for reference in references if reference is not None]))
        return [
            _Asked(
                example,
                reference,
                Prediction([], rejects[position]) if reference is None else next(predictions),
            )
            for position, (example, reference) in enumerate(zip(examples, references, strict=True))
        ]


def write_results(results: Mapping[str, TaskResult], directory: Path) -> None:
    """Writes `metrics.json` and `hypotheses/TASK.jsonl`, each replaced as a whole or not at all.

    Raises:
      UserError: the directory cannot be written.
    """
    summary = {
        name: {
            "metrics": result.metrics,
            "declarations": result.declarations,
            "examples": len(result.hypotheses),
            "rejects": result.rejects,
        }
        for name, result in results.items()
    }
    try:
        storage.make_folder(directory / "hypotheses")
        for name, result in results.items():
            lines = "".join(_json_line(line) for line in result.hypotheses)
            replace_text(directory / "hypotheses" / f"{name}.jsonl", lines)
        replace_text(directory / "metrics.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{error.filename or directory}: cannot write results ({error.strerror or error}), "
            "expected a writable folder with room"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside `path`, then puts it in its place, so that no reader sees half of it."""
    storage.write(path, text)


def _json_line(line: Hypothesis) -> str:
    fields = dataclasses.asdict(line)
    if line.reject_reason is None:
        del fields["reject_reason"], fields["reject_detail"]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _hypothesis(task: "seqio.Task", asked: _Asked) -> Hypothesis:
    example, reference, prediction = asked
    inputs, targets = task.output_features["inputs"], task.output_features["targets"]
    target = example.get("targets_pretokenized")
    target = targets.vocabulary.decode(example["targets"].tolist()) if target is None else target.decode()
    said = targets.vocabulary.decode(prediction.tokens)
    prompt = example.get("inputs_pretokenized")
    if prompt is None:
        # Negative ids stand for speech.
        prompt = inputs.vocabulary.decode([token for token in example["inputs"].tolist() if token >= 0])
    else:
        prompt = prompt.decode()
    audio = example.get("audio", b"").decode() if reference is None else reference.audio
    rejected = prediction.rejected
    return Hypothesis(
        id=example["id"].decode(),
        target=str(task.postprocess_fn(target, example=example, is_target=True)),
        prediction=str(task.postprocess_fn(said, example=example, is_target=False)),
        audio=audio or None,
        prompt=prompt,
        reject_reason=None if rejected is None else rejected.reason,
        reject_detail=None if rejected is None else rejected.detail,
    )


def _reference_converter() -> "seqio.FeatureConverter":
    import seqio

    class ReferenceConverter(seqio.FeatureConverter):
        """Hands the features of a task on as they are: no padding, no trimming, no check of lengths."""

        TASK_FEATURES: ClassVar = {}
        MODEL_FEATURES: ClassVar = {}
        PACKING_FEATURE_DTYPES: ClassVar = {}

        def __call__(self, ds: "tf.data.Dataset", task_feature_lengths: Mapping[str, int]):
            return self._convert_features(ds, task_feature_lengths)

        def _convert_features(self, ds: "tf.data.Dataset", task_feature_lengths: Mapping[str, int]):
            return ds

        def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]):
            return task_feature_lengths

    return ReferenceConverter(pack=False)


def _check_names(mixture_or_task: str, split: str) -> None:
    import seqio

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if mixture_or_task not in known:
        raise UserError(
            f"MIXTURE_OR_TASK_NAME: no task or mixture {mixture_or_task!r}{nearest(mixture_or_task, known)}"
        )
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(mixture_or_task))
    splits = {name for task in tasks for name in task.splits}
    if split not in splits:
        raise UserError(
            f"split: no task of {mixture_or_task!r} has a split {split!r}{nearest(split, splits)}"
        )
    silent = [task.name for task in tasks if split in task.splits and not task.metric_fns]
    if len(silent) == sum(split in task.splits for task in tasks):
        raise UserError(
            f"no task of {mixture_or_task!r} declares metric_fns, expected one that can be scored"
        )
    for name in silent:
        logger.warning("task %s declares no metric_fns and is not scored", name)


def _padded(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ends each list by EOS and pads all to one length: SeqIO wants a matrix, and cuts at EOS."""
    longest = max(map(len, tokens), default=0) + 1
    return [[*ids, 1, *[0] * (longest - len(ids) - 1)] for ids in tokens]


def _declarations(task: "seqio.Task") -> dict[str, str]:
    declared = {}
    for metric_fn in task.metric_fns:
        plain: Any = metric_fn
        while isinstance(plain, functools.partial):
            plain = plain.func
        declared[getattr(plain, "__name__", repr(plain))] = declaration(cast(MetricFn, metric_fn))
    return declared
