"""Experts under tensor parallelism: stacked parameters are cut as a plan says, and give what one process gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

import spindle
from spindle.errors import SpindleWarning, WorkloadError
from spindle.runtime.controller import prepare
from spindle.runtime.parallel.names import join, joined_pieces, piece_of
from spindle.runtime.parity import Tolerance
from spindle.values.graph import PiecePlace, parse_piece, piece_name
from tests.parity.test_tensor_parallel import (
    WORDS,
    ask_and_answer,
    compared,
    laid_out,
    next_word,
    resumed_beside_whole,
    tolerance_of,
)
from tests.tiny_workloads import floats, tokens

ROUTED = Tolerance(1e-5, 1e-8)  # routers compute in float32 whatever the model does
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
}


def mixtral(**options: Any) -> nn.Module:
    """Gate and up projection of each expert lie one after the other among the outputs."""
    config = MixtralConfig(**SIZES | options, experts_implementation="batched_mm")  # grouped products are of bfloat16
    model: nn.Module = MixtralForCausalLM(config)
    return model


def llama4() -> nn.Module:
    """Stacked parameters the other way round, so that rows are outputs, and a shared expert of Linear layers."""
    more = {"intermediate_size_mlp": 24, "moe_layers": [0, 1], "attention_chunk_size": 32, "rope_parameters": None}
    config = Llama4TextConfig(**SIZES | more)
    model: nn.Module = Llama4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.2)  # they begin as zeros, and would stay so
    return model


MODELS = {"mixtral": mixtral, "llama4": llama4}
CUT = {"mixtral": "mlp.experts.gate_up_proj@1/4/1x2", "llama4": "feed_forward.experts.gate_up_proj@1/4/2x2"}


def experts(model: str, **options: Any) -> spindle.Workload:
    """Two tasks of one language model with experts; in float32 where its router rounds to that."""
    torch.manual_seed(0)
    dtype = torch.float32 if model == "llama4" else torch.float64
    made = spindle.Workload("experts", **options)
    lm: Any = made.component("lm", MODELS[model]().to(dtype), tensor_parallel=4)
    ask_and_answer(made, lm)
    return made


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_experts_are_cut(model: str, layout: tuple[int, int]) -> None:
    """One task in this layout, the other in another, over the same pieces."""
    made = experts(model)
    others = (4, 1) if layout == (2, 2) else (2, 2)
    plan = laid_out(made, 4, lambda name: layout if name.startswith("ask") else others)
    held = {name for bucket in prepare(made, plan).program.buckets for name in bucket.parameters}
    assert f"lm.model.layers.0.{CUT[model]}" in held
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in held)
    report = compared(made, plan, tolerance=ROUTED if model == "mixtral" else tolerance_of(torch.float32))
    assert report.ok, str(report)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1, "shard_optimizer": True}, {"recompute": ["lm"]}], ids=str)
def test_features_go_along(options: dict[str, Any]) -> None:
    """Clipping, sharded states and recompute know packed pieces too."""
    made = experts("mixtral", **options)
    plan = laid_out(made, 4, lambda name: (1, 4) if name.startswith("ask") else (2, 2))
    report = compared(made, plan, tolerance=ROUTED)
    assert report.ok, str(report)


def test_checkpoints_know_no_layout(tmp_path: Path) -> None:
    """A run spread over four ranks is resumed by two that hold everything, and goes on as one that never stopped."""
    for name, (value, expected) in resumed_beside_whole(lambda: experts("mixtral"), tmp_path, steps=4, stop=2).items():
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


def planned(plan: dict[str, str] | None, **options: Any) -> spindle.Workload:
    """Experts under a plan of the user's, or the model's own."""
    made = spindle.Workload("planned")
    lm: Any = made.component("lm", mixtral(**options).double(), tensor_parallel=4, tensor_plan=plan)

    @made.task("talk", batch_size=4, data=[{"tokens": tokens(4, 6, 0)}])
    def talk(batch: dict[str, Tensor]) -> Tensor:
        return next_word(lm(input_ids=batch["tokens"]).logits, batch["tokens"])

    return made


BLOCK = "model.layers.*.mlp.experts"
LINEAR = {"model.layers.*.self_attn.v_proj": "colwise_rep"}
WRONG: dict[str, tuple[dict[str, str] | None, dict[str, Any], str]] = {
    "one is left out": (LINEAR | {BLOCK: "moe_tp_experts", f"{BLOCK}.down_proj": "rowwise"}, {}, "not gate_up_proj"),
    "does not divide": (None, {"intermediate_size": 10}, "has 10 features; tensor_parallel must divide"),
}


@pytest.mark.parametrize(("plan", "options", "said"), WRONG.values(), ids=WRONG)
def test_plans_that_do_not_fit(plan: dict[str, str] | None, options: dict[str, Any], said: str) -> None:
    """What is wrong is said, with the layer's name."""
    with pytest.raises(WorkloadError, match=f"experts.*{said}"):
        spindle.make_metagraph(planned(plan, **options))


def test_experts_without_styles_stay_whole() -> None:
    """All ranks of a copy route and compute alike; each adds its share of the experts' gradients."""
    made = planned(LINEAR | {BLOCK: "moe_tp_experts"})
    plan = laid_out(made, 4, lambda _: (1, 4))
    held = {name for bucket in prepare(made, plan).program.buckets for name in bucket.parameters}
    assert "lm.model.layers.0.mlp.experts.down_proj" in held
    report = compared(made, plan, tolerance=ROUTED)
    assert report.ok, str(report)


@given(
    pieces=st.integers(1, 4),
    packs=st.integers(1, 3),
    size=st.integers(1, 3),
    dims=st.integers(1, 3).flatmap(lambda ndim: st.tuples(st.just(ndim), st.integers(0, ndim - 1))),
)
def test_pieces_join_to_the_whole(pieces: int, packs: int, size: int, dims: tuple[int, int]) -> None:
    """Names tell all there is to cut by and to join by, of parameters and of states with names around them."""
    ndim, dim = dims
    shape = [2] * ndim
    shape[dim] = pieces * packs * size
    whole = floats(*shape, seed=0, dtype=torch.float64)
    names = [piece_name("w", index, pieces, dim, packs) for index in range(pieces)]
    parts = [piece_of(whole, name) for name in names]
    assert [parse_piece(name) for name in names] == [PiecePlace("w", i, pieces, dim, packs) for i in range(pieces)]
    assert all(part.shape[dim] == packs * size for part in parts)
    if pieces > 1:
        assert torch.equal(join(parts, dim, packs), whole)
        stored = {f"state:{name}:exp_avg": part for name, part in zip(names, parts, strict=True)}
        assert torch.equal(joined_pieces(stored)["state:w:exp_avg"], whole)


def test_router_logits_that_hooks_collect_inside_of_one_operator() -> None:
    """The run on the meta device fails after it has registered hooks: the next one must not collect twice."""
    torch.manual_seed(0)
    made = spindle.Workload("balanced")
    lm: Any = made.component("lm", mixtral(output_router_logits=True).double())
    data = [{"tokens": tokens(4, 6, seed)} for seed in range(2)]

    @made.task("speak", batch_size=4, data=data)
    def speak(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = lm(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        return loss

    with pytest.warns(SpindleWarning, match="one operator: .*; in its config, set output_router_logits=False"):
        report = spindle.verify(made, num_workers=2, steps=2, launcher="threads")
    assert report.ok, str(report)
