import pytest

from spindle.planner.bounds.bound import certified_s, lower_bound
from spindle.planner.problem import make_problem
from spindle.values.plan import Certificate
from tests.planner.planner_graphs import cluster, graph, metaop

FLAT = {1: 1.0, 4: 0.9}


def test_area_decides_when_nothing_else_does() -> None:
    """Two chains of 8 s on one device, perfectly divisible, on four devices: 4 s."""
    bound = lower_bound(make_problem(graph(metaop("a"), metaop("b")), cluster()))
    assert bound.bound_s == pytest.approx(4.0)


def test_the_longest_chain_decides_when_more_devices_do_not_help() -> None:
    """a then b, 0.9 s each at best; c alone could run beside them."""
    metagraph = graph(metaop("a", times=FLAT), metaop("b", times=FLAT), metaop("c", times=FLAT), flows="a>b")
    bound = lower_bound(make_problem(metagraph, cluster(per_node=16)))
    assert bound.bound_s == pytest.approx(1.8)


def test_allot_beats_area_and_path() -> None:
    """Three MetaOps of 4 s on one device or 2.5 s on two, on four devices.

    Area says 3 * 4 / 4 = 3 s and the path 2.5 s. Each splits its layer, a share x on two devices: it takes 4 - 1.5 x
    seconds and 4 + x device-seconds, so 4 - 1.5 x = 3 (4 + x) / 4 at x = 4/9 and C = 10/3 s.
    """
    problem = make_problem(graph(*(metaop(name, 1, {1: 4.0, 2: 2.5}) for name in "abc")), cluster())
    bound = lower_bound(problem)
    assert bound.kind == "allot"
    assert bound.bound_s == pytest.approx(10 / 3)


def test_head_and_tail_beat_the_whole_graph() -> None:
    """Four encoders of 8 device-seconds, a backbone of 9 s on any count, four decoders: 8 + 9 + 8 on four devices."""
    encoders = [metaop(f"e{i}") for i in range(4)]
    decoders = [metaop(f"d{i}") for i in range(4)]
    flows = " ".join([*(f"e{i}>b" for i in range(4)), *(f"b>d{i}" for i in range(4))])
    metagraph = graph(*encoders, metaop("b", times={1: 9.0}), *decoders, flows=flows)
    bound = lower_bound(make_problem(metagraph, cluster()))
    assert bound.kind == "headtail"
    assert bound.bound_s == pytest.approx(25.0)
    assert bound.certificate.through == "b"


@pytest.mark.parametrize(
    "certificate", [Certificate(area_price=0.3, paths=((0.5, ("a", "b")),)), Certificate(paths=((2.0, ("b",)),))]
)
def test_any_prices_prove_something_true(certificate: Certificate) -> None:
    """The best schedule of a (8 s on one device) then b is 2 + 2 s; no prices prove more."""
    problem = make_problem(graph(metaop("a"), metaop("b"), flows="a>b"), cluster())
    assert 0 < certified_s(problem, certificate, range(2)) <= 4.0 + 1e-12
