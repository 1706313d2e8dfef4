"""Parameters written as T5X's trainer writes them by Orbax: `checkpoint_<step>/state`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


def write_t5x(folder: Path, params: Mapping[str, Any], step: int) -> None:
    """Writes a checkpoint of T5X with parameters and step, and without optimizer state.

    T5X restores it with `assignment_map = ((r'^state.*$', None),)` and `fallback_to_scratch = True`.

    Args:
      folder: the checkpoint's own, which exists.
      params: the parameters as T5X's model names them, of NumPy arrays.
      step: after which they were saved.

    Raises:
      OSError, ValueError: it cannot be written.
    """
    state = {"state": {"step": np.int32(step)}, "target": params}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(state))
