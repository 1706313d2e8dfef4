"""Published checkpoints as files, made without the libraries that publish them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from slm_jax.checkpoints.families import whisper
from slm_jax.models.whisper import WhisperConfig

# A Whisper of 3 heads whose sizes all differ.
WHISPER = WhisperConfig(mel_bins=16, layers=3, dim=24, heads=3, mlp_dim=40, positions=20)


def tensors_of(family: Any, config: Any, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Returns random tensors by the names that transformers writes."""
    rng = np.random.default_rng(seed)
    return {
        piece.source: np.float32(scale) * rng.standard_normal(piece.layout.theirs).astype(np.float32)
        for piece in family.hf_pieces(config)
    }


def write_checkpoint(
    directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], shards: int = 1
) -> Path:
    """Writes `config.json` and the tensors into so many files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    places = {name: names[number % shards] for number, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def write_whisper(directory: Path, seed: int = 0, shards: int = 1) -> dict[str, np.ndarray]:
    """Writes a Whisper encoder; returns its tensors."""
    tensors = tensors_of(whisper.FAMILY, WHISPER, seed)
    write_checkpoint(directory, tensors, whisper.FAMILY.hf_config(WHISPER), shards)
    return tensors
