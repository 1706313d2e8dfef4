"""Where index tables, lengths of audio files and compiled programs are kept."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Returns the folder of `SLM_CACHE_DIR`, or `slm_jax` in the user's cache folder."""
    if folder := os.environ.get("SLM_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax"
