"""Costs of batches of other sizes: the mean of steps, the slowest part, and times between measured sizes."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.cost.bands import band
from spindle.cost.measured.family import Curve, curves_of
from spindle.cost.measured.heldout import held_out, left_out_sizes
from spindle.cost.metaops import with_costs
from spindle.cost.sampled import cost_steps
from spindle.cost.scaled import scaled
from spindle.cost.sources import INTERPOLATED_ERROR, NINE_OF_TEN, cost_sources
from spindle.files.clusterfile import parse_cluster
from spindle.values.cluster import Cluster
from spindle.values.contract import contract, contract_like
from spindle.values.graph import Operator, TaskGraph, TensorSpec
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import Profile, ProfileEntry
from spindle.values.units import SAMPLES, Units, shares

FAMILY = "Layer~1"


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One node."""
    return parse_cluster("1x4:a100-80g")


def layer(index: int, work: float, units: Units | None = None, kind: str = "Layer-1") -> Operator:
    """A layer of eight samples with so many FLOPs forward, each 1e6 of which hand on 1000 bytes."""
    out = TensorSpec(name=f"t/{index}", shape=(8, int(work / 1e6 * 1000 / 32)), dtype="float32", unit="patches")
    return Operator(
        name=f"t.layers.{index}",
        task="t",
        component="net",
        kind=kind,
        family=FAMILY,
        batch_size=8,
        inputs=(f"t/{index - 1}",) if index else (),
        outputs=(out,),
        forward_flops=work,
        backward_flops=2 * work,
        activation_bytes=int(work),
        units=units,
    )


def chain(work: float, units: Units | None = None, kind: str = "Layer-1") -> TaskGraph:
    """Three layers."""
    return TaskGraph(tuple(layer(index, work, units, kind) for index in range(3)))


def steps_of(*works: float) -> tuple[MetaGraph, tuple[MetaGraph, ...]]:
    """The MetaGraph of the first, and steps of all."""
    first = contract(chain(works[0]))
    return first, tuple(contract_like(first, chain(work)) for work in works)


def test_times_are_means_and_memory_is_of_the_largest(cluster: Cluster) -> None:
    """Flows too are means."""
    first, steps = steps_of(1e12, 3e12, 8e12)
    costed = [with_costs(step, cluster) for step in steps]
    found = cost_steps(first, steps, cluster)
    assert found.steps == tuple(costed)
    (own,) = found.metagraph
    for n, seconds in own.layer_time_s:
        assert isclose(seconds, sum(p.metaops[0].times[n] for p in costed) / 3)
        assert own.memory[n] == max(p.metaops[0].memory[n] for p in costed)
    assert isclose(own.output_bytes, sum(p.metaops[0].output_bytes for p in costed) / 3)


def test_without_steps_the_cost_is_the_plain_one(cluster: Cluster) -> None:
    """Workloads whose batches are alike are costed as ever."""
    first, _ = steps_of(1e12)
    assert cost_steps(first, (), cluster).metagraph == with_costs(first, cluster)
    steps = steps_of(1e12, 3e12)[1]
    assert cost_steps(first, steps, cluster, is_mean=True).metagraph == with_costs(first, cluster)


# -- the slowest part -------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.integers(0, 9), min_size=1, max_size=12), parts=st.integers(1, 12))
def test_the_slowest_part_is_that_of_the_bounds_that_runs_use(rows: list[int], parts: int) -> None:
    """At least the mean, and what `shares` gives."""
    units = Units({SAMPLES: (1,) * len(rows), "patches": tuple(rows)})
    bounds = shares(units, parts, rows)
    largest = max(sum(rows[low:high]) for low, high in bounds)
    expected = largest * parts / sum(rows) if sum(rows) else 1.0
    assert units.slowest("patches", parts) == pytest.approx(expected)
    assert units.slowest("patches", parts) >= 1 - 1e-12


def test_unequal_samples_make_parts_slower(cluster: Cluster) -> None:
    """Of 1 + 1 + 1 + 5 rows the best two parts have 3 and 5: a quarter more than the mean."""
    units = Units({SAMPLES: (1,) * 8, "patches": (1, 0, 1, 0, 1, 0, 5, 0)})
    even = with_costs(contract(chain(1e12)), cluster).metaops[0].times
    uneven = with_costs(contract(chain(1e12, units)), cluster).metaops[0].times
    assert uneven[1] == even[1]
    assert uneven[2] == pytest.approx(1.25 * even[2])


# -- measured sizes ---------------------------------------------------------------------------------------------------


def entry(size: float, seconds: float, count: int = 1, kind: str = "") -> ProfileEntry:
    """A measured layer, a third of it forward."""
    kind = kind or f"Layer-of-{size:g}"
    return ProfileEntry(
        kind=kind, num_devices=count, forward_s=seconds / 3, backward_s=2 * seconds / 3, family=FAMILY, size=size
    )


def total(curve: Curve, size: float) -> float:
    """Forward and backward."""
    found = curve.at(size)
    return found.forward_s + found.backward_s


sizes_and_times = st.dictionaries(st.integers(1, 1000), st.floats(0.01, 10.0), min_size=1, max_size=5)


@given(points=sizes_and_times, size=st.floats(0.5, 2000.0))
def test_curves_go_through_their_points_and_stay_positive(points: dict[int, float], size: float) -> None:
    """Between two points between their times; below the least never more than there, beyond the largest never less."""
    (curve,) = curves_of([entry(float(s), t) for s, t in points.items()]).values()
    for known, seconds in points.items():
        assert total(curve, known) == pytest.approx(seconds)
    told = total(curve, size)
    assert told > 0
    ordered = sorted(points)
    if len(ordered) > 1 and size > ordered[-1]:
        assert told >= points[ordered[-1]] * (1 - 1e-9)
    if size < ordered[0]:
        assert told <= points[ordered[0]] * (1 + 1e-9)
    for low, high in pairwise(ordered):
        if low <= size <= high:
            assert min(points[low], points[high]) * (1 - 1e-9) <= told <= max(points[low], points[high]) * (1 + 1e-9)


def test_a_kind_that_was_not_measured_is_told_by_its_family(cluster: Cluster) -> None:
    """a + b * size on each count, a + b / n between counts."""
    entries = [entry(s * 1e12, t, n) for s, t, n in ((1, 2.0, 1), (3, 4.0, 1), (1, 1.2, 4), (3, 2.2, 4))]
    times = with_costs(contract(chain(2e12)), cluster, Profile("cuda", entries=tuple(entries))).metaops[0].times
    assert times[1] == pytest.approx(3.0)
    assert times[4] == pytest.approx(1.7)
    assert times[2] == pytest.approx(1.7 + (3.0 - 1.7) / 3)


@pytest.mark.parametrize("factor", [Fraction(1, 2), Fraction(2)])
def test_a_profile_of_one_batch_gives_costs_of_another(cluster: Cluster, factor: Fraction) -> None:
    """A device knows its share alone: half the batch on two devices is the whole one on four."""
    seconds = {1: 9.0, 2: 5.0, 4: 3.5}  # of shares 8, 4 and 2: no line goes through these
    profile = Profile("cuda", entries=tuple(entry(8e12, t, n, kind="Layer-1") for n, t in seconds.items()))
    other = scaled(contract(chain(8e12)), factor)
    assert other is not None
    times = with_costs(other, cluster, profile).metaops[0].times
    for count in times:
        share = count / factor
        if share in seconds:
            assert times[count] == pytest.approx(seconds[int(share)])
    (source,) = cost_sources(with_costs(other, cluster, profile), profile)
    assert source.source == "interpolated"


def test_a_measured_kind_of_a_fixed_shape_is_taken_as_it_is(cluster: Cluster) -> None:
    """Whatever its family says."""
    profile = Profile("cuda", entries=(entry(1e12, 2.0), entry(3e12, 4.0), entry(2e12, 9.0, kind="Layer-1")))
    assert with_costs(contract(chain(2e12)), cluster, profile).metaops[0].times[1] == pytest.approx(9.0)


def test_the_error_of_other_sizes_is_that_of_points_left_out() -> None:
    """10 where the line says 8; where no point is inside, what published curves had."""
    entries = (entry(1e12, 6.0), entry(2e12, 10.0), entry(3e12, 10.0))
    (row,) = left_out_sizes(FAMILY, entries)
    assert row.error == pytest.approx(-0.2)
    assert [r.what for r in held_out(Profile("cuda", entries=entries))] == [f"{FAMILY}, other sizes"]
    metagraph = with_costs(contract(chain(2.5e12)), parse_cluster("1x1:a100-80g"))
    (source,) = cost_sources(metagraph, Profile("cuda", entries=entries))
    assert source.source == "interpolated"
    wide = band("profiled").wider(NINE_OF_TEN * 0.2)
    assert (source.band.low, source.band.high) == pytest.approx((wide.low, wide.high))
    (source,) = cost_sources(metagraph, Profile("cuda", entries=entries[:2]))
    assert source.band == band("profiled").wider(NINE_OF_TEN * INTERPOLATED_ERROR)


def test_an_operator_without_flops_goes_by_its_bytes() -> None:
    """A lookup's work is what it moves."""
    plain = layer(0, 1e6)
    assert plain.size == 1e6
    assert replace(plain, forward_flops=0.0, input_bytes=100).size == 100 + plain.output_bytes
