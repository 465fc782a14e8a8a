"""Activation checkpointing of the model's own: exact, whichever kind, wherever called, with dropout and when spread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import LlamaConfig, LlamaModel

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from tests.parity.test_tensor_parallel import EXACT, compared, language, next_word, spread
from tests.plain_loops import WIDTH, Block, Modules, Tasks, assert_same, looped, planned, rows, tower, workload
from tests.random_plans import widest_plan
from tests.tiny_workloads import tokens

BY_MODULE = lambda *a, **k: checkpointing.checkpoint(*a, **k)  # noqa: E731 - as code finds it that imports the module
CALLS: dict[str, Callable[..., Any]] = {"imported by name": checkpoint, "found in its module": BY_MODULE}


class Checkpointed(Block):
    """A layer that keeps only its input."""

    rate, reentrant = 0.0, True
    call: Callable[..., Any] = staticmethod(checkpoint)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(F.dropout(x, self.rate, self.training)), self.rate, self.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.dropout(x, self.rate, self.training) + self.call(self.dropped, x, use_reentrant=self.reentrant)
        return F.dropout(y, self.rate, self.training)


def layers(**settings: Any) -> type[nn.Module]:
    return type("Checkpointed", (Checkpointed,), settings)


def with_stem(kind: type[nn.Module]) -> Callable[[], Modules]:
    return lambda: {"stem": nn.Linear(WIDTH, WIDTH), "trunk": tower(kind), "head": nn.Linear(WIDTH, 3)}


def classify(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
    return {"classify": lambda b: F.cross_entropy(head(trunk(stem(b["x"]))), b["y"])}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_layers_that_checkpoint_themselves_regression(call: Callable[..., Any], reentrant: bool) -> None:
    """As in a plain loop: a reentrant checkpoint once left all parameters inside of it untrained."""
    kind = layers(call=staticmethod(call), reentrant=reentrant)
    ours, theirs = (workload(with_stem(kind), classify) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


@pytest.mark.parametrize("recompute", [(), ("trunk",)], ids=["kept", "recompute="])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_dropout_is_the_same_when_it_is_computed_again_regression(reentrant: bool, recompute: tuple[str, ...]) -> None:
    """Before a checkpoint, in it and behind it."""
    made = workload(with_stem(layers(rate=0.4, reentrant=reentrant)), classify, recompute=recompute)
    report = compared(made, widest_plan(spindle.make_metagraph(made), 2), tolerance=EXACT)
    assert report.ok, str(report)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_around_layers_regression(reentrant: bool) -> None:
    """Called by the task, however imported, and in sequence."""

    def tasks(stem: nn.Module, trunk: nn.Sequential, head: nn.Module) -> Tasks:
        def one(b: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(head(checkpoint(trunk, stem(b["x"]), use_reentrant=reentrant)), b["y"])

        def segments(b: dict[str, Tensor]) -> Tensor:
            y = checkpoint_sequential(trunk, 2, stem(b["x"]), use_reentrant=reentrant)  # type: ignore[no-untyped-call]
            return F.cross_entropy(head(y), b["y"])

        return {"one": one, "segments": segments}

    ours, theirs = (workload(with_stem(Block), tasks) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


def test_a_reentrant_checkpoint_that_trains_nothing_is_refused() -> None:
    """Where nothing that goes in needs a gradient, torch gives none to what is inside."""
    make = lambda: {"trunk": tower(), "head": nn.Linear(WIDTH, 3)}  # noqa: E731

    def tasks(trunk: nn.Module, head: nn.Module) -> Tasks:
        return {"t": lambda b: F.cross_entropy(head(checkpoint(trunk, b["x"], use_reentrant=True)), b["y"])}

    with pytest.raises(WorkloadError, match=r"line \d+ of .*checkpoint with use_reentrant=True .*use_reentrant=False"):
        capture(workload(make, tasks))


def llama(*, reentrant: bool) -> spindle.Workload:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, use_cache=False
    )
    made = spindle.Workload("llama")
    model: Any = LlamaModel(config).double()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    lm, head = made.component("lm", model.train()), made.component("head", nn.Linear(16, 3).double())

    @made.task("t", batch_size=4, data=[{"ids": tokens(4, 6, 1) % 40, "y": torch.tensor([0, 1, 2, 1])}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(head(lm(input_ids=batch["ids"]).last_hidden_state[:, -1]), batch["y"])

    return made


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_models_of_transformers_that_checkpoint_regression(reentrant: bool) -> None:
    assert_same(planned(llama(reentrant=reentrant)), looped(llama(reentrant=reentrant)))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_of_layers_that_are_spread_regression(reentrant: bool, rate: float) -> None:
    """What is computed again is the part of the features that the rank has, summed with the other ranks'."""
    torch.manual_seed(0)
    made = spindle.Workload("spread")
    model: Any = language(attention_dropout=rate).double().train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    lm: Any = made.component("lm", model, tensor_parallel=2)

    @made.task("t", batch_size=4, data=[{"tokens": tokens(4, 6, seed)} for seed in range(2)])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return next_word(lm(input_ids=batch["tokens"]).logits, batch["tokens"])

    report = compared(made, spread(made, 2, 2))
    assert report.ok, str(report)


# -- autograd functions of the user's own -----------------------------------------------------------------------------


class Again(torch.autograd.Function):
    """A checkpoint by hand, as fairscale and Megatron have it: autograd does not see what it trains."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


class ByHand(Block):
    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + Again.apply(lambda z: F.dropout(self.inner(z), self.rate, self.training), x)  # type: ignore[no-untyped-call]
        return y


class Threefold(torch.autograd.Function):
    """A function whose backward is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 3 * ctx.factor * gradient, None


class Steep(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + Threefold.apply(self.inner(x), 0.5)  # type: ignore[no-untyped-call]
        return y


@pytest.mark.parametrize("kind", [ByHand, Steep])
def test_autograd_functions_inside_of_layers_regression(kind: type[nn.Module]) -> None:
    """Their own backward counts, also for parameters that autograd does not know to be trained."""
    ours, theirs = (workload(with_stem(kind), classify) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


def test_autograd_functions_around_layers() -> None:
    def tasks(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
        return {"t": lambda b: F.cross_entropy(head(Threefold.apply(trunk(stem(b["x"])), 0.5)), b["y"])}  # type: ignore[no-untyped-call]

    ours, theirs = (workload(with_stem(Block), tasks) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


@pytest.mark.parametrize("called", ["trunk", "stem"])
def test_autograd_functions_that_hide_parameters_are_refused_regression(called: str) -> None:
    """Around a list of layers, or one outside of blocks."""

    def tasks(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
        first, second = (stem, trunk) if called == "trunk" else (trunk, stem)
        return {"t": lambda b: F.cross_entropy(head(Again.apply(second, first(b["x"]))), b["y"])}  # type: ignore[no-untyped-call]

    with pytest.raises(WorkloadError, match=r"function 'Again' computes with parameters that are not among its arg"):
        capture(workload(with_stem(Block), tasks))


def test_dropout_that_a_function_of_one_s_own_computes_again_is_refused_regression() -> None:
    kind = type("ByHand", (ByHand,), {"rate": 0.5})
    with pytest.raises(WorkloadError, match="draws random numbers by"):
        capture(workload(with_stem(kind), classify))


def test_a_layer_that_is_spread_and_hides_parameters_is_refused() -> None:
    """In backward it would compute all features, or sum none."""
    torch.manual_seed(0)
    made = spindle.Workload("spread")
    cuts = {"*.up": "colwise", "*.down": "rowwise"}
    trunk = made.component("trunk", nn.Sequential(ByHand(), ByHand()).double(), tensor_parallel=2, tensor_plan=cuts)
    stem = made.component("stem", nn.Linear(WIDTH, WIDTH).double())

    @made.task("t", batch_size=4, data=rows())
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = trunk(stem(batch["x"]))
        return y.square().mean()

    with pytest.raises(WorkloadError, match="class ByHand is cut by tensor parallelism, but an autograd function"):
        capture(made)
