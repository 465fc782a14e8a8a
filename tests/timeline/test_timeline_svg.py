"""The static picture: well-formed XML, all that can be seen in it, and few rows for many devices."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from spindle.timeline import render_page, render_svg
from spindle.timeline.svg import MAX_ROWS, device_groups, nice_ticks
from spindle.values.plan import Plan, Slice, make_waves
from spindle.values.trace import Span, SpanKind, Trace
from tests.timeline.timeline_samples import made_up_run, planned, slowed

SVG = "{http://www.w3.org/2000/svg}"


def drawn(what: str, num_devices: int = 8, title: str = "") -> ElementTree.Element:
    plan, predicted = planned(num_devices)
    return ElementTree.fromstring(
        render_svg(
            plan,
            predicted=predicted if what in ("both", "predicted") else None,
            measured=made_up_run(plan, predicted) if what in ("both", "measured") else None,
            title=title,
        )
    )


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


@pytest.mark.parametrize("what", ["both", "predicted", "measured", "neither"])
def test_it_is_a_file_of_its_own(what: str) -> None:
    svg = drawn(what, title="Fig. 1 <a & b>")
    assert svg.tag == f"{SVG}svg"
    assert texts(svg)[0] == "Fig. 1 <a & b>"
    assert {"vision", "text", "clip", "caption"} <= set(texts(svg))
    headings = [text for text in texts(svg) if text.startswith(("Planned", "Measured", "Plan:"))]
    assert len(headings) == (2 if what == "both" else 1)


def test_nothing_leaves_the_picture() -> None:
    """Every rectangle lies inside the view box and has a width."""
    svg = drawn("both")
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    boxes = [e.attrib for e in svg.iter(f"{SVG}rect") if "x" in e.attrib]
    assert len(boxes) > 100
    for box in boxes:
        x, y, wide, high = (float(box[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width + 0.01
        assert 0 <= y <= y + high <= height + 0.01


def test_the_legend_names_what_is_drawn() -> None:
    """No optimizer and no load where the picture shows none."""
    assert "load" in texts(drawn("measured"))
    assert "load" not in texts(drawn("predicted"))
    assert {"forward", "backward", "load", "optimizer"}.isdisjoint(texts(drawn("neither")))


def test_communication_beside_computation_is_a_foot() -> None:
    """A reduction while backward runs is drawn low, on the row's lower edge, after the box that it lies over."""
    plan, _ = planned(2)
    spans = (
        Span(rank=0, kind=SpanKind.BACKWARD, name="BACKWARD s0", start_s=0.0, end_s=0.6),
        Span(rank=0, kind=SpanKind.REDUCE, name="REDUCE b0", start_s=0.3, end_s=0.8),
        Span(rank=0, kind=SpanKind.REDUCE, name="REDUCE b1", start_s=0.8, end_s=1.0),
        Span(rank=1, kind=SpanKind.STEP, name="STEP", start_s=0.0, end_s=1.0),
    )
    svg = ElementTree.fromstring(render_svg(plan, measured=Trace(num_ranks=2, source="measured", spans=spans)))
    boxes = [e.attrib for e in svg.iter(f"{SVG}rect") if e.attrib.get("fill") == "#5d6b7b"]
    (foot, high) = sorted(boxes[:2], key=lambda box: float(box["height"]))
    assert float(foot["height"]) == pytest.approx(0.3 * float(high["height"]))
    assert float(foot["y"]) + float(foot["height"]) == pytest.approx(float(high["y"]) + float(high["height"]))
    assert float(foot["x"]) < float(high["x"])


def test_what_reductions_cost_backward_has_a_name() -> None:
    """The legend tells what belongs to no slice, where there is such a thing."""
    plan, predicted = planned(8)
    slowing = Span(rank=0, kind=SpanKind.BACKWARD, name="slowed by reductions", start_s=1.0, end_s=1.1)
    told = "lost to reductions beside backward"
    for extra in ((), (slowing,)):
        spans = tuple(s for s in predicted if s.name != slowing.name)
        trace = replace(predicted, spans=(*spans, *extra))
        svg = ElementTree.fromstring(render_svg(plan, predicted=trace))
        assert (told in texts(svg)) == bool(extra)
        assert ("backward lost to reductions beside it" in render_page(plan, predicted=trace)) == bool(extra)


def test_both_panels_have_one_axis() -> None:
    """Their ticks bear the same labels at the same places."""
    svg = drawn("both")
    ticks = [(e.text, e.attrib["x"]) for e in svg.iter(f"{SVG}text") if (e.text or "").endswith(" ms")]
    assert len(ticks) > len(set(ticks))
    assert len(dict(ticks)) == len(set(ticks))


@pytest.mark.parametrize(("factor", "words"), [(10.0, "the run is drawn at 1/10"), (0.1, "the plan is drawn at 1/10")])
def test_each_panel_has_an_axis_of_its_own_where_one_step_is_far_longer(factor: float, words: str) -> None:
    """Each step then fills the width, and the second heading says how the scales compare."""
    plan, predicted = planned(8)
    run = replace(slowed(predicted, factor), source="measured")
    svg = ElementTree.fromstring(render_svg(plan, predicted=predicted, measured=run))
    (first, second) = [text for text in texts(svg) if text.startswith(("Planned", "Measured"))]
    assert words in second
    assert "scale" not in first
    devices = [e.attrib["y"] for e in svg.iter(f"{SVG}text") if e.text == "0" and e.attrib.get("text-anchor") == "end"]
    boxes = [e.attrib for e in svg.iter(f"{SVG}rect") if "x" in e.attrib and float(e.attrib["y"]) < float(devices[1])]
    upper = [box for box in boxes if float(box["y"]) < (float(devices[0]) + float(devices[1])) / 2]
    lower = [box for box in boxes if float(box["y"]) > (float(devices[0]) + float(devices[1])) / 2]
    ends = [max(float(box["x"]) + float(box["width"]) for box in panel) for panel in (upper, lower)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)


def test_up_to_twice_as_long_one_axis_serves_both() -> None:
    plan, predicted = planned(8)
    for factor in (0.51, 1.0, 1.99):
        svg = render_svg(plan, predicted=predicted, measured=replace(slowed(predicted, factor), source="measured"))
        assert "scale" not in svg


def plan_of(num_devices: int, group: int) -> Plan:
    """Groups of neighboring devices, each with a slice of its own."""
    slices = [
        Slice(metaop=f"m{i}", first_layer=0, num_layers=1, devices=tuple(range(i, i + group)), start_s=0.0, end_s=1.0)
        for i in range(0, num_devices, group)
    ]
    return Plan(num_devices=num_devices, devices_per_node=8, method="hand", waves=make_waves(slices), makespan_s=1.0)


def test_few_devices_have_a_row_each() -> None:
    assert device_groups(plan_of(MAX_ROWS, 8)) == [(device,) for device in range(MAX_ROWS)]


def test_neighbors_that_do_the_same_share_a_row() -> None:
    assert device_groups(plan_of(64, 16)) == [tuple(range(i, i + 16)) for i in (0, 16, 32, 48)]


def test_rows_stay_few_when_all_devices_differ() -> None:
    groups = device_groups(plan_of(256, 1))
    assert len(groups) <= MAX_ROWS
    assert [device for group in groups for device in group] == list(range(256))
    shown = set(texts(ElementTree.fromstring(render_svg(plan_of(256, 1)))))
    assert {"0-5", "6-11", "252-255"} <= shown  # each row has a label


@pytest.mark.parametrize(
    ("length", "ticks"), [(1.0, [0, 0.1, 0.2]), (0.9e-3, [0, 1e-4, 2e-4]), (37.0, [0, 5, 10]), (0.0, [0])]
)
def test_axes_have_round_ticks(length: float, ticks: list[float]) -> None:
    found = nice_ticks(length, 10)
    assert found[:3] == pytest.approx(ticks)
    assert len(found) <= 11


def test_a_step_of_no_length_can_be_drawn() -> None:
    plan = plan_of(2, 1)
    slices = [replace(s, end_s=0.0) for s in plan.slices]
    ElementTree.fromstring(render_svg(replace(plan, waves=make_waves(slices), makespan_s=0.0)))
