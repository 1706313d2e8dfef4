"""A picture of a run: its loss and its scores over the steps.

Read from what every run leaves behind: `steps.jsonl`, and the scores of evaluations in its TensorBoard
files. matplotlib and TensorBoard load on first use.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax import storage
from slm_jax.appended import read_appended
from slm_jax.errors import UserError

Curve = list[tuple[int, float]]
# Steps that one point of the loss curve is the mean of, so that batches of several kinds make one line.
_SMOOTHED = 25


class Panel(NamedTuple):
    """One set of axes.

    Attributes:
      title: above it.
      scores: legend -> name of a score, `task/metric`.
      toplines: legend -> value drawn as a dotted line, where there is one.
      ceiling: largest value shown, or None.
    """

    title: str
    scores: Mapping[str, str]
    toplines: Mapping[str, float] = {}
    ceiling: float | None = None


def losses(run_dir: str | Path) -> Curve:
    """Returns step and loss of every step of a run.

    Raises:
      UserError: the run has none.
    """
    path = storage.absolute_path(run_dir) / "steps.jsonl"
    try:
        lines = read_appended(path).decode().splitlines()
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{path} cannot be read ({said}); expected a run of slm train") from error
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def scores(run_dir: str | Path) -> dict[str, Curve]:
    """Returns the scores of a run's evaluations: `task/metric` -> step and value; one of each step."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    found: dict[str, dict[int, float]] = {}
    events = event_accumulator.EventAccumulator(
        str(Path(run_dir) / "tensorboard"), size_guidance={event_accumulator.TENSORS: 0}
    )
    events.Reload()
    for tag in events.Tags()["tensors"]:
        group, _, name = tag.partition("/")
        if group == "eval":
            for event in events.Tensors(tag):
                value = float(tensor_util.make_ndarray(event.tensor_proto))
                found.setdefault(name, {})[event.step] = value
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def draw(
    path: str | Path, loss: Curve, evaluated: Mapping[str, Curve], panels: Sequence[Panel], title: str
) -> None:
    """Draws the loss and one panel after the other beside it, as PNG or SVG by the name of the file.

    Args:
      path: of the picture; replaced as a whole.
      loss: step and loss.
      evaluated: `task/metric` -> step and value.
      panels: what to show of it.
      title: above all.

    Raises:
      UserError: it cannot be written, or matplotlib is missing.
    """
    try:
        # Not through pyplot, which looks for a display and keeps every figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, StrMethodFormatter
    except ImportError as error:
        raise UserError("a picture needs matplotlib: install slm_jax[demo]") from error

    figure = Figure(figsize=(4.2 * (1 + len(panels)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Any] = figure.subplots(1, 1 + len(panels), squeeze=False)[0].tolist()
    smooth = _smoothed(loss)
    axes[0].plot([step for step, _ in smooth], [value for _, value in smooth], color="black", linewidth=1.2)
    axes[0].set_yscale("log")
    for kind in (axes[0].yaxis.set_major_locator, axes[0].yaxis.set_minor_locator):
        kind(LogLocator(subs=(1, 2, 5)))
    for kind in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        kind(StrMethodFormatter("{x:g}"))
    axes[0].set_title(f"training loss (mean of {_SMOOTHED} steps)", fontsize=10)
    for axis, panel in zip(axes[1:], panels, strict=True):
        for number, (legend, name) in enumerate(panel.scores.items()):
            curve, color = evaluated.get(name, []), f"C{number}"
            axis.plot(
                [step for step, _ in curve], [value for _, value in curve], "o-", color=color, label=legend
            )
            if legend in panel.toplines:
                axis.axhline(panel.toplines[legend], color=color, linestyle=":", linewidth=1)
        axis.set_ylim(0, panel.ceiling)
        axis.set_title(panel.title, fontsize=10)
        axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.set_xlim(0, None)
    figure.suptitle(title, fontsize=11)
    path = Path(path)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        figure.savefig(unfinished, dpi=110)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _smoothed(curve: Curve) -> Curve:
    steps, values = (np.array(column, float) for column in zip(*curve, strict=True))
    groups = max(1, len(steps) // _SMOOTHED)
    return [
        (int(step.mean()), float(np.nanmean(value)))
        for step, value in zip(np.array_split(steps, groups), np.array_split(values, groups), strict=True)
    ]
