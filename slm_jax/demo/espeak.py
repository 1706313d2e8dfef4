"""Speech synthesis by espeak-ng, through ctypes on the library and voices that `espeakng-loader` ships.

The library keeps everything in globals: one voice, one callback, one utterance at a time, and phases of its
oscillators that run on from one utterance into the next. So each utterance is spoken by a freshly loaded copy
(2 ms; its samples depend on text and voice alone), and parallel synthesis takes processes, not threads.
"""

import _ctypes
import contextlib
import ctypes
import dataclasses
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from slm_jax.errors import UserError, nearest

SAMPLE_RATE = 16_000

Item = TypeVar("Item")
Result = TypeVar("Result")

# From speak_lib.h of espeak-ng 1.52.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_BUFFER_MS = 500

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclasses.dataclass(frozen=True)
class Voice:
    """How a sentence is spoken.

    Attributes:
      name: espeak's voice, with a variant after `+`, such as `en+f2`.
      speed: words per minute, 80 to 450.
      pitch: base pitch, 0 to 99 (50 is the voice's own).
      range: how much the pitch moves, 0 (monotone) to 99.
      volume: 0 to 200 (100 nearly reaches full scale).
    """

    name: str = "en"
    speed: int = 160
    pitch: int = 50
    range: int = 50
    volume: int = 80


def synthesize(text: str, voice: Voice = Voice(), warp: float = 1.0) -> np.ndarray:
    """Returns `text` spoken by `voice`: int16 [samples] at 16 kHz, always the same for the same arguments.

    Args:
      text: what is said.
      voice: by whom.
      warp: factor on all frequencies, and on the tempo.

    Raises:
      UserError: the `demo` extra is missing, or espeak has no such voice or variant, or refuses the text.
    """
    # Imported late: only synthesis needs it.
    import soxr

    samples, rate = synthesize_native(text, voice)
    resampled = soxr.resample(samples.astype(np.float32), rate * warp, SAMPLE_RATE)
    return np.clip(np.round(resampled), -32768, 32767).astype(np.int16)


def synthesize_native(text: str, voice: Voice = Voice()) -> tuple[np.ndarray, int]:
    """Returns (int16 [samples], samples per second) as espeak made them; raises as `synthesize`."""
    chunks: list[np.ndarray] = []

    @_CALLBACK
    def collect(samples, count, events):
        del events
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with _fresh_library() as (library, rate):
        if library.espeak_SetVoiceByName(voice.name.encode()):
            raise UserError(f"espeak: it has no voice {voice.name!r}; give one such as 'en' or 'en+f2'")
        library.espeak_SetSynthCallback(collect)
        for parameter, value in (
            (_RATE, voice.speed),
            (_VOLUME, voice.volume),
            (_PITCH, voice.pitch),
            (_RANGE, voice.range),
        ):
            library.espeak_SetParameter(parameter, value, 0)
        # An unknown variant would silently give the plain voice.
        _, _, variant = voice.name.partition("+")
        if variant and variant not in variants():
            raise UserError(f"espeak: it has no voice variant {variant!r}{nearest(variant, variants())}")
        data = text.encode()
        status = library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status or library.espeak_Synchronize():
            raise UserError(f"espeak: it could not speak {text!r} (status {status})")
    return np.concatenate([*chunks, np.zeros(0, np.int16)]), rate


def variants() -> list[str]:
    """Returns the voice variants that may follow `en+`.

    Raises:
      UserError: the `demo` extra is missing.
    """
    return sorted(path.name for path in Path(_paths()[1], "voices", "!v").iterdir())


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """Yields `function(item)` in the order of `items`, computed by `processes` fresh processes.

    Args:
      function: importable by name; it and the items are pickled.
      items: what to compute.
      processes: 1 computes here, without a process.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    # Spawned, as a fork would copy the threads' locks of JAX and TensorFlow.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items, chunksize=8)


def _paths() -> tuple[str, str]:
    """The library's file and the folder of its voices.

    Raises:
      UserError: the `demo` extra is missing or incomplete.
    """
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise UserError(
            "espeak: the package espeakng-loader is missing; install the demo extra: "
            "pip install 'slm_jax[demo]'"
        ) from error
    try:
        return loader.get_library_path(), loader.get_data_path()
    except RuntimeError as error:
        raise UserError(f"espeak: the package espeakng-loader has no voices: {error}") from error


@contextlib.contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """The library with its globals as they are at its start, and its sample rate; unloaded at the end.

    Raises:
      UserError: the library is missing or does not load.
    """
    path, data = _paths()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise UserError(f"espeak: the library of espeakng-loader does not load: {error}") from error
    try:
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
        library.espeak_SetSynthCallback.restype = None
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        rate = library.espeak_Initialize(
            _OUTPUT_SYNCHRONOUS, _BUFFER_MS, os.fsencode(data), _INITIALIZE_DONT_EXIT
        )
        if rate <= 0:
            raise UserError(f"espeak: it could not read its voices under {data}")
        # The noise of breathy voices comes from numbers that the library seeds with the time of day, that of
        # Klatt's voices from the C library's, whose state outlives this copy.
        library.espeak_ng_SetRandSeed(1)
        library.srand(1)
        yield library, rate
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
