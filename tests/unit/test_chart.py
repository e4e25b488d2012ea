"""The benchmarks' pictures."""

from xml.etree import ElementTree

import pytest
from benchmarks.chart import Chart, Line, render, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1_000_000, [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]),
        (0, 97.3, [0, 20, 40, 60, 80, 100]),
        (0, 0.4, [0, 0.1, 0.2, 0.3, 0.4]),
        (-3, 8, [-4, -2, 0, 2, 4, 6, 8]),
        (0, 200_137, [0, 50_000, 100_000, 150_000, 200_000]),
        (0, 0, [0, 0.2]),
    ],
)
def test_ticks_are_round_and_hold_what_there_is(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found == pytest.approx(expected)
    assert found[0] <= low and found[-1] >= high - (found[1] - found[0]) * 0.02


def test_points_are_where_the_axes_say() -> None:
    line = Line("a & b", [(0, 0), (50, 10), (100, 20)])
    drawn = ElementTree.fromstring(render(Chart("title", "subtitle", "things", "MB", [line], reach=40)))
    texts = [found.text for found in drawn.iter(f"{SVG}text")]
    assert {"title", "subtitle", "things", "MB", "a & b", "100", "40"} <= set(texts)
    [polyline] = drawn.iter(f"{SVG}polyline")
    places = [tuple(map(float, pair.split(","))) for pair in polyline.attrib["points"].split()]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[0][1] > places[1][1] > places[2][1]


def test_thinning_keeps_both_ends() -> None:
    points = [(float(number), 0.0) for number in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 601 and kept[0] == points[0] and kept[-1] == points[-1]
