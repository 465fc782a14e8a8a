"""Random MetaGraphs with adversarial curves, and small clusters, for the planner's laws."""

from hypothesis import strategies as st

from spindle.values.cluster import Cluster, Device, Link
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points

COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)


def times() -> st.SearchStrategy[dict[int, float]]:
    """Seconds by count: in any order, flat, rising, super-linear, or a single count."""
    seconds = st.floats(0.01, 10.0)
    wild = st.dictionaries(st.sampled_from(COUNTS), seconds, min_size=1, max_size=6)
    flat = st.builds(lambda t, n: dict.fromkeys(range(1, n + 1), t), seconds, st.integers(1, 4))
    amdahl = st.builds(lambda a, b: {n: a + b / n for n in (1, 2, 4, 8)}, st.floats(0, 1), seconds)
    superlinear = st.builds(lambda t: {n: t / n**1.5 for n in (1, 2, 4)}, seconds)
    return st.one_of(wild, flat, amdahl, superlinear)


@st.composite
def metagraphs(
    draw: st.DrawFn, *, max_size: int = 7, traffic: bool = True, plannable: int = 0, memory: bool = False
) -> MetaGraph:
    """A DAG of up to `max_size` MetaOps; `plannable`: each has a count that is at most so large; `memory`: half of the
    graphs need memory, sometimes more than there is."""
    size = draw(st.integers(1, max_size))
    num_bytes = st.floats(0, 5.0, allow_subnormal=False) if traffic else st.just(0.0)  # half of the smallest is none
    heavy = memory and draw(st.booleans())
    metaops = []
    for i in range(size):
        seconds = draw(times())
        if plannable and min(seconds) > plannable:
            seconds[1] = draw(st.floats(0.01, 10.0))
        metaops.append(
            MetaOp(
                name=f"t{i % 3}.{i}",
                task=f"t{i % 3}",
                component=f"c{i}",
                layers=draw(st.integers(1, 6)),
                layer_time_s=points(seconds),
                layer_param_bytes=draw(num_bytes),
                output_bytes=draw(num_bytes),
                memory_bytes=points({1: draw(st.floats(0, 1.5e9))}) if heavy else (),
                parameters=draw(st.sampled_from(("", "shared"))),
            )
        )
    pairs = [(a, b) for b in range(size) for a in range(b) if draw(st.integers(0, 3)) == 0]
    return MetaGraph(tuple(metaops), tuple(Flow(metaops[a].name, metaops[b].name) for a, b in pairs))


def clusters(*, max_nodes: int = 3) -> st.SearchStrategy[Cluster]:
    """One to three nodes of one to four devices; links so slow that transfers matter."""
    return st.builds(
        lambda nodes, per_node: Cluster(
            nodes=nodes,
            devices_per_node=per_node,
            device=Device(name="toy", memory_bytes=1e9, peak_flops=1e12, memory_bytes_per_s=1e12),
            intra_node=Link(bytes_per_s=50.0, latency_s=0.001),
            inter_node=Link(bytes_per_s=5.0, latency_s=0.01),
        ),
        st.integers(1, max_nodes),
        st.integers(1, 4),
    )
