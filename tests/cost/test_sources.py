"""Where costs come from, and the error bar of a makespan."""

from dataclasses import replace

import pytest

from spindle.cost.bands import EXACT, Band, band, between
from spindle.cost.metaops import with_costs
from spindle.cost.sources import (
    INTERPOLATED_ERROR,
    NINE_OF_TEN,
    cost_sources,
    leave_one_out_error,
    step_band,
)
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.contract import contract
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Slice, without_operators
from spindle.values.profile import Profile, ProfileEntry

SPEC = """
format: spindle.workload
version: 1
name: text
components:
  text: {layers: 2, hidden: 64, heads: 2, tokens: 16}
tasks:
  t: {batch_size: 8, flow: [text]}
"""
CLUSTER = parse_cluster("1x8:a100-80g")


@pytest.fixture(scope="module")
def graph() -> MetaGraph:
    return contract(build_graph(parse_workload(SPEC)))


def profile(graph: MetaGraph, *counts: int) -> Profile:
    kind = graph["t.text"].operators[0].kind
    return Profile("x", entries=tuple(_entry(kind, n, 1.0 / n) for n in counts))


def _entry(kind: str, count: int, total_s: float) -> ProfileEntry:
    return ProfileEntry(kind=kind, num_devices=count, forward_s=total_s / 4, backward_s=total_s * 3 / 4)


@pytest.mark.parametrize(
    ("counts", "source", "expected"),
    [
        ((), "predicted", band("predicted")),
        ((1, 2, 4, 8), "measured", band("profiled")),
        ((1, 8), "interpolated", band("profiled").wider(NINE_OF_TEN * INTERPOLATED_ERROR)),  # two points say no error
        ((1, 4, 8), "interpolated", band("profiled")),  # exact hyperbola: never better than measuring
        ((2, 4), "scaled", between(band("profiled"), band("predicted"))),
    ],
)
def test_sources(graph: MetaGraph, counts: tuple[int, ...], source: str, expected: Band) -> None:
    measured = profile(graph, *counts)
    found = cost_sources(with_costs(graph, CLUSTER, measured), measured)[0]
    assert found.source == source
    assert (found.band.low, found.band.high) == pytest.approx((expected.low, expected.high))
    assert found.timed == counts
    assert f"t.text: {source}" in str(found)


def test_times_from_a_file_are_given(graph: MetaGraph) -> None:
    assert cost_sources(without_operators(with_costs(graph, CLUSTER)))[0].source == "given"


def test_what_is_predicted_may_be_calibrated(graph: MetaGraph) -> None:
    """What was measured stays so."""
    measured = profile(graph, 1, 2, 4, 8)
    assert cost_sources(with_costs(graph, CLUSTER), is_calibrated=True)[0].source == "calibrated"
    assert cost_sources(with_costs(graph, CLUSTER, measured), measured, is_calibrated=True)[0].source == "measured"


def test_leave_one_out() -> None:
    """A point twice as high as its neighbors' hyperbola says is missed by half."""
    entries = {n: _entry("k", n, t) for n, t in ((1, 1.0), (2, 1.0), (4, 0.25))}
    assert leave_one_out_error(entries) == pytest.approx(0.5)


def test_band_is_weighted_by_device_time(graph: MetaGraph) -> None:
    measured = cost_sources(with_costs(graph, CLUSTER, profile(graph, 1, 2, 4, 8)), profile(graph, 1, 2, 4, 8))[0]
    one, other = replace(measured, band=Band(0.9, 1.2)), replace(measured, metaop="other", band=Band(0.5, 2.0))
    three = Slice(metaop="t.text", first_layer=0, num_layers=1, devices=(0, 1, 2), start_s=0.0, end_s=1.0)
    alone = Slice(metaop="other", first_layer=0, num_layers=1, devices=(3,), start_s=0.0, end_s=1.0)
    assert step_band([three, alone], [one, other]) == Band((3 * 0.9 + 0.5) / 4, (3 * 1.2 + 2.0) / 4)
    assert step_band([], []) == EXACT
