"""SeqIO examples become the rows of an SLM's batch, by the collation that slm_jax itself trains with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio

from slm_jax.data.audio_files import load_utterance
from slm_jax.data.batch import BatchShape, Placed, Reject, collate
from slm_jax.data.host_tensorflow import Dataset, Tensor, tf
from slm_jax.data.references import Reference, reference_of
from slm_jax.errors import BadExample, UserError

logger = logging.getLogger(__name__)

# What of an example says where its speech lies and what is asked; `tasks.for_t5x` leaves these and no others.
TEXT_FIELDS = ("id", "task", "audio", "part", "language", "reject")
REFERENCE_FIELDS = (*TEXT_FIELDS, "samples", "inputs", "inputs_speech", "targets")
_FIRST_COUNT = 100


class SpeechFeatureConverter(seqio.FeatureConverter):
    """Reads the speech of each example and lays it out as a row of the batch of docs/architecture.md.

    An example that cannot be used (it does not fit, or its audio cannot be read) leaves its row empty:
    nothing of it is learned, and what is answered to it counts as wrong. It is logged with its id.

    Args:
      pack: must be False.
      use_custom_packing_ops: as SeqIO has it; without meaning here.
      feature_lengths: `speech` in samples at 16 kHz, and `inputs`, `targets`, `layout` where a dataset does
        not say them itself.
      samples_per_position: samples behind one speech position.
      max_bad_share: reading stops when more than this share of the examples cannot be used, of at least 100.
      load: returns the samples of a reference, int16 [n] at 16 kHz, or raises BadExample.

    Raises:
      UserError: `pack` is True.
    """

    TASK_FEATURES: Any = {  # noqa: RUF012
        "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }
    MODEL_FEATURES: Any = {}  # noqa: RUF012
    PACKING_FEATURE_DTYPES: Any = {}  # noqa: RUF012

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        *,
        feature_lengths: Mapping[str, int],
        samples_per_position: int,
        max_bad_share: float = 0.05,
        load: Callable[[Reference], np.ndarray] = lambda reference: load_utterance(reference).samples,
    ):
        if pack:
            raise UserError(
                "DatasetConfig.pack is True, expected False: SeqIO's packing knows no speech; slm_jax's own "
                "training packs"
            )
        super().__init__(pack=False, use_custom_packing_ops=use_custom_packing_ops)
        self._lengths = dict(feature_lengths)
        self._samples_per_position = samples_per_position
        self._load = load
        self._bad = BadShare(max_bad_share)

    def __call__(self, ds: Dataset, task_feature_lengths: Mapping[str, int]) -> Dataset:
        """Returns a dataset of rows.

        SeqIO's own `__call__` holds lengths against features one by one; here `speech` has a length and no
        feature, and a row has features that no length belongs to.

        Args:
          ds: of a task or mixture of `tasks.for_t5x`.
          task_feature_lengths: sizes of a row; what they lack is the converter's own.

        Raises:
          UserError: a length is unknown, missing or not positive, or the dataset is of another sort of task.
        """
        given = {name: length for name, length in task_feature_lengths.items() if length is not None}
        shape = BatchShape.from_feature_lengths(
            {**self._lengths, **given}, rows=1, samples_per_position=self._samples_per_position
        )
        lacking = [name for name in REFERENCE_FIELDS if name not in ds.element_spec]
        if lacking:
            raise UserError(
                f"the dataset's examples have no {', '.join(lacking)}; expected a task or mixture of "
                "slm_jax.t5x_partner.tasks.for_t5x"
            )
        arrays = {name: (size[1:], dtype) for name, (size, dtype) in shape.arrays().items()}

        def of_example(example: dict[str, Tensor]) -> dict[str, Tensor]:
            def row(*values: Any) -> list[np.ndarray]:
                return list(self._row(dict(zip(REFERENCE_FIELDS, values, strict=True)), shape).values())

            values = tf.numpy_function(
                row,
                [example[name] for name in REFERENCE_FIELDS],
                [tf.as_dtype(dtype) for _, dtype in arrays.values()],
                # An iterator with state of its own could not be saved beside a checkpoint.
                stateful=False,
            )
            return {
                name: tf.ensure_shape(value, size)
                for (name, (size, _)), value in zip(arrays.items(), values, strict=True)
            }

        return ds.map(of_example, num_parallel_calls=tf.data.AUTOTUNE)

    def _row(self, example: Mapping[str, Any], shape: BatchShape) -> dict[str, np.ndarray]:
        rejects: list[Reject] = []
        row: list[Placed] = []
        id_ = f"{example['task'].decode()}/{example['id'].decode()}"
        try:
            reference = reference_of(example, example["task"].decode())
            if bad := shape.misfit(reference):
                raise bad
            row.append(Placed(reference))
        except BadExample as bad:
            self._bad.add(id_, f"{bad.reason}: {bad.detail}")
        arrays = collate([row], shape, self._load, rejects)
        for reject in rejects:
            self._bad.add(id_, f"{reject.reason}: {reject.detail}")
        self._bad.seen()
        return {name: array[0] for name, array in arrays.items()}

    def _convert_features(self, ds: Dataset, task_feature_lengths: Mapping[str, int]) -> Dataset:
        return self(ds, task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Lengths by features of the model: there are none, see `__call__`."""
        return {}


def array_dtypes() -> dict[str, np.dtype]:
    """Returns the dtype of every array that a batch may have, by name."""
    lengths = {"inputs": 1, "targets": 1}
    shapes = [
        BatchShape.from_feature_lengths({**lengths, "speech": speech}, rows=1, samples_per_position=1)
        for speech in (0, 1)
    ]
    return {name: dtype for shape in shapes for name, (_, dtype) in shape.arrays().items()}


class BadShare:
    """Counts examples that cannot be used, from many threads, and stops where there are too many.

    Args:
      most: largest share of bad ones.
    """

    def __init__(self, most: float):
        self._most = most
        self._lock = threading.Lock()
        self._count = self._bad = 0

    def add(self, id_: str, reason: str) -> None:
        """Logs an example that cannot be used."""
        logger.warning("example %s cannot be used, its row stays empty: %s", id_, reason)
        with self._lock:
            self._bad += 1

    def seen(self) -> None:
        """Counts an example; raises UserError where too many of them were bad."""
        with self._lock:
            self._count += 1
            bad, count = self._bad, self._count
        if count >= _FIRST_COUNT and bad > self._most * count:
            raise UserError(
                f"{bad} of {count} examples cannot be used, expected a share of at most {self._most:g} "
                "(SLMModel.max_bad_share); the log names each"
            )
