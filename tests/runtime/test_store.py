"""Store: the parameters of one rank, side by side by bucket; three small layers of which two are one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spindle.capture.codes import OperatorCode, OperatorModule
from spindle.runtime.programs.program import Bucket, Program
from spindle.runtime.steps.store import ParameterStore
from tests.runtime.programs.hand_program import lowered


def code(name: str, module: nn.Module, component: str) -> OperatorCode:
    return OperatorCode(
        name=name,
        module=OperatorModule(module, {}),
        inputs=(),
        outputs=(),
        parameters=tuple((f"block.{inner}", f"{component}.{inner}") for inner, _ in module.named_parameters()),
        buffers=tuple((f"block.{inner}", f"{component}.{inner}") for inner, _ in module.named_buffers()),
    )


def program(*buckets: tuple[tuple[int, ...], tuple[str, ...], int | None]) -> Program:
    made = tuple(
        Bucket(name=f"b{index}", dtype="float32", ranks=ranks, parameters=names, owner=owner)
        for index, (ranks, names, owner) in enumerate(buckets)
    )
    return replace(lowered(), buckets=made)


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(10 * value)
    return layer


BOTH = program(((0, 1), ("a.weight", "a.bias"), None), ((1,), ("b.weight",), None))


def test_a_rank_takes_the_buckets_that_it_is_in() -> None:
    codes = [code("t.a", linear(1.0), "a"), code("t.b", linear(2.0), "b")]
    first, second = (ParameterStore(BOTH, rank, codes) for rank in (0, 1))
    assert (list(first.bucket), first.trained) == (["b0"], ["a.weight", "a.bias"])
    assert (list(second.bucket), second.trained) == (["b0"], ["a.weight", "a.bias", "b.weight"])
    assert (first.loose, second.loose) == ([], ["b.weight"])


def test_what_is_clipped_lies_in_buffers() -> None:
    codes = [code("t.a", linear(1.0), "a"), code("t.b", linear(2.0), "b")]
    store = ParameterStore(replace(BOTH, max_grad_norm=1.0), 1, codes)
    assert (list(store.bucket), store.loose) == (["b0", "b1"], [])


def test_gradients_that_nobody_reduces_end_with_the_step() -> None:
    """They are autograd's own; one that backward did not reach is none when the optimizer steps."""
    layers = linear(1.0), linear(2.0)
    store = ParameterStore(BOTH, 1, [code("t.a", layers[0], "a"), code("t.b", layers[1], "b")])
    torch.autograd.backward(layers[1].weight.sum() * 3.0)
    assert store.gradients(["b.weight"])["b.weight"].tolist() == [[3.0, 3.0]]
    store.zero_gradients()
    assert layers[1].weight.grad is None
    torch.autograd.backward(layers[0].weight.sum())
    assert store.unreached(["a.weight", "b.weight"]) == ["b.weight"]


def test_a_bucket_tells_which_of_its_parameters_no_rank_has_reached() -> None:
    """By a flag for each behind the gradients, which the same reduction sums."""
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a")])
    torch.autograd.backward(layer.weight.sum())
    flat = store.flag("b0")
    assert flat.tolist() == [*store.bucket["b0"].tolist(), 1.0, 0.0]
    assert store.unreached(["a.weight", "a.bias"]) == ["a.bias"]
    flat.add_(torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))  # of another rank
    assert store.unreached(["a.weight", "a.bias"]) == []
    store.zero_gradients()
    torch.autograd.backward(layer(torch.ones(1, 2)).sum())
    assert store.flag("b0").tolist()[-2:] == [1.0, 1.0]


def test_gradients_lie_in_the_bucket() -> None:
    """Autograd adds into the flat buffer, and what a reduction writes there is the parameters' gradient."""
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a")])
    for _ in range(2):
        layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert store.bucket["b0"].tolist() == [6.0, 8.0, 2.0]
    store.bucket["b0"].mul_(0.5)
    assert {name: g.tolist() for name, g in store.gradients(["a.weight", "a.bias"]).items()} == {
        "a.weight": [[3.0, 4.0]],
        "a.bias": [1.0],
    }
    store.zero_gradients()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0.0, 0.0]]


def test_gradients_given_out_are_copies() -> None:
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a")])
    layer(torch.ones(1, 2)).sum().backward()
    kept = store.gradients(["a.bias"])
    store.zero_gradients()
    assert kept["a.bias"].tolist() == [1.0]


def test_an_optimizer_leaves_what_rests_alone() -> None:
    """Without a gradient a parameter keeps its value, though momentum would move it; afterwards the buffer is back."""
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a")])
    stepper = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.5)
    with store.without_gradients(["a.weight"]):
        stepper.step()
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert layer.bias.tolist() == [5.0]
    store.bucket["b0"].fill_(7.0)
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[7.0, 7.0]]


def test_resting_ends_with_an_error_too() -> None:
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a")])
    with pytest.raises(ValueError, match="stop"), store.without_gradients(["a.weight"]):
        raise ValueError("stop")
    assert layer.weight.grad is not None


def test_only_the_owner_updates() -> None:
    """A bucket with an owner is held by all its ranks, and stepped by one."""
    shared = program(((0, 1), ("a.weight", "a.bias"), 1))
    stores = [ParameterStore(shared, rank, [code("t.a", linear(1.0), "a")]) for rank in (0, 1)]
    assert [store.trained for store in stores] == [["a.weight", "a.bias"]] * 2
    assert [store.updated for store in stores] == [[], ["a.weight", "a.bias"]]


def test_parameters_travel_in_one_buffer() -> None:
    """Packed on the owner, unpacked elsewhere: the same values under the same names."""
    here, there = linear(1.0), linear(2.0)
    stores = [ParameterStore(BOTH, 0, [code("t.a", layer, "a")]) for layer in (here, there)]
    flat = torch.empty(3)
    stores[1].pack(["a.weight", "a.bias"], flat)
    assert flat.tolist() == [2.0, 2.0, 20.0]
    stores[0].unpack(["a.weight", "a.bias"], flat)
    assert (here.weight.tolist(), here.bias.tolist()) == ([[2.0, 2.0]], [20.0])
    assert here.weight.requires_grad


def test_tied_parameters_are_one() -> None:
    """Two operators that hold one tensor under one name are fine; two tensors under one name are a bug of ours."""
    layer = linear(1.0)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a"), code("u.a", layer, "a")])
    assert list(store.parameters) == ["a.weight", "a.bias"]
    with pytest.raises(AssertionError, match=r"parameter 'a\.weight' is two tensors on one rank"):
        ParameterStore(BOTH, 0, [code("t.a", layer, "a"), code("u.a", linear(1.0), "a")])


def test_state_is_what_was_asked_for_and_a_copy() -> None:
    """Parameters and buffers under the user's names; names of other ranks are left out."""
    layer, norm = linear(1.0), nn.BatchNorm1d(2)
    store = ParameterStore(BOTH, 0, [code("t.a", layer, "a"), code("t.n", norm, "n")])
    state = store.state(["a.bias", "n.running_mean", "elsewhere.weight"])
    assert set(state) == {"a.bias", "n.running_mean"}
    with torch.no_grad():
        layer.bias.zero_()
    assert state["a.bias"].tolist() == [10.0]
    assert not state["a.bias"].requires_grad
