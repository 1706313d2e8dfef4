"""Steps whose loss or gradient stands out from those before: found on the device, told, left out if wanted.

PaLM (arXiv 2204.02311, section 5.1) met such spikes and went back before them, past the batches that made
them; a step that is left out while it is taken needs no way back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_jax.errors import UserError, check_whole, is_number
from slm_jax.training.progress import StepRecord

# A deviation below this share of the mean is rounding, however even the steps before were.
_LEAST_DEVIATION = 1e-6
# So many examples of a step are named in its line; the log of steps names all.
_NAMED = 8


@dataclass(frozen=True)
class SpikeConfig:
    """When a step is a spike, and what becomes of it.

    Attributes:
      zscore: a step is one whose loss or gradient norm lies more standard deviations above the mean.
      skip: whether a spike is left out: it changes neither parameters nor optimizer; else it is told only.
      warmup_steps: steps from which mean and deviation are taken before any step is called a spike.
      decay: weight of the past in both; a step counts for about `1 / (1 - decay)` steps after it.
      max_in_a_row: after so many spikes in a row the next step is taken as it is, and mean and deviation
        begin afresh from it: what goes on for so long is no spike.
    """

    zscore: float
    skip: bool = False
    warmup_steps: int = 100
    decay: float = 0.99
    max_in_a_row: int = 10

    def __post_init__(self):
        if not is_number(self.zscore) or self.zscore <= 0:
            raise UserError(
                f"spike_zscore is {self.zscore!r}, expected a number above 0, such as 6.0, or None"
            )
        if not isinstance(self.skip, bool):
            raise UserError(f"spike_skip is {self.skip!r}, expected True or False")
        # Of one step there is no deviation.
        check_whole("spike_warmup_steps", self.warmup_steps, 2)
        if not isinstance(self.decay, float) or not 0 < self.decay < 1:
            raise UserError(f"spike_decay is {self.decay!r}, expected a number between 0 and 1, such as 0.99")
        check_whole("max_spikes_in_a_row", self.max_in_a_row)


class Moments(NamedTuple):
    """Exponential moving mean and variance of a metric, float32 scalars."""

    mean: Any
    variance: Any


class SpikeState(NamedTuple):
    """Optax state around that of the optimizer; all scalars but `inner_state`.

    Attributes:
      steps_counted: int32, steps that mean and deviation are of.
      loss, grad_norm: their moments, over all steps that were no spike.
      loss_zscore, grad_norm_zscore: of the last step; 0 in the warm-up.
      spikes_in_a_row, spikes_total, spikes_skipped: int32.
      inner_state: of the optimizer.
    """

    steps_counted: Any
    loss: Moments
    grad_norm: Moments
    loss_zscore: Any
    grad_norm_zscore: Any
    spikes_in_a_row: Any
    spikes_total: Any
    spikes_skipped: Any
    inner_state: Any


def watch_spikes(config: SpikeConfig, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer; its `update` takes the step's loss as `loss`.

    The moments follow West (1979): a step of value x moves the mean by w (x - mean) and makes the variance
    (1 - w) (variance + w (x - mean)^2), with w = max(1 - decay, 1 / steps). A step that is not finite or has
    no gradient is no spike, enters nothing, and is the optimizer's business.
    """
    optimizer = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        loss = extra["loss"]
        norm = optax.tree.norm(updates)
        known = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm > 0)
        warm = state.steps_counted >= config.warmup_steps
        loss_zscore = jnp.where(known & warm, _zscore(loss, state.loss), 0.0)
        norm_zscore = jnp.where(known & warm, _zscore(norm, state.grad_norm), 0.0)
        stands_out = jnp.maximum(loss_zscore, norm_zscore) > config.zscore
        lasting = stands_out & (state.spikes_in_a_row >= config.max_in_a_row)
        spike = stands_out & ~lasting
        counted = known & ~spike
        steps = jnp.where(lasting, 0, state.steps_counted)
        skipped = spike & config.skip
        new_updates, inner_state = jax.lax.cond(
            skipped,
            lambda: (optax.tree.zeros_like(updates), state.inner_state),
            lambda: optimizer.update(updates, state.inner_state, params, **extra),
        )
        return new_updates, SpikeState(
            steps_counted=steps + counted,
            loss=_moved(state.loss, loss, steps, counted, config.decay),
            grad_norm=_moved(state.grad_norm, norm, steps, counted, config.decay),
            loss_zscore=loss_zscore,
            grad_norm_zscore=norm_zscore,
            spikes_in_a_row=jnp.where(known, (state.spikes_in_a_row + 1) * spike, state.spikes_in_a_row),
            spikes_total=state.spikes_total + spike,
            spikes_skipped=state.spikes_skipped + skipped,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(lambda params: fresh(optimizer.init(params)), update)


def fresh(inner_state: Any) -> SpikeState:
    """The state before the first step that is watched."""
    # Arrays of their own each: the state is donated.
    count, zero = lambda: jnp.zeros((), jnp.int32), lambda: jnp.zeros((), jnp.float32)
    loss, grad_norm = Moments(zero(), zero()), Moments(zero(), zero())
    return SpikeState(count(), loss, grad_norm, zero(), zero(), count(), count(), count(), inner_state)


def spike_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Metrics of a step from the state after it; none where spikes are not watched."""
    if not isinstance(opt_state, SpikeState):
        return {}
    names = ("loss_zscore", "grad_norm_zscore", "spikes_in_a_row", "spikes_total", "spikes_skipped")
    return {name: getattr(opt_state, name) for name in names}


def spike_zscores(record: StepRecord) -> dict[str, float]:
    """The z-scores `loss_zscore` and `grad_norm_zscore` of a step that was a spike; nothing of any other."""
    if not record.metrics.get("spikes_in_a_row", 0) > 0:
        return {}
    zscores = {name: float(record.metrics[name]) for name in ("loss_zscore", "grad_norm_zscore")}
    # A step that is not finite leaves the row as it was, and its z-scores are 0.
    return zscores if max(zscores.values()) > 0 else {}


def spike_lines(records: Iterable[StepRecord], config: SpikeConfig | None, log_name: str) -> list[str]:
    """What to say of the spikes among some steps.

    Args:
      records: of the steps, with the examples that this host read for them.
      config: None has no spikes.
      log_name: of this host's file with all of these examples.
    """
    if config is None:
        return []
    lines = []
    for record in records:
        if not (zscores := spike_zscores(record)):
            continue
        metrics = record.metrics
        names = [name for _, row in sorted(record.ids.items()) for name in row]
        more = f" and {len(names) - _NAMED} more, see {log_name}" if len(names) > _NAMED else ""
        lines.append(
            f"spike at step {record.step}{' (left out)' if config.skip else ''}: "
            f"loss {float(metrics['loss']):.4f} (z {zscores['loss_zscore']:.1f}), gradient norm "
            f"{float(metrics['grad_norm']):.4g} (z {zscores['grad_norm_zscore']:.1f}), "
            f"of {', '.join(names[:_NAMED])}{more}"
        )
        if int(metrics["spikes_in_a_row"]) == config.max_in_a_row:
            lines.append(
                f"{config.max_in_a_row} spikes in a row up to step {record.step} "
                f"(max_spikes_in_a_row={config.max_in_a_row}): if the next step is as high, it is taken as "
                "it is, and mean and deviation begin afresh"
            )
    return lines


def _zscore(value: jax.Array, moments: Moments) -> jax.Array:
    deviation = jnp.maximum(jnp.sqrt(moments.variance), _LEAST_DEVIATION * jnp.abs(moments.mean))
    return (value - moments.mean) / jnp.maximum(deviation, jnp.finfo(jnp.float32).tiny)


def _moved(moments: Moments, value: jax.Array, steps: jax.Array, counted: jax.Array, decay: float) -> Moments:
    weight = jnp.maximum(1.0 - decay, 1.0 / (steps + 1.0))
    change = value - moments.mean
    moved = Moments(
        moments.mean + weight * change,
        (1.0 - weight) * (moments.variance + weight * jnp.square(change)),
    )
    return jax.tree.map(lambda new, old: jnp.where(counted, new, old), moved, moments)
