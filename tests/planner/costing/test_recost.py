"""Costing a plan again: without changes it is the plan's own step, with them what planning would say of its slices."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from spindle.cost.bands import BandSource, band, factor_bands
from spindle.errors import ProfileError, SpindleWarning
from spindle.files.clusterfile import parse_cluster
from spindle.planner.recost import Costs
from spindle.planner.report.likely import gain_lines, likely_lines
from spindle.spec.file import parse_workload
from spindle.values.calibration import Calibration, MeasuredStep
from spindle.values.cost_options import CostOptions
from spindle.values.plan import Plan
from spindle.verbs.calibrating import make_calibration
from spindle.verbs.planning import plan_source, with_outlook
from spindle.verbs.source import Source, load_source, scaled_source, spec_source

SPEC = """
format: spindle.workload
version: 1
name: two
components:
  eye: {layers: 12, hidden: 1024, heads: 16, tokens: 196}
  ear: {layers: 6, hidden: 512, heads: 8, tokens: 64}
  mind: {layers: 4, hidden: 1024, heads: 16, tokens: 64}
tasks:
  see: {batch_size: 64, flow: [eye, mind]}
  hear: {batch_size: 32, flow: [ear]}
"""
CLUSTER = parse_cluster("2x4:a100-80g")
FACTORS = [{"compute": 2.0}, {"host": 3.0}, {"network": 0.25}, {"compute": 0.7, "host": 0.5, "network": 4.0}]


@pytest.fixture(scope="module")
def source() -> Source:
    return spec_source(parse_workload(SPEC))


def factors(**given: float) -> Calibration:
    return replace(Calibration(device="a100-80g"), **given)  # type: ignore[arg-type]


def costs(source: Source, cost_options: CostOptions) -> Costs:
    return Costs(source.metagraph, CLUSTER, cost_options, None, source.steps, source.is_mean)


@pytest.mark.parametrize("method", ["sequential", "task_split", "lp"])
def test_unchanged_costs_give_the_plans_own_step(source: Source, method: str) -> None:
    plan, cost_options = plan_source(source, CLUSTER, method=method, time_limit_s=0.1)
    found = costs(source, cost_options).under().step_s(plan)
    assert found == pytest.approx(plan.step_s)


@pytest.mark.parametrize("given", FACTORS, ids=str)
def test_changed_costs_give_what_planning_under_them_says(source: Source, given: dict[str, float]) -> None:
    """Where the same slices are planned, the step is the same; else it is no longer than that of the old slices."""
    plan, cost_options = plan_source(source, CLUSTER, method="sequential")
    changed, _ = plan_source(source, CLUSTER, calibration=factors(**given), method="sequential")
    again = costs(source, cost_options).under(factors(**given)).step_s(plan)
    assert again is not None
    assert changed.step_s <= again * (1 + 1e-9)
    alike = [s.devices for s in changed.slices] == [s.devices for s in plan.slices]
    if alike and changed.bucket_bytes == plan.bucket_bytes:
        assert changed.step_s == pytest.approx(again)


def test_the_fixed_part_counts_for_all(source: Source) -> None:
    """In the step, in the baselines and in the gain."""
    plan, _ = plan_source(source, CLUSTER, method="task_split")
    slow, _ = plan_source(source, CLUSTER, calibration=factors(step_s=1.0), method="task_split")
    assert slow.expected_s == pytest.approx(plan.expected_s + 1)
    for (name, seconds), (same, before) in zip(slow.usual_ways, plan.usual_ways, strict=True):
        assert name == same
        assert seconds == pytest.approx(before + 1)


def test_a_batch_that_no_longer_divides(source: Source) -> None:
    """Half of 8 samples do not run on 8 devices: there is no number to tell."""
    spec = parse_workload(SPEC.replace("batch_size: 32", "batch_size: 8"))
    plan, cost_options = plan_source(spec_source(spec), CLUSTER, method="sequential")
    half = scaled_source(spec_source(spec), Fraction(1, 2))
    assert half is not None
    eight = [s for s in plan.slices if s.metaop.startswith("hear.") and len(s.devices) == 8]
    assert (costs(half, cost_options).under().step_s(plan) is None) == bool(eight)


# -- outlook ---------------------------------------------------------------------------------------------------------


def outlook(source: Source, method: str = "auto", calibration: Calibration | None = None) -> Plan:
    plan, cost_options = plan_source(source, CLUSTER, calibration=calibration, method=method, time_limit_s=0.3)
    return with_outlook(plan, source, cost_options, calibration=calibration)


def test_the_band_of_a_step_is_that_of_its_source(source: Source) -> None:
    names: tuple[BandSource, ...] = ("predicted", "calibrated")
    for given, name in zip((None, factors(step_s=0.2)), names, strict=True):
        found = outlook(source, "sequential", given)
        assert found.outlook is not None
        ends = band(name)
        assert found.outlook.source == name
        assert found.outlook.low_s == pytest.approx(found.fixed_s + ends.low * (found.step_s - found.fixed_s))
        assert found.outlook.high_s == pytest.approx(found.fixed_s + ends.high * (found.step_s - found.fixed_s))


def test_a_gain_and_its_band(source: Source) -> None:
    """The gain is the one printed; its band holds what planning finds under each factor alone, for these slices."""
    found = outlook(source)
    assert found.outlook is not None
    gain = found.outlook.gain
    assert gain is not None
    usual = min(seconds for name, seconds in found.usual_ways if name != "paper")
    assert gain.share == pytest.approx(1 - found.expected_s / usual)
    assert gain.low <= gain.share <= gain.high
    assert [each.name for each in gain.moves] == ["host", "network", "batch"]
    assert all(each.as_is == gain.share for each in gain.moves)
    cost_options = replace(source.cost_options, shard_optimizer=found.shard_optimizer, recompute=found.recompute)
    most = factor_bands()["network"].high
    slow = costs(source, cost_options).under(factors(network=most)).step_s(found)
    assert slow is not None
    assert slow > found.step_s


def test_unproven_gains_say_what_would_tell(source: Source) -> None:
    """By what leaves the gain open: batches or devices to calibrate on, a profile, or runs."""
    found = outlook(source)
    assert found.outlook is not None
    assert found.outlook.gain is not None
    texts = {
        "batches": "measured steps of two batches on 8 GPUs would show (spindle calibrate w.yaml --cluster 2x4",
        "devices": "measured steps of one batch on 8 and 4 GPUs would show",
        "profile": "spindle profile w.yaml --cluster 2x4 -o profile.json would show",
        "runs": "only runs would show: spindle train --plan",
    }
    for proof, text in texts.items():
        gain = replace(found.outlook.gain, share=0.05, low=-0.01, high=0.1, proof=proof)  # type: ignore[arg-type]
        lines = gain_lines(replace(found, outlook=replace(found.outlook, gain=gain)), "w.yaml", "2x4")
        assert max(map(len, lines)) <= 100
        shown = " ".join(" ".join(lines).split())
        assert f"5.0 % shorter than with {gain.baseline}; likely -1.0 to 10.0 %: unproven; {text}" in shown
    proven = replace(found.outlook.gain, share=0.05, low=0.02, high=0.1, proof="")
    text = " ".join(gain_lines(replace(found, outlook=replace(found.outlook, gain=proven))))
    assert "unproven" not in text


def test_nothing_is_told_that_was_not_asked_for(source: Source) -> None:
    found = plan_source(source, CLUSTER, method="sequential")[0]
    assert [*likely_lines(found), *gain_lines(found)] == []


# -- calibration by plans --------------------------------------------------------------------------------------------


def steps(source_text: str, truth: Calibration, rows: list[tuple[int, int]]) -> list[MeasuredStep]:
    """Steps as a cluster would measure them on which the truth holds."""
    found = []
    for gpus, batch in rows:
        row = MeasuredStep(gpus=gpus, per_gpu_batch=batch, seconds=1.0)
        where = replace(CLUSTER, nodes=gpus // 4)
        plan, _ = plan_source(load(source_text, row), where, calibration=truth, method="sequential")
        found.append(replace(row, seconds=plan.expected_s))
    return found


def load(text: str, row: MeasuredStep) -> Source:
    from spindle.spec.batch import per_device

    return spec_source(per_device(parse_workload(text), row.per_gpu_batch, row.gpus))


def test_calibration_finds_other_steps() -> None:
    """Two batches and two numbers of nodes tell a third of each within 5 %."""
    truth = factors(compute=1.4, network=2.0, step_s=0.01)
    known = steps(SPEC, truth, [(4, 12), (4, 96), (8, 12)])
    found = make_calibration(lambda row, _: load(SPEC, row), CLUSTER, known)
    assert all(abs(row.error) < 0.05 for row in found.rows)
    assert (found.device, found.method) == ("a100-80g", "sequential")
    for step in steps(SPEC, truth, [(4, 48), (16, 24)]):
        where = replace(CLUSTER, nodes=step.gpus // 4)
        plan, _ = plan_source(load(SPEC, step), where, calibration=found, method="sequential")
        assert plan.expected_s == pytest.approx(step.seconds, rel=0.05)


def test_no_rows() -> None:
    with pytest.raises(ProfileError, match="no measured step is given to calibrate on; give at least two"):
        make_calibration("w.yaml", CLUSTER, [])


def test_rows_that_fit_in_different_ways_warn() -> None:
    """A batch that only fits recomputed was hardly run by the same program."""
    big = SPEC.replace("layers: 12, hidden: 1024", "layers: 24, hidden: 2048")
    rows = [MeasuredStep(gpus=4, per_gpu_batch=batch, seconds=s) for batch, s in ((12, 1.0), (1200, 60.0))]
    with pytest.warns(SpindleWarning, match="fit memory in different ways .*batch 1200 each with"):
        make_calibration(lambda row, _: load(big, row), CLUSTER, rows)


def test_starvla_from_two_rows() -> None:
    """Of the table of batches the third, which no row of the file has, comes within 5 %."""
    root = Path(__file__).parents[3] / "benchmarks"
    from spindle.files.calibrationfile import read_steps

    spec, cluster = str(root / "workloads" / "starvla_gr00t.yaml"), parse_cluster("1x8:a100-80g")
    found = make_calibration(spec, cluster, read_steps(root / "data" / "starvla_a100.csv", "batch").rows)
    assert all(abs(row.error) < 0.02 for row in found.rows)
    source = load_source(spec, per_device=(8, 8))
    plan, _ = plan_source(source, cluster, calibration=found, method="sequential")
    assert plan.expected_s == pytest.approx(1.131, rel=0.05)
    told = [
        plan_source(load_source(spec, per_device=(b, 8)), cluster, calibration=found, method="sequential")[0].expected_s
        for b in (2, 4, 8, 12, 16, 20, 24)
    ]
    slopes = [(after - before) / n for (before, after), n in zip(pairwise(told), (2, 4, 4, 4, 4, 4), strict=True)]
    assert min(slopes) > 0.8 * max(slopes)  # without a jump where another memory choice would begin
