"""Advice: each line stands where its sum says so, and not a little beside it."""

from dataclasses import replace

import pytest

from spindle.planner.report.advice import MOST, advise, advise_after, slowest_chain
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Memory, Plan, Slice
from tests.planner.planner_graphs import cluster, graph, metaop, plan


def slice_of(name: str, *devices: int, layers: int = 1, start_s: float = 0.0, end_s: float = 1.0) -> Slice:
    return Slice(metaop=name, first_layer=0, num_layers=layers, devices=devices, start_s=start_s, end_s=end_s)


def about(found: Plan, **known: object) -> list[str]:
    return [advice.about for advice in advise(found, **known)]  # type: ignore[arg-type]


def scaling() -> MetaGraph:
    """One MetaOp that scales without end, of which four devices are not the last count."""
    return graph(metaop("t.a", times={1: 8.0, 2: 4.0, 4: 2.0}))


def full(**changes: object) -> Plan:
    """Four devices, all busy for two seconds."""
    found = plan(slice_of("t.a", 0, 1, 2, 3, end_s=2.0), metagraph=None)
    return replace(found, **changes)  # type: ignore[arg-type]


def test_nothing_to_say() -> None:
    """A busy plan that beats the baselines."""
    assert advise(full(baselines_s=(("sequential", 4.0),))) == ()


@pytest.mark.parametrize(("usual_s", "said"), [(2.0, True), (2.04, True), (2.05, False)])
def test_plain_data_parallelism(usual_s: float, said: bool) -> None:
    """Within two per cent it is as good; whole steps count where they are known."""
    assert ("as-good" in about(full(baselines_s=(("sequential", usual_s),)))) == said
    steps = full(step_s=4.0, baselines_s=(("sequential", 2.0),), baseline_steps_s=(("sequential", 2 * usual_s),))
    assert ("as-good" in about(steps)) == said


@pytest.mark.parametrize(("peak", "said"), [(75e9, False), (77e9, True)])
def test_memory_that_libraries_take(peak: float, said: bool) -> None:
    """4 GB of 80 are not the plan's."""
    found = full(memory=Memory(peak_bytes_per_device=(1e9, peak, 1e9, 1e9)), cluster=cluster())
    assert about(found) == (["memory"] if said else [])
    if said:
        assert advise(found)[0].text.startswith("device 1 is filled to 96%")


@pytest.mark.parametrize(
    ("recompute", "shard_optimizer", "remedy"),
    [
        (False, False, "shard the optimizer, or recompute"),
        (False, True, "recompute"),
        (True, False, "shard the optimizer"),
        (True, True, "smaller batches, or more devices"),
    ],
)
def test_what_is_chosen_already_is_not_advised(recompute: bool, shard_optimizer: bool, remedy: str) -> None:
    memory = Memory(peak_bytes_per_device=(77e9, 1e9, 1e9, 1e9))
    found = full(memory=memory, cluster=cluster(), recompute=recompute, shard_optimizer=shard_optimizer)
    assert advise(found)[0].text.endswith(f"more: {remedy}")


def batch_of_six(*, scales: bool = True) -> Plan:
    """Three of four devices at the largest count that six samples allow."""
    times = {1: 6.0, 2: 3.0, 3: 2.0 if scales else 2.9}
    found = plan(slice_of("t.a", 0, 1, 2, end_s=2.0), metagraph=graph(metaop("t.a", times=times)))
    return replace(found, metagraph=found.metagraph)


def test_another_batch() -> None:
    """Said when devices idle, the task is at its largest count, and more would still help."""
    lines = advise(batch_of_six(), batches={"t": 6})
    assert lines[0].text == "task t: batch 6 runs on at most 3 of 4 devices; 8 can use all"
    assert "batch" not in about(batch_of_six(), batches={"t": 9999 * 4})  # the count is not the batch's doing
    assert "batch" not in about(batch_of_six(scales=False), batches={"t": 6})
    assert "batch" not in about(batch_of_six())


def test_devices_that_a_chain_leaves_without_use() -> None:
    """a > b take five of five seconds at their fastest; their work and c's would fill two of four devices."""
    metagraph = graph(
        metaop("t.a", times={1: 3.0}), metaop("t.b", times={1: 2.0}), metaop("t.c", times={1: 4.0}), flows="t.a>t.b"
    )
    slices = (slice_of("t.a", 0, end_s=3.0), slice_of("t.c", 1, end_s=4.0), slice_of("t.b", 0, start_s=3.0, end_s=5.0))
    lines = advise(plan(*slices, metagraph=metagraph))
    assert [line.about for line in lines] == ["devices"]
    assert lines[0].text == (
        "t.a > t.b take 5 s at their fastest: other numbers of devices save at most 0%; the work would fill 2 of 4 "
        "devices, see spindle whatif"
    )


def test_more_devices_would_help() -> None:
    """A MetaOp that has a larger count than it was given is no reason to want fewer."""
    found = plan(slice_of("t.a", 0, 1, end_s=4.0), metagraph=scaling())
    assert "devices" not in about(found)


def test_slowest_chain() -> None:
    """Each MetaOp at its fastest valid count; counts beyond the devices do not count."""
    metagraph = graph(metaop("t.a", layers=2), metaop("t.b", times={1: 5.0}), metaop("t.c"), flows="t.a>t.c t.b>t.c")
    assert slowest_chain(metagraph, 4) == (7.0, ("t.b", "t.c"))
    assert slowest_chain(metagraph, 1) == (24.0, ("t.a", "t.c"))


def test_never_more_than_two() -> None:
    """People read two lines."""
    peaks = Memory(peak_bytes_per_device=(80e9,) * 4)
    found = replace(batch_of_six(), memory=peaks, cluster=cluster(), baselines_s=(("sequential", 2.0),))
    assert about(found, batches={"t": 6}) == ["memory", "as-good"]
    assert MOST == 2


def test_after_a_run() -> None:
    """Thirty per cent over the prediction ask for measured costs; no prediction asks for nothing."""
    assert advise_after(0.0, 1.0) is None
    assert advise_after(0.1, 0.12) is None
    found = advise_after(0.1, 0.2)
    assert found is not None
    assert found.text.startswith("steps took 200.0 ms, 2.0 times the 100.0 ms planned")
