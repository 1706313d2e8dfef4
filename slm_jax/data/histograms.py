"""How a length is spread over many examples: a few numbers, a histogram as text, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.errors import UserError

_BINS = 12
_BAR = 40


class Spread(NamedTuple):
    """How a length is spread.

    Attributes:
      unit: of the length.
      count: of examples.
      total: sum of all lengths.
      shortest, median, p95, longest: lengths of examples; 95 % of them are not longer than `p95`.
      edges: where bins start, rising evenly.
      counts: examples of each bin; the last one has all that are longer.
    """

    unit: str
    count: int
    total: float
    shortest: float
    median: float
    p95: float
    longest: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def last_is_open(self) -> bool:
        """Whether the last bin has examples that do not fit into its width."""
        return len(self.edges) > 1 and self.longest >= 2 * self.edges[-1] - self.edges[-2]

    def lines(self) -> Iterator[str]:
        """Yields the histogram as text, a line for each bin."""
        starts = [f"{edge:,g}" for edge in self.edges]
        stops = [*starts[1:], "and more" if self.last_is_open else f"{self._end:,g}"]
        wide = max(len(start) for start in starts)
        far = max(len(stop) for stop in stops)
        for start, stop, count in zip(starts, stops, self.counts, strict=True):
            bar = "█" * math.ceil(_BAR * count / max(self.counts))
            yield f"{start:>{wide}} .. {stop:<{far}}  {bar:<{_BAR}} {count:,}".rstrip()

    @property
    def _end(self) -> float:
        return self.edges[-1] + (self.edges[1] - self.edges[0] if len(self.edges) > 1 else 1)


def spread(values: np.ndarray, unit: str) -> Spread | None:
    """Returns how lengths are spread; None where there are none.

    Args:
      values: [n], not negative.
      unit: of them.
    """
    if not len(values):
        return None
    shortest, longest = float(values.min()), float(values.max())
    # A few examples that are far longer than all others do not decide the bins.
    most = float(np.quantile(values, 0.995, method="inverted_cdf"))
    width = _round_width((most - shortest) / _BINS, np.issubdtype(values.dtype, np.integer))
    # A length on an edge belongs to the bin that starts there, whatever the last bit of a division says.
    first, last = (math.floor(length / width + 1e-9) for length in (shortest, most))
    edges = [round(number * width, 9) for number in range(first, last + 1)]
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 1)
    return Spread(
        unit=unit,
        count=len(values),
        total=float(values.sum(dtype=np.float64)),
        shortest=shortest,
        median=float(np.quantile(values, 0.5, method="inverted_cdf")),
        p95=float(np.quantile(values, 0.95, method="inverted_cdf")),
        longest=longest,
        edges=tuple(edges),
        counts=tuple(np.bincount(places, minlength=len(edges)).tolist()),
    )


def _round_width(least: float, whole: bool) -> float:
    """Returns the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    least = max(least, 1 if whole else 1e-3)
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def draw(path: str | Path, spreads: Mapping[str, Spread], title: str) -> None:
    """Draws histograms side by side, as PNG or SVG by the name of the file.

    Args:
      path: of the picture; replaced as a whole.
      spreads: name -> how it is spread.
      title: above all.

    Raises:
      UserError: there is nothing to draw, its name has no ending, it cannot be written, or matplotlib is
        missing.
    """
    path = Path(path)
    if not spreads:
        raise UserError(
            f"{path}: there are no lengths to draw, expected at least one example that can be used"
        )
    if not path.suffix:
        raise UserError(f"{path}: a picture is PNG or SVG by its name; did you mean '{path}.png'?")
    try:
        # Not through pyplot, which looks for a display and keeps every figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'slm_jax[demo]'") from error

    figure = Figure(figsize=(4.2 * len(spreads), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Any] = figure.subplots(1, len(spreads), squeeze=False)[0].tolist()
    for axis, (name, found) in zip(axes, spreads.items(), strict=True):
        width = found._end - found.edges[-1]
        axis.bar(found.edges, found.counts, width=width, align="edge", edgecolor="white", linewidth=0.5)
        axis.axvline(found.median, color="black", linewidth=1, label=f"median {found.median:,.4g}")
        axis.axvline(found.p95, color="black", linewidth=1, linestyle=":", label=f"95 % {found.p95:,.4g}")
        longer = f", the last bin up to {found.longest:,.4g}" if found.last_is_open else ""
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"{found.unit}{longer}", fontsize=9)
        axis.set_ylabel("examples", fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        figure.savefig(unfinished, dpi=110)
        unfinished.replace(path)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the picture cannot be written ({said})") from error
    finally:
        unfinished.unlink(missing_ok=True)
