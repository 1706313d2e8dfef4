"""What a family of published models tells the conversion."""

from collections.abc import Mapping
from typing import Any, Protocol

from slm_jax.checkpoints.families.mapping import Piece
from slm_jax.checkpoints.sources.base import TensorInfo

Tensors = Mapping[str, TensorInfo]


class Family(Protocol):
    """One sort of published model, as a value of a module below this folder, named FAMILY.

    Attributes:
      kind: of the foundation checkpoint, such as `t5` or `conformer`: one per network of `models/`.
      model_types: values of `model_type` in `config.json` that are this family.
    """

    @property
    def kind(self) -> str: ...

    @property
    def model_types(self) -> tuple[str, ...]: ...

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> Any:
        """Returns our configuration, a dataclass of `models/`, for their `config.json`.

        Raises:
          UserError: a field is missing, of the wrong type, or of a value that our network does not compute;
            the message names the field, what was found and what was expected.
        """
        ...

    def pieces(self, config: Any, tensors: Tensors) -> list[Piece]:
        """Returns where every parameter comes from. It needs the tensors' names to find a prefix only.

        Whether each named tensor exists with the shape stated is for the conversion to check.
        """
        ...

    def unused(self, name: str) -> str | None:
        """Returns why a tensor is deliberately left out, such as `the decoder`; None if it must be used."""
        ...

    def copies(self, config: Any, tensors: Tensors) -> list[tuple[str, str]]:
        """Returns pairs of names, one left out and one used, whose tensors have to hold the same values."""
        ...

    def hf_config(self, config: Any) -> dict[str, Any]:
        """Returns a `config.json` with which transformers computes what our network does."""
        ...

    def hf_pieces(self, config: Any) -> list[Piece]:
        """Returns the tensors to write for transformers: the pieces whose names are the bare model's."""
        ...
