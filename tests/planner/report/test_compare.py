from dataclasses import replace

import pytest

from spindle.errors import ClusterError
from spindle.planner.report.compare import compare, render_difference
from spindle.planner.report.figures import WIDTH
from spindle.planner.report.sizes import enough, plan_sizes, render_sizes, resized, sizes
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.plan import Plan
from tests.planner.planner_graphs import cluster, graph, metaop, piece
from tests.planner.planner_graphs import plan as by_hand

TWO = graph(metaop("t.a", 2, {1: 1.0, 2: 0.6}), metaop("t.b", 2, {1: 1.0, 2: 0.6}))


def test_equal_plans_have_no_changes() -> None:
    plan = solve(TWO, cluster())
    found = compare(plan, plan)
    assert (found.changes, found.same) == ((), 2)
    assert "all 2 MetaOps run alike" in render_difference(found)


def test_what_changed_is_named() -> None:
    """b moves from one device to two and ends earlier; c is new."""
    before = by_hand(piece("t.a", range(2), (0,), 0, 2), piece("t.b", range(2), (1,), 0, 2))
    after = by_hand(
        piece("t.a", range(2), (0,), 0, 2), piece("t.b", range(2), (1, 2), 0, 1.2), piece("t.c", range(1), (3,), 0, 1)
    )
    found = compare(before, after)
    assert found.same == 1
    assert [c.metaop for c in found.changes] == ["t.b", "t.c"]
    assert found.changes[0].after is not None
    assert found.changes[0].after.slices == ((2, 2),)
    assert found.changes[1].before is None
    assert max(map(len, render_difference(found).splitlines())) <= WIDTH


def test_sizes_say_where_devices_stop_helping() -> None:
    """Two chains that use two devices each gain nothing from more than four."""

    def solved(where: Cluster) -> Plan:
        return solve(TWO, where, time_limit_s=0.02)

    rows = plan_sizes(solved, cluster(1, 4), [4, 1, 2, 8, 16])
    assert [row.devices for row in rows] == [1, 2, 4, 8, 16]
    assert [round(row.step_s, 6) for row in rows] == [4.0, 2.0, 1.2, 1.2, 1.2]
    assert rows[2].efficiency == pytest.approx(4.0 / (4 * 1.2))
    assert enough(rows) == 4
    assert "More than 4 devices do not help" in render_sizes(rows)
    assert max(map(len, render_sizes(rows).splitlines())) <= WIDTH


def test_a_size_without_a_plan_says_why() -> None:
    wide = graph(metaop("t.a", 1, {2: 1.0}))
    rows = plan_sizes(lambda where: solve(wide, where, time_limit_s=0.01), cluster(1, 4), [1, 2])
    assert rows[0].reason.startswith("MetaOp 't.a' runs on 2 devices but the cluster has 1")
    assert rows[1].step_s == pytest.approx(1.0)
    assert enough(rows) is None


def test_clusters_grow_by_whole_nodes() -> None:
    assert (resized(cluster(2, 4), 2).nodes, resized(cluster(2, 4), 2).devices_per_node) == (1, 2)
    assert resized(cluster(2, 4), 12).nodes == 3
    with pytest.raises(ClusterError, match="6 devices are no whole number of nodes of 4"):
        resized(cluster(2, 4), 6)


def test_an_efficiency_over_100_percent_is_explained() -> None:
    """On one device the plan recomputes; on two it need not, and takes less than half as long."""
    one = replace(by_hand(piece("t.a", range(1), (0,), 0, 4)), step_s=4.0, recompute=True)
    two = replace(by_hand(piece("t.a", range(1), (0, 1), 0, 1.5)), step_s=1.5)
    rows = sizes(((1, one), (2, two)))
    assert [round(row.efficiency, 3) for row in rows] == [1.0, 1.333]
    text = render_sizes(rows)
    assert "recompute\n" in text
    says = (
        "Efficiency counts from 1 device. It is over 100 % on 2 devices, because the smaller size must save memory at "
        "the cost of time: recompute there, none here."
    )
    assert says in " ".join(text.split())
