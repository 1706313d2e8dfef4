"""Which tensor of a published checkpoint is which parameter of ours, in both directions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How the values of their tensor lie in our parameter; a bijection.

    Their tensor is viewed with shape `split`, transposed by `order`, and viewed with shape `ours`.

    Attributes:
      theirs: shape of their tensor (after `Piece.select`).
      ours: shape of our parameter without the axis of stacked layers.
      split: shape in between; `theirs` where empty.
      order: permutation of the dims of `split`; none where empty.
    """

    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    split: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self):
        assert math.prod(self.theirs) == math.prod(self.ours) == math.prod(self._split), self
        assert sorted(self._order) == list(range(len(self._split))), self

    @property
    def _split(self) -> tuple[int, ...]:
        return self.split or self.theirs

    @property
    def _order(self) -> tuple[int, ...]:
        return self.order or tuple(range(len(self._split)))

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns their tensor, of shape `theirs`, as our parameter, of shape `ours`."""
        return tensor.reshape(self._split).transpose(self._order).reshape(self.ours)

    def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        transposed = tuple(self._split[dim] for dim in self._order)
        back = np.argsort(np.asarray(self._order, np.int64)) if self._order else ()
        return parameter.reshape(transposed).transpose(*back).reshape(self.theirs)


@dataclass(frozen=True)
class Piece:
    """One parameter, or one layer of a stacked one, and the tensor that holds its values.

    Attributes:
      parameter: path of our parameter, such as `encoder/encoder/attention/query/kernel`.
      source: name of their tensor.
      layout: where its values go.
      layer: index on axis 0 of a stacked parameter; None where the parameter is not stacked.
      select: (axis, index): the part of their tensor that is meant, where one of theirs holds many layers.
    """

    parameter: str
    source: str
    layout: Layout
    layer: int | None = None
    select: tuple[int, int] | None = None


def same(shape: Sequence[int]) -> Layout:
    """The same values in the same order: norms, biases, tables."""
    return Layout(tuple(shape), tuple(shape))


def transposed(inputs: Sequence[int], outputs: Sequence[int]) -> Layout:
    """A torch `Linear.weight`, [prod(outputs), prod(inputs)], as a kernel [*inputs, *outputs]."""
    outer, inner = math.prod(outputs), math.prod(inputs)
    return Layout((outer, inner), (*inputs, *outputs), (outer, inner), (1, 0))
