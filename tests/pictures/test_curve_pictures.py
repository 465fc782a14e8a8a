"""The pictures of curves and of sizes: what is drawn where, and what the words below say."""

import re
from itertools import combinations

import pytest

from spindle.cost.bands import Band
from spindle.cost.sources import CostSource, cost_sources
from spindle.pictures import curves_svg, panels_of, sizes_svg
from spindle.pictures.axes import Axis, device_ticks, log_ticks
from spindle.planner.report.sizes import Size
from tests.pictures.picture_marks import page, texts, words
from tests.planner.planner_graphs import graph, metaop

FLAT = {1: 8.0, 2: 4.0, 4: 3.95, 8: 3.95}
METAGRAPH = graph(
    metaop("a.vision", 2),
    metaop("b.vision", 5),
    metaop("a.text", 1, FLAT),
    metaop("a.loss", 1, {1: 0.5}),
    metaop("b.text", 1, {1: 8.0, 2: 5.0}),
)
PANELS = panels_of(METAGRAPH, cost_sources(METAGRAPH), num_devices=8)


def test_panels_are_parts_and_curves_those_that_differ() -> None:
    """Tasks whose layers take the same time share a curve; layers do not count."""
    assert [(panel.name, [curve.tasks for curve in panel.curves]) for panel in PANELS] == [
        ("vision", [("a", "b")]),
        ("text", [("a",), ("b",)]),
        ("loss", [("a",)]),
    ]


def test_where_more_devices_stop_helping() -> None:
    """4 devices save 1 % of what 2 take; b's text cannot use more than 2; the vision tower is faster up to all 8."""
    ends = {curve.metaops[0]: (curve.enough, curve.most) for panel in PANELS for curve in panel.curves}
    assert ends == {"a.vision": (8, 8), "a.text": (2, 8), "b.text": (2, 2), "a.loss": (1, 1)}
    shown = words(curves_svg(PANELS, num_devices=8, title="t"))
    for text in (
        "faster up to all 8; given",
        "no faster beyond 2; given",
        "on 2 at most; given",
        "one device only; given",
    ):
        assert text in shown


def test_points_beyond_the_cluster_are_left_out() -> None:
    (panel,) = panels_of(graph(metaop("a.vision")), cost_sources(graph(metaop("a.vision"))), num_devices=4)
    assert [n for n, _ in panel.curves[0].points] == [1, 2, 4]


def test_measured_points_and_the_band() -> None:
    """What a profile has timed is filled; the band is drawn and stands there in numbers."""
    one = graph(metaop("a.vision"))
    sources = [CostSource(metaop="a.vision", source="scaled", band=Band(0.8, 1.25), timed=(1, 2, 64))]
    panels = panels_of(one, sources, num_devices=8)
    assert panels[0].curves[0].measured == (1, 2)
    svg = curves_svg(panels, num_devices=8, title="t")
    filled = re.findall(r"<title>(\d+) devices?: [^<]*</title><path [^>]*fill=\"#127d9d\"", svg)
    assert filled == ["1", "2"]
    assert "faster up to all 8; scaled, x 0.80 to 1.25" in words(svg)
    assert svg.count('fill-opacity="0.13"') == 1
    assert {"measured", "not measured here"} <= set(words(svg))


def test_more_than_four_curves_take_a_further_panel() -> None:
    many = graph(*(metaop(f"t{i}.vision", 1, {1: 1.0 + i, 2: 0.9 + i}) for i in range(6)))
    shown = words(curves_svg(panels_of(many, cost_sources(many), num_devices=2), num_devices=2, title="t"))
    assert {"vision (1 of 2)", "vision (2 of 2)", *(f"t{i}" for i in range(6))} <= set(shown)


@pytest.mark.parametrize("most", [1, 2, 8, 1024])
def test_texts_stay_apart_and_on_the_page(most: int) -> None:
    long = graph(*(metaop(f"{'task' * 30}{i}.{'part' * 30}{i % 3}", 1, {1: 10.0**i}) for i in range(-4, 5)))
    drawn = [
        curves_svg(panels_of(g, cost_sources(g), num_devices=most), num_devices=most, title="t" * 300, notes=["n"])
        for g in (long, METAGRAPH)
    ]
    drawn.append(sizes_svg([size(n, 1 / n) for n in range(1, most + 1, max(1, most // 9))], title="t"))
    for svg in drawn:
        assert [text for text, area in texts(svg) if not page(svg).holds(area)] == []
        met = [(a, b) for (a, one), (b, two) in combinations(texts(svg), 2) if one.meets(two)]
        assert met == []


def size(devices: int, step_s: float) -> Size:
    return Size(
        devices=devices, step_s=step_s, makespan_s=step_s, efficiency=1 / (devices * step_s), usual_s=2 * step_s
    )


def test_sizes() -> None:
    """Efficiency in numbers; a cross where nothing fits; where more do not help."""
    rows = [Size(devices=1, reason="too small"), size(2, 0.5), size(4, 0.3), size(8, 0.299)]
    shown = words(sizes_svg(rows, title="t", notes=["on paper"]))
    assert {"time of a step", "efficiency", "on paper", "100.0 %", "83.3 %", "41.8 %", "no plan fits"} <= set(shown)
    assert "more than 4 devices do not help" in shown


def test_sizes_of_which_none_fits() -> None:
    svg = sizes_svg([Size(devices=1, reason="too small")], title="t")
    assert "this plan" not in words(svg)
    assert "no plan fits" in words(svg)


def test_ticks() -> None:
    assert device_ticks(1) == [1]
    assert device_ticks(12) == [1, 2, 4, 8]
    assert device_ticks(4096) == [1, 4, 16, 64, 256, 1024, 4096]
    assert log_ticks(Axis(low=0.9, high=30, start=0, end=1)) == [1, 2, 5, 10, 20]
    assert log_ticks(Axis(low=0.9e-6, high=1.1, start=0, end=1)) == pytest.approx([1e-6, 1e-4, 1e-2, 1])


def test_an_axis_keeps_what_lies_beyond_at_its_end() -> None:
    axis = Axis(low=1, high=100, start=0, end=10)
    assert [axis.at(value) for value in (0.1, 1, 10, 100, 1e9)] == pytest.approx([0, 0, 5, 10, 10])
