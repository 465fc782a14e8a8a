"""Heads tied to another component's embedding: pinned apart, and cut together."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from spindle.runtime.controller import prepare
from tests.parity.test_tensor_parallel import LAYOUTS, compared, laid_out, language
from tests.tiny_workloads import tokens


def tied(degree: int = 1, **options: Any) -> spindle.Workload:
    """A language model and its head as two components of one weight."""
    torch.manual_seed(0)
    made = spindle.Workload("tied")
    model: Any = language().double()
    lm: Any = made.component("lm", model.model, tensor_parallel=degree, **options)
    head = made.component("head", model.lm_head)

    @made.task("t", batch_size=4, data=[{"tokens": tokens(4, 6, seed)} for seed in range(2)])
    def task(batch: dict[str, Tensor]) -> Tensor:
        logits = head(lm(input_ids=batch["tokens"]).last_hidden_state[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    return made


def test_a_tied_head_counts_to_its_own_component_regression() -> None:
    """Pins find it, and devices that only it is pinned to run it."""
    made = tied()
    assert {operator.component for operator in capture(made).graph} >= {"lm", "head"}
    pins = {"lm": [0, 1], "head": [2, 3]}
    plan = spindle.make_plan(made, "1x4:cpu", pins=pins, time_limit_s=1.0)
    metagraph = spindle.make_metagraph(made)
    ran = {metagraph[s.metaop].component: s.devices for wave in plan.waves for s in wave.slices}
    assert (ran["lm"], ran["head"]) == ((0, 1), (2, 3))
    report = compared(made, plan)
    assert report.ok, str(report)


@pytest.mark.parametrize("head", [*LAYOUTS, (4, 1)], ids=str)
@pytest.mark.parametrize("lm", LAYOUTS, ids=str)
def test_a_tied_head_is_cut_with_the_embedding_regression(lm: tuple[int, int], head: tuple[int, int]) -> None:
    """In a layout of its own."""
    made = tied(4)
    plan = laid_out(made, 4, lambda name: head if name == "t.head" else lm)
    held = {name for bucket in prepare(made, plan).program.buckets for name in bucket.parameters}
    assert "lm.embed_tokens.weight@3/4/0" in held
    report = compared(made, plan)
    assert report.ok, str(report)


def test_a_plan_for_an_embedding_that_is_tied_into_a_layer_elsewhere_is_refused() -> None:
    """The user's own plan is an error where another component's block holds the weight."""
    torch.manual_seed(0)
    made, words = spindle.Workload("tied"), nn.Embedding(8, 4)
    layers = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)]
    layers[1][1].weight = words.weight
    embed = made.component(
        "embed", nn.ModuleDict({"words": words}), tensor_parallel=2, tensor_plan={"words": "embedding_rowwise"}
    )
    trunk = made.component("trunk", nn.Sequential(*layers))

    @made.task("t", batch_size=4, data=[{"tokens": tokens(4, 6, 0) % 8}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = trunk(embed["words"](batch["tokens"]))
        return y.square().mean()

    with pytest.raises(WorkloadError, match=r"'words' .* shares a parameter with 'trunk\.1\.1'"):
        capture(made)
