from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.planner.check import check_plan, picture, require_plan
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Certificate, Memory, Plan, SetStep, Slice
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan

# a: two layers of 1 s on devices 0 and 1, beside b: one layer of 1.5 s on 2 and 3; then loss: 0.5 s on all four
GRAPH = graph(
    metaop("a", 2, {1: 2.0, 2: 1.0}, memory={2: 40.0}),
    metaop("b", 1, {2: 1.5, 4: 1.0}, memory={2: 30.0}),
    metaop("loss", 1, {4: 0.5}),
    flows="a>loss b>loss",
)
A = piece("a", range(2), (0, 1), 0.0, 2.0)
B = piece("b", range(1), (2, 3), 0.0, 1.5)
LOSS = piece("loss", range(1), range(4), 2.0, 2.5)


def good(*slices: Slice) -> Plan:
    return plan(*(slices or (A, B, LOSS)), metagraph=GRAPH)


def test_a_good_plan_has_no_findings() -> None:
    assert check_plan(good()) == ()
    require_plan(good())


BROKEN = [
    (good(A, replace(B, devices=(1, 2)), LOSS), "device 1 runs a[0:2] from 0.0 s while b[0:1] holds it"),
    (good(A, B, replace(LOSS, start_s=1.5, end_s=2.0)), "loss[0:1] starts at 1.5 s but needs 'a', which ends at 2.0"),
    (good(replace(A, end_s=1.9), B, LOSS), "a[0:2] lasts 1.9 s but takes 2.0 s: 2 layers of 1.0 s"),
    (good(A, replace(B, devices=(2,)), LOSS), "b[0:1] runs on 1 devices; valid counts are 2, 4"),
    (good(replace(A, num_layers=1), B, LOSS), "'a' has 2 layers but the plan runs 1 of them"),
    (good(replace(A, first_layer=1), B, LOSS), "a[1:3] comes when layer 0 of 'a' is due"),
    (good(A, LOSS), "'b' has 1 layers but the plan runs 0 of them"),
    (good(A, B, replace(LOSS, devices=(1, 2, 3, 4))), "loss[0:1] runs on device 4 but the plan has 4 devices"),
    (good(A, B, replace(LOSS, metaop="gone")), "gone[0:1]: the MetaGraph has no MetaOp 'gone'"),
    (replace(good(), makespan_s=2.4), "makespan_s is 2.4 but the last slice ends at 2.5 s"),
    (replace(good(), lower_bound_s=2.6), "makespan_s is 2.5, below lower_bound_s 2.6"),
    (replace(good(), waves=good().waves[::-1]), "wave 1 stands at place 0"),
    (replace(good(), lower_bound_s=2.4, certificate=Certificate(area_price=1.0)), "its certificate proves only 2.25"),
    (replace(good(), certificate=Certificate(paths=((1.0, ("b", "a")),))), "path b -> a is not a chain"),
    (replace(good(), certificate=Certificate(through="gone")), "the certificate names 'gone'"),
    (replace(good(), memory=Memory(peak_bytes_per_device=(40.0, 40.0, 30.0, 3.0))), "device 3 needs 30 bytes"),
    (replace(good(), memory=Memory(peak_bytes_per_device=(40.0,))), "memory tells of 1 devices"),
    (replace(good(), cluster=cluster(memory_bytes=35)), "device 0 needs 0.00 GiB but 'toy' has 0.00 GiB (2 devices"),
    (replace(good(), memory=Memory(fits=False), cluster=cluster()), "memory.fits is false but 0 devices overflow"),
    (replace(good(), cluster=cluster(2, 2)), "the plan is for 4 devices, 4 a node, but the cluster has 4, 2 a node"),
]

SETS = (SetStep(share=0.4, tasks=("a",), step_s=1.0), SetStep(share=0.6, tasks=("a", "b"), step_s=2.0))
BROKEN += [
    (replace(good(), task_sets=SETS[:1]), "task_sets have 40 % of the steps together"),
    (replace(good(), task_sets=(SETS[0], replace(SETS[1], tasks=("gone",)))), "task_sets name 'gone'"),
    (replace(good(), task_sets=(SETS[0], replace(SETS[1], step_s=-1.0))), "takes -1.0 s, 0.0 s in sequence; give"),
]


# tasks a and b in turns: a on devices 0 and 1, then b on all four; each keeps what its parameters do not take
TURNS = graph(
    metaop("a", 2, {2: 1.0}, memory={2: 40.0}, layer_param_bytes=4.0),
    metaop("b", 1, {4: 1.0}, memory={4: 30.0}, layer_param_bytes=5.0),
)
FIRST, SECOND = piece("a", range(2), (0, 1), 0.0, 2.0), piece("b", range(1), range(4), 2.0, 3.0)
PEAKS = Memory(peak_bytes_per_device=(2 * 8.0 + 10.0 + 24.0,) * 2 + (30.0,) * 2)  # of a 24 bytes wait, of b 20


def turned(*slices: Slice, turns: tuple[tuple[str, ...], ...] = (("a",), ("b",)), metagraph: MetaGraph = TURNS) -> Plan:
    made = plan(*(slices or (FIRST, SECOND)), metagraph=metagraph)
    return replace(made, turns=turns, memory=PEAKS)


def test_a_good_plan_in_turns_has_no_findings() -> None:
    """The activations of only one turn are kept: at once devices 0 and 1 would hold 70 bytes, not 50."""
    assert check_plan(turned()) == ()
    assert any("device 0 needs 70 bytes but the plan says 50" in str(found) for found in check_plan(turned(turns=())))


FLOWING = graph(*TURNS.metaops, flows="a>b")
BROKEN += [
    (turned(turns=(("b",), ("a",))), "turns run tasks b, a, but one process runs a, b in this order"),
    (turned(metagraph=FLOWING), "'a' of turn 0 hands data to 'b' of turn 1; tasks that do so are in one turn"),
    (
        turned(piece("a", range(2), (0, 1), 0.0, 2.5), replace(SECOND, start_s=2.0, end_s=3.0)),
        "b[0:1] of turn 1 starts at 2.0 s, before a[0:2] of an earlier turn ends at 2.5 s",
    ),
    (
        replace(turned(), memory=Memory(peak_bytes_per_device=(46.0,) * 2 + (30.0,) * 2)),
        "device 0 needs 50 bytes but the plan says 46",
    ),
]


def test_activations_that_a_metaop_states_are_those_of_a_turn() -> None:
    """a says that 30 bytes of the whole batch wait for backward, so 15 on each of two devices, and not 24."""
    stated = MetaGraph((replace(TURNS.metaops[0], kept_bytes=30.0), *TURNS.metaops[1:]))
    peaks = (40.0 + 30.0 - min(15.0, 20.0),) * 2 + (30.0,) * 2
    made = replace(turned(metagraph=stated), memory=Memory(peak_bytes_per_device=peaks))
    assert check_plan(made) == ()


def test_a_step_in_turns_is_checked() -> None:
    """Forward and backward of a take 2 s, then those of b 1 s; then 8 bytes of a's gradients go between two devices in
    8 s, and b's 5 between four in 7.5 s. At once b would begin its backward before a, and the step would be as long.
    """
    made = replace(turned(), cluster=cluster(), step_s=18.5, reduction_s=15.5)
    assert check_plan(made) == ()
    late = replace(made, step_s=19.5)
    assert any("step_s is 19.5 but the slices take 18.5" in str(found) for found in check_plan(late))


@pytest.mark.parametrize(("broken", "finding"), BROKEN)
def test_each_broken_rule_is_found(broken: Plan, finding: str) -> None:
    assert any(finding in str(f) for f in check_plan(broken)), [str(f) for f in check_plan(broken)]


def test_layers_must_not_overlap_in_time() -> None:
    """Layer 1 of a starts on other devices before layer 0 has ended."""
    first = piece("a", range(0, 1), (0, 1), 0.0, 1.0)
    second = piece("a", range(1, 2), (2, 3), 0.5, 1.5)
    found = check_plan(plan(first, second, metagraph=MetaGraph(GRAPH.metaops[:1])))
    assert str(found[0]) == "a[1:2] starts at 0.5 s, before the layers in front of it end"


def test_transfers_count_when_the_cluster_is_known() -> None:
    """8 bytes from two devices to four take 4 s each way, so the loss's half second is too short."""
    sending = replace(GRAPH.metaops[0], output_bytes=8.0, memory_bytes=())
    metagraph = MetaGraph((sending, *GRAPH.metaops[1:]), GRAPH.flows)
    made = replace(good(), metagraph=metagraph)
    assert check_plan(made) == ()
    (found,) = check_plan(made, cluster=cluster())
    assert "loss[0:1] lasts 0.5 s but takes 8.5 s: 1 layers of 0.5 s and 8.0 s of transfers" in str(found)


def test_a_plan_cannot_beat_the_obvious_bounds() -> None:
    """Without a certificate: six layers of 2 device-seconds do not fit four devices in 2.5 s."""
    heavy = MetaGraph((replace(GRAPH.metaops[0], layers=6), *GRAPH.metaops[1:]), GRAPH.flows)
    texts = [str(f) for f in check_plan(good(), heavy)]
    assert "makespan_s is 2.5 but device time alone takes 4.25 s" in texts


def test_slices_of_a_wave_start_together() -> None:
    wave = replace(good().waves[0], slices=(A, replace(B, start_s=0.25, end_s=1.75)))
    (found,) = check_plan(replace(good(), waves=(wave, *good().waves[1:])))
    assert "b[0:1] starts at 0.25 s in wave 0, which starts at 0.0 s" in str(found)


def test_the_error_shows_the_picture() -> None:
    """The broken rows are marked."""
    with pytest.raises(PlanError) as caught:
        require_plan(good(A, B, replace(LOSS, start_s=1.5, end_s=2.0)))
    rows = str(caught.value).splitlines()
    assert rows[1] == "wave    0    0.000000 ..   2.000000 s  a[0:2] on 0-1, b[0:1] on 2-3 <-- here"
    assert rows[2] == "wave    1    1.500000 ..   2.000000 s  loss[0:1] on 0-3 <-- here"


def test_a_picture_without_marks_shows_the_first_waves() -> None:
    assert picture(good(), ()).count("\n") == 1


def test_what_backward_computes_again_stands_once_regression() -> None:
    """a keeps 16 of its 40 bytes and b 6 of its 30; one layer that is computed again needs 24 more at a time."""
    metaops = (replace(metaop, recomputed_bytes=48.0) for metaop in GRAPH.metaops[:2])
    metagraph = MetaGraph((*metaops, GRAPH.metaops[2]), GRAPH.flows)
    on_one = plan(A, replace(B, devices=(0, 1), start_s=2.0, end_s=3.5), metagraph=metagraph, num_devices=2)
    made = replace(on_one, memory=Memory(peak_bytes_per_device=(16.0 + 6.0 + 24.0,) * 2))
    assert not any("bytes" in str(finding) for finding in check_plan(made))
    told = replace(made, memory=Memory(peak_bytes_per_device=(70.0, 70.0)))
    assert any("device 0 needs 46 bytes but the plan says 70" in str(finding) for finding in check_plan(told))
