"""What a reader of a checkpoint offers to the conversion."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorSource(Protocol):
    """A checkpoint opened for reading.

    Attributes:
      where: the checkpoint, for messages.
      config: its `config.json`, or what stands for it; plain values.
      tensors: shape and dtype by name. Nothing has been read of their values.
      notes: what a user should know of what was opened.
    """

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns the tensor `name`, or what `tensor[index]` is, reading no more of the file than that.

        Raises:
          UserError: the values cannot be read; the file and the tensor are named.
        """
        ...
