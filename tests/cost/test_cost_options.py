"""Choices and spreads: what they do to time and memory, and which are refused."""

from math import exp, sqrt

import pytest

from spindle.cost.metaops import with_costs
from spindle.errors import WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions, imbalance, length_spread, memory_choices, tail
from spindle.values.metagraph import MetaOp

SPEC = """
format: spindle.workload
version: 1
name: text
components:
  text: {layers: 6, hidden: 512, heads: 8, tokens: 128}
tasks:
  t: {batch_size: 64, flow: [text]}
"""


def costed(cost_options: CostOptions, spec: str = SPEC) -> MetaOp:
    return with_costs(
        contract(build_graph(parse_workload(spec))), parse_cluster("1x8:a100-80g"), cost_options=cost_options
    )["t.text"]


def test_recompute_trades_time_for_memory() -> None:
    """One forward more; of each layer its input is kept, of one layer all; what is handed over is such an input."""
    plain, again = costed(CostOptions()), costed(CostOptions(recompute=True))
    forward = plain.times[1] * plain.forward_fraction
    assert again.times[1] == pytest.approx(plain.times[1] + forward, rel=0.02)
    assert again.forward_fraction * again.times[1] == pytest.approx(forward)
    layer = plain.operators[0]
    saved = 6 * layer.activation_bytes - (6 * layer.input_bytes + layer.activation_bytes) + layer.output_bytes
    assert plain.memory[1] - again.memory[1] == pytest.approx(saved)


def test_choices_from_cheap_to_small() -> None:
    """Each choice of memory needs less than the one before; what is asked for already is not offered again."""
    choices = memory_choices(CostOptions(optimizer="adam"))
    assert [(c.shard_optimizer, c.recompute) for c in choices] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    memory = [costed(choice).memory[8] for choice in choices]
    assert memory[0] > memory[1]
    assert memory[2] > memory[3]
    assert min(memory) == memory[3]
    assert len(memory_choices(CostOptions(recompute=True))) == 2


def test_lengths_of_a_log_normal() -> None:
    """Mean and 99th percentile of exp(N(m, s)) with s = 0.5 give its coefficient of variation back."""
    sigma = 0.5
    p99_over_mean = exp(2.3263478740408408 * sigma - sigma**2 / 2)
    assert length_spread(100, 100 * p99_over_mean) == pytest.approx(sqrt(exp(sigma**2) - 1))
    assert length_spread(100, 100) == 0.0


@pytest.mark.parametrize(("mean", "p99"), [(100, 90), (100, 1600)])
def test_lengths_that_no_log_normal_has(mean: float, p99: float) -> None:
    with pytest.raises(WorkloadError, match="fit no log-normal"):
        length_spread(mean, p99)


def test_unequal_lengths_cost_more_on_more_devices() -> None:
    """The longest of n local batches: nothing on one device, and more the fewer samples each holds."""
    assert imbalance(0.8, 64, 1) == 1.0
    assert 1.0 < imbalance(0.8, 32, 2) < imbalance(0.8, 8, 8) < imbalance(0.8, 1, 64)
    assert tail(0.8, 1) > tail(0.8, 64) > 1.0
    even, uneven = costed(CostOptions()), costed(CostOptions(length_spread=(("t", "text", 0.8),)))
    assert uneven.times[1] == even.times[1]
    assert uneven.times[8] == pytest.approx(even.times[8] * imbalance(0.8, 8, 8))
    assert uneven.memory[1] > even.memory[1]


def test_bad_cost_options_is_refused() -> None:
    with pytest.raises(WorkloadError, match="from 1 to 0"):
        CostOptions(tensor_parallel=0)
    with pytest.raises(WorkloadError, match="from 4 to 2"):
        CostOptions(tensor_parallel=2, min_tensor_parallel=4)
    with pytest.raises(WorkloadError, match="length spread is nan"):
        CostOptions(length_spread=(("t", "text", float("nan")),))


def test_lower_precision_is_faster_on_gpus() -> None:
    """Four-byte products run at the device's float32_rate and move twice the bytes."""
    wide = SPEC.replace("name: text\n", "name: text\ndtype: float32\n", 1)
    assert 1.9 < costed(CostOptions(), wide).times[1] / costed(CostOptions()).times[1] < 2.2


def test_repeats_take_as_many_times_as_long() -> None:
    again = SPEC.replace("tokens: 128", "tokens: 128, repeats: 3")
    assert costed(CostOptions(), again).times[1] / costed(CostOptions()).times[1] == pytest.approx(3, rel=0.05)
