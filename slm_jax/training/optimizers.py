"""Optimizers and learning-rate schedules as configuration; Optax underneath."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slm_jax.errors import UserError, check_whole, is_number, nearest
from slm_jax.training.carried import alone, by_parameter, leaf_at
from slm_jax.training.spikes import SpikeConfig, watch_spikes


class Decay(enum.StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    RSQRT = "rsqrt"
    COSINE = "cosine"


@dataclass(frozen=True)
class ScheduleConfig:
    """A linear warm-up to the peak, then a decay.

    Attributes:
      peak: highest learning rate, reached at the end of the warm-up.
      warmup_steps: steps of the warm-up; the first step already learns.
      decay: `constant`, `rsqrt` (peak * sqrt(warmup_steps / step)) or `cosine` (to `floor` at `total_steps`).
      total_steps: end of the cosine; needed by `cosine` alone.
      floor: learning rate at the end of the cosine.
    """

    peak: float = 1e-3
    warmup_steps: int = 100
    decay: str = Decay.CONSTANT
    total_steps: int | None = None
    floor: float = 0.0

    def __post_init__(self):
        check_whole("ScheduleConfig.warmup_steps", self.warmup_steps, 0)
        if self.total_steps is not None:
            check_whole("ScheduleConfig.total_steps", self.total_steps)
        _check_numbers(self, "peak", "floor")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101).

    Attributes:
      schedule: the learning rate.
      b1, b2, eps: of Adam.
      weight_decay: decoupled; spares norms and biases, stacked layers' and those of several heads too.
      clip_norm: bound on the global norm of the gradient; None clips nothing.
    """

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check_schedule(self)
        _check_numbers(self, "b1", "b2", below=1)
        _check_numbers(self, "eps", "weight_decay")
        _check_bounds(self, "clip_norm")


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor (arXiv 1804.04235).

    Attributes:
      schedule: the learning rate; relative to each parameter's RMS where `scale_by_parameter` is set.
      decay_rate: exponent of the second moment's decay.
      min_dim_size_to_factor: parameters with two dims of at least this size keep row and column statistics.
      scale_by_parameter: multiply updates by the parameter's RMS.
      update_rms: bound on the RMS of an update; None clips nothing.
      clip_norm: bound on the global norm of the gradient; None clips nothing.
    """

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128
    scale_by_parameter: bool = True
    update_rms: float | None = 1.0
    clip_norm: float | None = None

    def __post_init__(self):
        _check_schedule(self)
        _check_numbers(self, "decay_rate")
        check_whole("AdafactorConfig.min_dim_size_to_factor", self.min_dim_size_to_factor)
        if not isinstance(self.scale_by_parameter, bool):
            _refuse(self, "scale_by_parameter", "True or False")
        _check_bounds(self, "update_rms", "clip_norm")


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024, optax.contrib) for matrices, Adam for all else: fewer, longer steps.

    Stacked layers are matrices apart. Embedding tables, heads over a vocabulary, convolutions and vectors are
    Adam's.

    Attributes:
      schedule: the learning rate of Adam.
      matrix_scale: the learning rate of matrices, as a multiple of Adam's.
      clip_norm: bound on the global norm of the gradient; None clips nothing.
    """

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    matrix_scale: float = 10.0
    clip_norm: float | None = None

    def __post_init__(self):
        _check_schedule(self)
        _check_numbers(self, "matrix_scale")
        _check_bounds(self, "clip_norm")


OptimizerConfig = AdamWConfig | AdafactorConfig | MuonConfig


def _refuse(config: object, name: str, expected: str) -> NoReturn:
    raise UserError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}, expected {expected}")


def _check_numbers(config: object, *names: str, below: float = math.inf) -> None:
    for name in names:
        if not is_number(value := getattr(config, name)) or not 0 <= value < below:
            _refuse(config, name, "a number of at least 0" + f" and below {below}" * (below < math.inf))


def _check_bounds(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not is_number(value) or value <= 0):
            _refuse(config, name, "a number above 0, or None")


def _check_schedule(config: OptimizerConfig) -> None:
    if not isinstance(config.schedule, ScheduleConfig):
        _refuse(config, "schedule", "@optimizers.ScheduleConfig()")


def make_schedule(config: ScheduleConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates made before.

    Raises:
      UserError: unknown decay, or a cosine without an end after its warm-up.
    """
    if config.decay not in tuple(Decay):
        raise UserError(f"schedule decay {config.decay!r} is unknown{nearest(config.decay, tuple(Decay))}")
    if config.decay == Decay.COSINE and (config.total_steps or 0) <= config.warmup_steps:
        raise UserError(
            f"schedule decay 'cosine' needs total_steps above warmup_steps={config.warmup_steps}, "
            f"found {config.total_steps}"
        )
    warmup = max(config.warmup_steps, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1.0
        after = jnp.maximum(update, warmup)
        if config.decay == Decay.CONSTANT:
            decayed = jnp.float32(config.peak)
        elif config.decay == Decay.RSQRT:
            decayed = config.peak * jnp.sqrt(warmup / after)
        else:
            assert config.total_steps is not None
            share = jnp.clip((after - warmup) / (config.total_steps - warmup), 0.0, 1.0)
            decayed = config.floor + (config.peak - config.floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return decayed * jnp.minimum(update / warmup, 1.0)

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    axes: optax.Params | None = None,
    spikes: SpikeConfig | None = None,
    apart: bool = False,
) -> optax.GradientTransformation:
    """The Optax transformation: clipping, then the optimizer; updates that are not finite are left out.

    A left-out update changes neither parameters nor optimizer state but the counters
    `notfinite_count` (in a row) and `total_notfinite`.

    Args:
      config: which one.
      axes: tree of the parameters with the tuple of logical axis names at each leaf; Muon and weight decay
        need it.
      spikes: which steps stand out, and whether they are left out too; None watches for none.
      apart: whether every parameter counts its own updates (`carried.by_parameter`).
    """
    if apart:
        inner = by_parameter(lambda path: _unclipped(config, axes and alone(path, leaf_at(axes, path))))
    else:
        inner = _unclipped(config, axes)
    if config.clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)
    # Past its bound apply_if_finite would apply the poisoned update; the loop stops long before this one.
    finite = optax.apply_if_finite(inner, max_consecutive_errors=np.iinfo(np.int32).max)
    return watch_spikes(spikes, finite) if spikes else finite


def _unclipped(config: OptimizerConfig, axes: optax.Params | None) -> optax.GradientTransformation:
    schedule = make_schedule(config.schedule)
    if isinstance(config, AdamWConfig):
        return optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed(config, axes),
        )
    if isinstance(config, MuonConfig):
        if axes is None:
            raise ValueError("Muon needs the logical axes of the parameters")
        return optax.contrib.muon(
            lambda count: config.matrix_scale * schedule(count),
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=jax.tree.map(matrix_dims, axes, is_leaf=is_names),
        )
    return optax.adafactor(
        schedule,
        min_dim_size_to_factor=config.min_dim_size_to_factor,
        decay_rate=config.decay_rate,
        multiply_by_parameter_scale=config.scale_by_parameter,
        clipping_threshold=config.update_rms,
        # Momentum would double the optimizer's memory, what Adafactor is there to save.
        momentum=None,
    )


# Axes that belong together: a head and what is in it, and the two maps of a joined gate.
_JOINED = {"kv": "heads", "mlp": "gates"}
# Axes of parameters that are no matrix, or whose rows are tokens.
_NOT_OF_MATRICES = {"vocab", "conv_kernel", "conv_in", "relpos_buckets", "norm", "codebooks", "positions"}


def matrix_dims(names: Sequence[str | None]) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which dims of a parameter are contracted and which come out; None where it is no matrix.

    The last axis, with the axes that belong to it, comes out; all before it but `layers` is contracted.
    """
    stacked, first_out = _dims(names)
    if first_out <= stacked or _NOT_OF_MATRICES.intersection(names):
        return None
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(stacked, first_out)), tuple(range(first_out, len(names)))
    )


def is_names(leaf: object) -> bool:
    """Whether a node of a tree is a tuple of logical axis names."""
    return isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)


def _dims(names: Sequence[str | None]) -> tuple[int, int]:
    """Returns the first dim behind that of stacked layers, and the first of those that come out."""
    stacked = int(bool(names) and names[0] == "layers")
    first_out = len(names) - 1
    while first_out > stacked and _JOINED.get(names[first_out] or "", "") == names[first_out - 1]:
        first_out -= 1
    return stacked, first_out


def _decayed(config: AdamWConfig, axes: optax.Params | None) -> optax.Params:
    """Which parameters weight decay reaches: those that are no vectors, whatever they are stacked along."""
    if axes is None:
        if config.weight_decay:
            raise ValueError("weight decay needs the logical axes of the parameters")
        return False

    def reached(names: Sequence[str | None]) -> bool:
        stacked, first_out = _dims(names)
        return first_out > stacked

    return jax.tree.map(reached, axes, is_leaf=is_names)
