"""What the families whose network is the Conformer share: our configuration, there and back."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from slm_jax.errors import UserError
from slm_jax.models.conformer import ConformerConfig

KIND = "conformer"

# What changes how the network is run and not what it computes, and the features before it, of which
# `config.json` knows the number alone.
_OF_THE_RUN = ("dropout", "dtype", "remat", "scan_unroll", "attention_kernel", "log_mel", "kaldi_fbank")


def configured(**fields: Any) -> ConformerConfig:
    """Returns the configuration with these fields, refusals of which name `config.json`."""
    try:
        return ConformerConfig(**fields)
    except UserError as error:
        raise UserError(f"config.json gives sizes that do not fit: {error}") from error


def check_written(config: ConformerConfig, read_back: ConformerConfig, inert: Iterable[str]) -> None:
    """Refuses a configuration that is not computed by what was written for it.

    Args:
      config: what is to be written.
      read_back: what would be read of it.
      inert: fields that this family's network does not look at.

    Raises:
      UserError: a field differs.
    """
    for field in dataclasses.fields(config):
        found, expected = getattr(config, field.name), getattr(read_back, field.name)
        if found != expected and field.name not in (*_OF_THE_RUN, *inert):
            raise UserError(
                f"ConformerConfig.{field.name} is {found!r}, expected {expected!r}: "
                "transformers' model of this family computes nothing else"
            )
