"""What a run tells while it goes: one line, or a bar on a terminal, per log period."""

import collections
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from slm_jax.training.phases import Phases


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


# What of a batch may be padding: a row's samples, positions of the LLM's encoder, tokens of its decoder.
_PARTS = ("speech", "encoder", "decoder")


_SHARES = {"MFU": "mfu_percent", "HFU": "hfu_percent"}
# What takes time in which nothing is trained.
_APART = ("start", "compile", "profile", "checkpoint", "evaluation")


class Throughput:
    """Clock and counters between two log lines.

    Args:
      devices: number of devices that rates are shared out to.
      peak_flops: of one device, in FLOP/s; None where it is not known.
      phases: clock of the process, which gets what stands apart too.
    """

    def __init__(self, devices: int, peak_flops: float | None = None, phases: Phases | None = None) -> None:
        self._devices = devices
        self._peak_flops = peak_flops
        self._phases = phases or Phases()
        self._apart: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a period."""
        self._began = time.monotonic()
        self._waited = 0.0
        self._steps = 0
        self._not_trained = 0.0
        self._model_flops = 0.0
        self._hardware_flops: float | None = 0.0
        self._stats: dict[str, float] = collections.defaultdict(float)

    def waited(self, seconds: float) -> None:
        """Adds time in which the devices had no batch to go on with."""
        self._waited += seconds

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Counts the time of a block, in which nothing is trained, for no rate."""
        began = time.monotonic()
        with self._phases.phase(name):
            yield
        seconds = time.monotonic() - began
        self._apart[name] = self._apart.get(name, 0.0) + seconds
        self._not_trained += seconds

    def add(
        self, stats: dict[str, float], model_flops: float = 0.0, hardware_flops: float | None = None
    ) -> None:
        """Adds a step with the counts of this host, and the operations of all devices."""
        self._steps += 1
        self._model_flops += model_flops
        if hardware_flops is None or self._hardware_flops is None:
            self._hardware_flops = None
        else:
            self._hardware_flops += hardware_flops
        for name, value in stats.items():
            self._stats[name] += value

    def read(self, steps_left: int) -> dict[str, float]:
        """Rates of the period over all hosts, and the seconds that the steps left will take."""
        seconds = max(time.monotonic() - self._began - self._not_trained, 1e-9)
        apart = {f"{name}_seconds": value for name, value in self._apart.items()}
        self._apart = {}
        names = ["audio_seconds", "target_tokens"]
        names += [f"{part}_{what}" for part in _PARTS for what in ("used", "room")]
        audio_seconds, tokens, *used_and_room = _over_hosts([self._stats[name] for name in names])
        rooms = dict(zip(_PARTS, zip(used_and_room[::2], used_and_room[1::2], strict=True), strict=True))
        useful = {f"useful_{part}_percent": 100 * used / room for part, (used, room) in rooms.items() if room}
        return (
            useful
            | apart
            | self._utilisation(seconds)
            | _peak_memory()
            | {
                "steps_per_second": self._steps / seconds,
                "step_seconds": seconds / max(self._steps, 1),
                "audio_hours_per_second": audio_seconds / 3600 / seconds,
                "tokens_per_second_per_device": tokens / seconds / self._devices,
                "data_wait_percent": 100.0 * self._waited / seconds,
                "eta_seconds": steps_left * seconds / max(self._steps, 1),
            }
        )

    def _utilisation(self, seconds: float) -> dict[str, float]:
        """MFU and HFU where the peak is known, and the model's operations a second."""
        found: dict[str, float] = {}
        for name, flops in (("mfu_percent", self._model_flops), ("hfu_percent", self._hardware_flops)):
            if flops and self._peak_flops:
                found[name] = 100 * flops / seconds / self._devices / self._peak_flops
        if self._model_flops:
            found["tflops_per_second_per_device"] = self._model_flops / seconds / self._devices / 1e12
        return found


def _peak_memory() -> dict[str, float]:
    """Most bytes in use so far on any device of this host, where the platform tells."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"peak_memory_bytes": float(max(peaks))} if peaks else {}


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
    shares = [f"{part} {rates[name]:.0f}" for part in _PARTS if (name := f"useful_{part}_percent") in rates]
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


def _over_hosts(values: list[float]) -> list[float]:
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return np.asarray(gathered).reshape(jax.process_count(), -1).sum(axis=0).tolist()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
