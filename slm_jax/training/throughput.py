"""How fast a run goes between two log lines: rates of training, without the time of what is none."""

import collections
import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from slm_jax.training.phases import Phases

# What of a batch may be padding: a row's samples, positions of the LLM's encoder, tokens of its decoder.
PARTS = ("speech", "encoder", "decoder")


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
        names += [f"{part}_{what}" for part in PARTS for what in ("used", "room")]
        audio_seconds, tokens, *used_and_room = _over_hosts([self._stats[name] for name in names])
        rooms = dict(zip(PARTS, zip(used_and_room[::2], used_and_room[1::2], strict=True), strict=True))
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


def _over_hosts(values: list[float]) -> list[float]:
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return np.asarray(gathered).reshape(jax.process_count(), -1).sum(axis=0).tolist()
