"""What ``report`` collected -> one HTML page that needs nothing else: no scripts, no files beside it, no network.

The charts are bars of CSS and a few SVG elements each, written by the page's template. A plotting library's SVG would
be ten times the size, differ from release to release of the library, and need an extra to be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2

import jagtile
from jagtile.generator.render import TEMPLATES
from jagtile.generator.report import DeviceReport, History

WIDTH, HEIGHT = 300, 84  # of a history's plot, in pixels
_CLIP = 1.5  # times the best: slower trials are drawn at the upper edge


@dataclass(frozen=True)
class Plot:
    """A history in coordinates of its plot: trials as dots, the best so far as a line."""

    dots: tuple[tuple[float, float, str], ...]  # x, y, what it is
    failures: tuple[tuple[float, str], ...]  # x, what it is
    line: str  # points of a polyline


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / "report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
    )
    made.filters.update(number=_number, percent=_percent)
    made.globals.update(plot=plot, width=WIDTH, height=HEIGHT, clip=_CLIP)
    return made


def page(devices: Sequence[DeviceReport]) -> str:
    """The page. The same report gives the same bytes: no clock, host or path is in it."""
    return _environment().get_template("page.html.j2").render(devices=devices, version=jagtile.__version__)


def plot(history: History) -> Plot:
    """A history's coordinates."""
    best = history.best_us
    step = WIDTH / max(1, len(history.trials))
    dots, failures = [], []
    line: list[tuple[float, float]] = []
    for place, trial in enumerate(history.trials):
        x = (place + 0.5) * step
        if trial.us is None:
            failures.append((_round(x), f"{place + 1}: {trial.config}, failed"))
        elif best is not None:
            dots.append((_round(x), _height(trial.us / best), f"{place + 1}: {trial.config}, {_number(trial.us)} us"))
        if trial.best_us is not None and best is not None:
            y = _height(trial.best_us / best)
            if not line or line[-1][1] != y:
                corner = [(_round(place * step), line[-1][1])] if line else []
                line += [*corner, (_round(place * step), y)]
    line += [(WIDTH, line[-1][1])] if line else []
    return Plot(tuple(dots), tuple(failures), " ".join(f"{x},{y}" for x, y in line))


def _height(ratio: float) -> float:
    """The y of a time in proportion to the best: the best is at the bottom."""
    above = (min(ratio, _CLIP) - 1) / (_CLIP - 1)
    return _round(HEIGHT - 4 - above * (HEIGHT - 8))


def _round(value: float) -> float:
    return round(value, 1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
