import pytest

from spindle.planner.costing.traffic import transfer_s
from tests.planner.planner_graphs import cluster

NODES = cluster(2, 4)  # 1 byte/s inside, 0.1 between


def test_a_transfer_is_shared_by_the_smaller_set() -> None:
    assert transfer_s(NODES, 8.0, (0, 1), (0, 1)) == 0
    assert transfer_s(NODES, 8.0, (0, 1), (2, 3)) == 4.0
    assert transfer_s(NODES, 8.0, (0, 1), (0, 1, 2, 3)) == 4.0
    assert transfer_s(NODES, 8.0, (0, 1), (4, 5)) == pytest.approx(40.0)
    assert transfer_s(NODES, 0.0, (0, 1), (4, 5)) == 0
