"""Optimizers: bytes of their states, seconds of their steps, and what offloading takes from a device."""

from dataclasses import replace
from math import prod
from typing import get_args

import pytest

from spindle.cost.optimizers import BLOCK, kept_bytes_of, step_s
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.values.cost_options import CostOptions, Optimizer, memory_choices
from spindle.values.graph import Parameter

NAMES: tuple[Optimizer, ...] = get_args(Optimizer)
DEVICE = parse_cluster("1x8:a100-80g").device
MATRIX = Parameter(name="llm.0.up", shape=(4096, 1024), dtype="bfloat16")
VECTOR = Parameter(name="llm.0.vectors", shape=(4096,), dtype="bfloat16")
TABLE = Parameter(name="llm.embedding", shape=(4096, 1024), dtype="bfloat16")


def states(parameter: Parameter, optimizer: Optimizer) -> float:
    """Bytes beside the master copy."""
    return kept_bytes_of(parameter, CostOptions(optimizer=optimizer)) - 4 * prod(parameter.shape)


@pytest.mark.parametrize(
    ("optimizer", "matrix", "vector"),
    [
        ("sgd", 0.0, 0.0),
        ("sgd_momentum", 4.0, 4.0),
        ("lion", 4.0, 4.0),
        ("adam", 8.0, 8.0),
        ("adamw", 8.0, 8.0),
        ("adamw_8bit", 2 + 8 / 256, 2 + 8 / 256),
        ("adafactor", 4 * (4096 + 1024) / (4096 * 1024), 4.0),
        ("muon", 4.0, 8.0),
        ("shampoo", 8 + 4 * (4 * 4 * 1024**2) / (4096 * 1024), 8.0),
    ],
)
def test_bytes_of_states_by_element(optimizer: Optimizer, matrix: float, vector: float) -> None:
    """Of a matrix of four square blocks (Shampoo: two statistics and two roots a block) and of a vector."""
    assert BLOCK == 1024
    assert states(MATRIX, optimizer) / prod(MATRIX.shape) == pytest.approx(matrix)
    assert states(VECTOR, optimizer) / prod(VECTOR.shape) == pytest.approx(vector)


def test_muon_leaves_tables_to_adamw() -> None:
    assert states(TABLE, "muon") == states(TABLE, "adamw")


def test_states_of_wide_parameters_are_as_wide() -> None:
    """No master copy beside four bytes; states of eight bytes beside eight."""
    for dtype, width in (("float32", 4), ("float64", 8)):
        wide = replace(MATRIX, dtype=dtype)
        assert kept_bytes_of(wide, CostOptions()) == 2 * width * prod(MATRIX.shape)


def test_steps_take_what_they_move_and_multiply() -> None:
    """SGD is the cheapest; Muon and Shampoo multiply matrices on top of what they move; vectors cost neither."""
    seconds = {name: step_s(MATRIX, DEVICE, CostOptions(optimizer=name)) for name in NAMES}
    assert min(seconds, key=lambda name: seconds[name]) == "sgd"
    assert seconds["adamw_8bit"] < seconds["adamw"] < seconds["shampoo"]
    products = 5 * (4 * 1024**2 * 4096 + 2 * 1024**3)
    rate = DEVICE.peak_flops * DEVICE.matmul_efficiency
    assert seconds["muon"] == pytest.approx(seconds["lion"] + products / rate)
    assert step_s(VECTOR, DEVICE, CostOptions(optimizer="shampoo")) == step_s(VECTOR, DEVICE, CostOptions())


def test_offloaded_states_are_on_the_host() -> None:
    """Nothing is kept on the device; gradients go, parameters come, and states move at the host's rate."""
    away = CostOptions(offload_optimizer=True)
    assert kept_bytes_of(MATRIX, away) == 0
    elements = prod(MATRIX.shape)
    assert step_s(MATRIX, DEVICE, away) == pytest.approx(elements * (4 + 28) / DEVICE.host_bytes_per_s)


def test_offload_is_the_last_choice_and_only_where_allowed() -> None:
    assert not any(choice.offload_optimizer for choice in memory_choices(CostOptions()))
    choices = memory_choices(CostOptions(may_offload=True))
    assert [choice.offload_optimizer for choice in choices] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("optimizer", NAMES)
def test_a_spec_names_any_of_them(optimizer: str) -> None:
    text = f"format: spindle.workload\nversion: 1\nname: a\noptimizer: {optimizer}\n"
    text += "components:\n  m: {kind: mlp, widths: [2, 2]}\ntasks:\n  t: {batch_size: 1, flow: [m]}\n"
    found = parse_workload(text)
    assert found.cost_options.optimizer == optimizer
