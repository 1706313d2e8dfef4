"""Tasks and mixtures of slm_jax as T5X can read them: every example says by itself where its speech lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import seqio

from slm_jax.data.host_tensorflow import Dataset, Tensor, tf
from slm_jax.errors import UserError, nearest
from slm_jax.t5x_partner.batches import REFERENCE_FIELDS, TEXT_FIELDS

SUFFIX = "_t5x"


def for_t5x(name: str, register: Sequence[Callable[[], object]] = ()) -> str:
    """Registers a task or mixture for `t5x.utils.DatasetConfig.mixture_or_task_name`; returns its name.

    A mixture of SeqIO hands on tokens alone, and a task's audio paths are relative to a folder that its
    examples do not name. So each task and mixture gets a twin, of the same name with `_t5x` behind it, whose
    examples hold `batches.REFERENCE_FIELDS`.

    Args:
      name: of a registered task or mixture.
      register: functions that register tasks, called first, in this order.

    Raises:
      UserError: nothing of that name is registered.
    """
    for each in register:
        each()
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise UserError(f"no task or mixture {name!r} is registered{nearest(name, known)}")
    found = seqio.get_mixture_or_task(name)
    if isinstance(found, seqio.Task):
        return _twin(found)
    twin = f"{name}{SUFFIX}"
    if twin not in seqio.MixtureRegistry.names():
        rates = [(_twin(task), found.get_rate(task)) for task in found.tasks]
        seqio.MixtureRegistry.add_provider(twin, SpeechMixture(twin, rates))
    return twin


class SpeechMixture(seqio.Mixture):
    """A mixture that hands on all of a reference, and not its tokens alone."""

    def get_dataset(self, *args: Any, **settings: Any) -> Dataset:
        """Returns what SeqIO's mixture does, with `batches.REFERENCE_FIELDS`."""
        return super().get_dataset(*args, passthrough_features=REFERENCE_FIELDS, **settings)


class WholePaths(seqio.DataSource):
    """A source whose audio paths are joined to the folder that they are relative to.

    Args:
      source: any source of a task of slm_jax.
    """

    def __init__(self, source: seqio.DataSource):
        super().__init__(splits=source.splits, caching_permitted=False)
        self._source = source

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """As the source's."""
        return self._source.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        """As the source's."""
        return self._source.list_shards(split)

    def get_dataset(self, split: str = "train", *args: Any, **settings: Any) -> Dataset:
        """Returns the source's dataset; arguments are SeqIO's."""
        dataset = self._source.get_dataset(split, *args, **settings)
        root = getattr(self._source, "audio_root", lambda _: "")(split).rstrip("/")
        if not root:
            return dataset

        def joined(example: dict[str, Tensor]) -> dict[str, Tensor]:
            audio = example["audio"]
            whole = (audio == "") | tf.strings.regex_full_match(audio, r"/.*|.*://.*")
            return {**example, "audio": tf.where(whole, audio, root + "/" + audio)}

        return dataset.map(joined, num_parallel_calls=tf.data.AUTOTUNE)


def _twin(task: seqio.Task) -> str:
    name = f"{task.name}{SUFFIX}"
    source: Any = WholePaths(task.source)
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[*task.preprocessors, _whole_reference(task.name)],
            output_features=task.output_features,
            postprocess_fn=task.postprocess_fn,
            metric_fns=task.metric_fns,
        )
    return name


def _whole_reference(task: str) -> Callable[[Dataset], Dataset]:
    """Returns a preprocessor that leaves `batches.REFERENCE_FIELDS`, empty where an example lacks one."""

    def of_example(example: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = tf.cast(example["inputs"], tf.int32)
        empty = dict.fromkeys(TEXT_FIELDS, "") | {
            "samples": tf.constant(0, tf.int32),
            "inputs_speech": tf.zeros_like(inputs, tf.bool),
        }
        targets = tf.cast(example["targets"], tf.int32)
        whole = empty | dict(example) | {"task": task, "inputs": inputs, "targets": targets}
        return {name: tf.convert_to_tensor(whole[name]) for name in REFERENCE_FIELDS}

    def whole_reference(dataset: Dataset) -> Dataset:
        return dataset.map(of_example, num_parallel_calls=tf.data.AUTOTUNE)

    return whole_reference
