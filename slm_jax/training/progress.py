"""What a run tells while it goes: one line, or a bar on a terminal, per log period."""

import collections
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from slm_jax.training.throughput import PARTS


class Writer(Protocol):
    """Where scalars go, such as TensorBoard."""

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...

    def flush(self) -> None: ...


class StepRecord(NamedTuple):
    """A step whose metrics may still be on their way from the device."""

    step: int
    metrics: dict[str, Any]
    ids: dict[int, tuple[str, ...]]
    stats: dict[str, float]


def summarise(records: Iterable[StepRecord]) -> dict[str, float]:
    """Metrics of a log period: ratios and the loss over all of its steps, all else of the last step.

    Steps whose loss is not finite count for no average; `nonfinite_total` tells of them.
    """
    last: dict[str, float] = {}
    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for record in records:
        loss, weight = float(record.metrics["loss"]), float(record.metrics["weight"])
        finite = np.isfinite(loss)
        for name, value in record.metrics.items():
            if isinstance(value, tuple):
                pair = np.asarray(value, np.float64)
                sums[name] += pair if finite and np.all(np.isfinite(pair)) else 0.0
            else:
                last[name] = float(value)
        sums["loss"] += (loss * weight, weight) if finite else 0.0
    ratios = {name: float(top / bottom) if bottom else 0.0 for name, (top, bottom) in sums.items()}
    return {**last, **ratios}


_SHARES = {"MFU": "mfu_percent", "HFU": "hfu_percent"}
# What takes time in which nothing is trained.
_APART = ("start", "compile", "profile", "checkpoint", "evaluation")


def log_line(step: int, train_steps: int, metrics: dict[str, float], rates: dict[str, float]) -> str:
    """The line of a log period."""
    parts = [
        f"step {step}/{train_steps}",
        f"loss {metrics['loss']:.4f}",
        f"{rates['step_seconds']:.4g} s/step",
        f"{rates['audio_hours_per_second']:.4g} audio-h/s",
        f"{rates['tokens_per_second_per_device']:.4g} tokens/s/device",
        *_used(rates),
        f"data wait {rates['data_wait_percent']:.0f} %",
        *_useful(rates),
        f"ETA {_clock(rates['eta_seconds'])}",
    ]
    apart = [
        f"{name} {rates[f'{name}_seconds']:.1f}" for name in _APART if rates.get(f"{name}_seconds", 0) >= 0.05
    ]
    if apart:
        parts.append(f"apart: {', '.join(apart)} s")
    if metrics.get("nonfinite_total"):
        parts.append(f"non-finite steps skipped {metrics['nonfinite_total']:.0f}")
    if metrics.get("spikes_total"):
        parts.append(f"spikes {metrics['spikes_total']:.0f}, skipped {metrics['spikes_skipped']:.0f}")
    return "  ".join(parts)


def _used(rates: dict[str, float]) -> list[str]:
    """What of the devices is used: of their products, or how many these are, and of their memory."""
    parts = []
    shares = [f"{name} {rates[key]:.1f}" for name, key in _SHARES.items() if key in rates]
    if shares:
        parts.append(f"{' '.join(shares)} %")
    elif "tflops_per_second_per_device" in rates:
        parts.append(f"{rates['tflops_per_second_per_device']:.3g} TFLOP/s/device")
    if "peak_memory_bytes" in rates:
        parts.append(f"peak {rates['peak_memory_bytes'] / 1e9:.1f} GB")
    return parts


def _useful(rates: dict[str, float]) -> list[str]:
    shares = [f"{part} {rates[name]:.0f}" for part in PARTS if (name := f"useful_{part}_percent") in rates]
    return [f"useful {' '.join(shares)} %"] if shares else []


class Reporter:
    """Says lines on process 0: below a progress bar on a terminal, plainly elsewhere.

    Args:
      train_steps: length of the bar.
      stream: where to; standard error by default.
    """

    def __init__(self, train_steps: int, stream: Any = None):
        self._stream = sys.stderr if stream is None else stream
        self._bar = self._task = None
        if jax.process_index() == 0 and self._stream.isatty():
            self._bar = _rich_bar(self._stream)
            if self._bar is not None:
                self._task = self._bar.add_task("training", total=train_steps)

    def say(self, line: str, every_process: bool = False) -> None:
        """Writes a line; of all processes if asked, else of the first."""
        if jax.process_index() != 0 and not every_process:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def at(self, step: int) -> None:
        """Moves the bar, which appears with the first move."""
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(stream: Any) -> Any:
    try:
        # Not among what this room needs: without it a terminal gets plain lines too.
        from rich import console, progress
    except ImportError:
        return None
    return progress.Progress(
        *progress.Progress.get_default_columns(),
        progress.MofNCompleteColumn(),
        console=console.Console(file=stream),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
