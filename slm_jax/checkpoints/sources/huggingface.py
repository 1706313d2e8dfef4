"""Directories as transformers saves them: `config.json` and one or many `.safetensors` files."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from slm_jax.checkpoints.directories import first_line
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.errors import UserError

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Far above any config.json or index; what is larger is something else under that name.
_MAX_JSON_BYTES = 64 << 20
# Where the file of a processor, which transformers 5 writes for models with a tokenizer, has the fields of
# the feature extractor, and where `HuggingFaceSource.config` has them.
EXTRACTOR = "feature_extractor"
# What says nothing of the features: names of classes, and tables that follow from the other fields.
_NO_FIELDS = ("auto_map", "feature_extractor_type", "processor_class", "mel_filters", "window")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# How a file begins that git-lfs has not fetched.
_POINTER = b"version https://git-lfs"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class HuggingFaceSource:
    """A `TensorSource` over a directory of transformers; nothing in it is ever unpickled.

    Its `config` is what `config.json` holds and, under `feature_extractor`, what the feature extractor's own
    file says, where there is one.

    Args:
      directory: holds `config.json` and `model.safetensors`, or the index `model.safetensors.index.json`
        with the files that it names.

    Raises:
      UserError: a file is missing, cut off or damaged, or the weights are pickles.
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self.where = str(directory)
        self.notes: tuple[str, ...] = ()
        if not self._directory.is_dir():
            raise UserError(
                f"{directory} is no directory; expected a downloaded checkpoint: one with {CONFIG_FILE} and "
                "safetensors, or T5X's checkpoint_<step>"
            )
        config = read_json(self._directory / CONFIG_FILE)
        if extractor := self._extractor():
            config[EXTRACTOR] = extractor
        self._files = self._find_files()
        self.config: Mapping[str, Any] = config
        self.tensors: dict[str, TensorInfo] = {}
        for file in dict.fromkeys(self._files.values()):
            expected = {name for name, place in self._files.items() if place == file}
            self.tensors |= _infos(self._directory / file, expected)

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns the tensor, or the part of it at `index`; see `TensorSource`."""
        # Opened for each tensor: the pages of a file that stays open would count as this process's memory.
        with _opened(self._directory / self._files[name]) as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)

    def _extractor(self) -> dict[str, Any]:
        """The feature extractor's fields, from its own file or that of a processor; both may be there."""
        preprocessor, processor = self._directory / PREPROCESSOR_FILE, self._directory / PROCESSOR_FILE
        own = read_json(preprocessor) if preprocessor.is_file() else {}
        inner = read_json(processor).get(EXTRACTOR, {}) if processor.is_file() else {}
        if not isinstance(inner, dict):
            raise UserError(f"{processor} has {EXTRACTOR} {inner!r}, expected an object")
        for name in sorted(own.keys() & inner.keys() - set(_NO_FIELDS)):
            if own[name] != inner[name]:
                raise UserError(
                    f"{preprocessor} has {name} {own[name]!r} and {processor} has {inner[name]!r} in its "
                    f"{EXTRACTOR}, expected the same in both or one file alone"
                )
        return {name: value for name, value in (own | inner).items() if name not in _NO_FIELDS}

    def _find_files(self) -> dict[str, str]:
        """Returns the file that holds each tensor, by the tensor's name."""
        folder = self._directory
        # As transformers does: an index beside the whole file is left from another save.
        if (folder / WEIGHTS_FILE).is_file():
            return dict.fromkeys(_names(folder / WEIGHTS_FILE), WEIGHTS_FILE)
        if (folder / INDEX_FILE).is_file():
            return self._indexed()
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0]}, which is not read because unpickling a file runs "
                "whatever is in it; save them as safetensors where the model is trusted, with transformers: "
                "AutoModelForSeq2SeqLM.from_pretrained(DIR).save_pretrained(NEW_DIR); AutoModel of an encoder"
            )
        raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")

    def _indexed(self) -> dict[str, str]:
        path = self._directory / INDEX_FILE
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise UserError(
                f"{path} is damaged: expected an object weight_map of tensor names and file names"
            )
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{path}: weight_map[{name!r}] is {file!r}, expected a file name beside it")
            if not os.path.isfile(self._directory / file):  # noqa: PTH113, False also for a name too long
                raise UserError(f"{path} names {file}, and {self._directory} holds no such file")
        return files


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      UserError: there is none, or it is no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected a small JSON file")
        _check_readable(path)
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, expected an object")
    return found


def _check_readable(path: Path) -> None:
    """Raises UserError for a file that is there and must not be read, which safetensors calls absent."""
    if path.exists() and not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: permission denied")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    _check_readable(path)
    try:
        # safetensors knows bfloat16 where ml_dtypes is, which JAX brings.
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        if _is_pointer(path):
            raise UserError(f"{path} is a pointer of git-lfs and not the file; run git lfs pull") from error
        raise UserError(
            f"{path} cannot be read: {first_line(error)}; it is damaged or cut off, so download it again"
        ) from error


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _infos(path: Path, expected: set[str]) -> dict[str, TensorInfo]:
    """Shapes and dtypes of a file's tensors.

    Raises:
      UserError: the file does not hold exactly those `expected`, or one of a dtype that NumPy lacks.
    """
    infos = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118, an opened file cannot be iterated
            part = file.get_slice(name)
            stored, shape = part.get_dtype(), tuple(part.get_shape())
            if stored not in _DTYPES:
                raise UserError(f"{path}: tensor {name} is stored as {stored}, expected F32, F16 or BF16")
            infos[name] = TensorInfo(shape, _DTYPES[stored])
    if missing := sorted(expected - infos.keys()):
        raise UserError(f"{path} lacks tensor {missing[0]}, which {INDEX_FILE} says it holds")
    if extra := sorted(infos.keys() - expected):
        raise UserError(f"{path} holds tensor {extra[0]}, which {INDEX_FILE} does not place there")
    return infos
