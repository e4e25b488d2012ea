"""A line chart as SVG: enough for a figure over time or over a count, and nothing to install."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 820, 460
LEFT, RIGHT, TOP, BOTTOM = 78, 28, 70, 62
ROW = 20
"""Height of a row of the legend."""
LETTER = 7.0
"""Width of a letter, about: nothing here can measure text."""
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#8a6d1d", "#4a4a4a")
"""Told apart by people who see colours differently too, and by their brightness in print."""


@dataclass(frozen=True)
class Line:
    """`points` are (x, y) in the units of the chart's axes, by rising x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    title: str
    subtitle: str
    x: str
    """What the horizontal axis counts, with its unit."""
    y: str
    lines: Sequence[Line]
    """At least one, with at least one point."""
    reach: float = 0.0
    """The vertical axis goes from 0 to here at least: noise that fills the picture would look like growth."""


def write(path: Path, chart: Chart) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(render(chart), encoding="utf-8")


def render(chart: Chart) -> str:
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for _, y in line.points]
    x_ticks = ticks(min(0.0, *xs), max(xs))
    y_ticks = ticks(min(0.0, *ys), max(chart.reach, *ys))
    legend, rows = _legend(chart.lines)
    area = _Area(x_ticks, y_ticks, TOP + rows * ROW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 26, chart.title, 'font-size="17" font-weight="600"'),
        _text(LEFT, 46, chart.subtitle, 'fill="#555"'),
        *_axes(chart, area, x_ticks, y_ticks),
        *legend,
    ]
    for number, line in enumerate(chart.lines):
        points = " ".join(f"{area.x(x):.1f},{area.y(y):.1f}" for x, y in thinned(line.points))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join((*parts, "</svg>", ""))


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers; the first is at most `low` and the last at least `high`, but for a hair."""
    span = (high - low) or max(abs(high), 1.0)
    step = 10 ** floor(log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = floor(low / step)
    count = 1
    while (first + count) * step < high - step * 0.02:
        count += 1
    return [(first + number) * step for number in range(count + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = 600) -> Sequence[tuple[float, float]]:
    """No more points than there is room for; the last one stays."""
    step = -(-len(points) // most)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


class _Area:
    """Where the axes are: values to places."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float], top: int) -> None:
        self.top = top
        self._x = (x_ticks[0], x_ticks[-1])
        self._y = (y_ticks[0], y_ticks[-1])

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - self.top - BOTTOM)


def _axes(chart: Chart, area: _Area, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, area.top, HEIGHT - BOTTOM
    parts = []
    for value in y_ticks:
        at = area.y(value)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e2e2"/>')
        parts.append(_text(left - 8, at + 4.5, _number(value), 'text-anchor="end"'))
    for value in x_ticks:
        at = area.x(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#888"/>')
        parts.append(_text(at, bottom + 20, _number(value), 'text-anchor="middle"'))
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>')
    parts.append(_text((left + right) / 2, HEIGHT - 14, chart.x, 'text-anchor="middle"'))
    middle = (top + bottom) / 2
    parts.append(_text(0, 0, chart.y, f'text-anchor="middle" transform="translate(20 {middle}) rotate(-90)"'))
    return parts


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """One entry behind the other, in as many rows as they need."""
    parts, at, row = [], float(LEFT), 0
    for number, line in enumerate(lines):
        width = 40 + LETTER * len(line.name)
        if at > LEFT and at + width > WIDTH - RIGHT:
            at, row = float(LEFT), row + 1
        y = TOP + row * ROW
        stroke = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="3"'
        parts.append(f'<line x1="{at:.1f}" x2="{at + 22:.1f}" y1="{y}" y2="{y}" {stroke}/>')
        parts.append(_text(at + 28, y + 4.5, line.name, ""))
        at += width + 16
    return parts, row + 1


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:,.6g}"
