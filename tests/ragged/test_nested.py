"""Batches with fields in fields, arrays, and things that nothing cuts: what a planned run computes is one process's."""

import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from spindle.inputs.batch import sampled
from spindle.inputs.nested import flat, nested
from tests.random_plans import random_plan, widest_plan

SIZES = (6, 3, 4)
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Held:
    """What nothing cuts."""

    x: Tensor


Made = Callable[[Tensor], Any]

CUT: dict[str, tuple[Made, Callable[[Any], Tensor]]] = {
    "a dict": (lambda x: {"x": x}, lambda f: f["x"]),
    "a dict in a dict": (lambda x: {"x": {"x": x, "scale": 1.0}}, lambda f: f["x"]["x"] * f["x"]["scale"]),
    "an ordered dict": (lambda x: OrderedDict(x=x), lambda f: f["x"]),
    "what a tokenizer gives": (lambda x: BatchEncoding({"x": x, "other": x}), lambda f: f.x * f["other"].sign().abs()),
    "a named tuple": (lambda x: Pair(x, x), lambda f: f.x),
    "an array": (lambda x: x.numpy(), lambda f: torch.from_numpy(f)),
    "an array in a dict": (lambda x: {"x": x.numpy()}, lambda f: torch.from_numpy(f["x"])),
    "a list in a dict": (lambda x: {"x": list(x)}, lambda f: torch.stack(f["x"])),
}
WHOLE: dict[str, tuple[Made, Callable[[Any], Tensor]]] = {
    "an object": (lambda x: SimpleNamespace(x=x), lambda f: f.x),
    "a dataclass": (lambda x: Held(x), lambda f: f.x),
    "a dict by sample": (lambda x: dict(enumerate(x)), lambda f: torch.stack(list(f.values()))),
    "bytes": (lambda x: x.numpy().tobytes(), lambda f: torch.from_numpy(np.frombuffer(f).reshape(-1, 5).copy())),
    "a closure": (lambda x: lambda: x, lambda f: f()),
}


def made(make: Made, read: Callable[[Any], Tensor], loss: Callable[[Tensor], Tensor]) -> spindle.Workload:
    """Two layers and a head on a field of some kind."""
    torch.manual_seed(0)
    body = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2)]).double()
    head = nn.Linear(5, 3).double()
    workload = spindle.Workload("w")
    body, head = workload.component("body", body), workload.component("head", head)
    data = [{"id": torch.arange(n), "f": make(torch.randn(n, 5, dtype=torch.float64))} for n in SIZES]

    @workload.task("t", batch_size=SIZES[0], data=data)
    def task(batch: Any) -> Tensor:
        return loss(head(body(read(batch["f"]))))

    return workload


def compared(workload: spindle.Workload, plan: spindle.Plan) -> None:
    """Three steps, with a plain optimizer, as planned and by one process."""
    report = spindle.verify(workload, plan, steps=3, launcher="threads")
    assert report.ok, report


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z.square().mean(),
    "sum": lambda z: z.square().sum() / 7,
    "of the first": lambda z: z[0].square().sum(),
}


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_fields_of_any_kind(kind: str) -> None:
    """Also of kinds that nobody cuts: each device would count all of such a loss."""
    make, read = (CUT | WHOLE)[kind]
    workload = made(make, read, LOSSES["mean"])
    compared(workload, widest_plan(spindle.make_metagraph(workload), 2))


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("kind", ["a dict", "an object"])
def test_losses_of_them(kind: str, loss: str) -> None:
    workload = made(*(CUT | WHOLE)[kind], LOSSES[loss])
    compared(workload, random_plan(spindle.make_metagraph(workload), 3, 1))


def test_fields_in_fields_are_divided() -> None:
    """Layers are given some samples each; of what nothing cuts one device runs all."""
    for kind, (make, read) in (CUT | WHOLE).items():
        operators = [op for op in capture(made(make, read, LOSSES["mean"])).graph if op.component == "body"]
        assert operators
        assert {all(tensor.unit for tensor in op.outputs) for op in operators} == {kind in CUT}, kind


# -- losses that no sample changes ------------------------------------------------------------------------------------


def of_weights(body: nn.Module, head: nn.Module, batch: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for parameter in (*body.parameters(), *head.parameters()):
        total += parameter.square().sum()
    return total


ANCHOR = torch.ones(3, 5, dtype=torch.float64)
REPLAYED = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

CONSTANT: dict[str, Callable[[nn.Module, nn.Module, Any], Tensor]] = {
    "weight decay": of_weights,
    "distance of weights": lambda body, head, batch: (head.weight - ANCHOR).square().sum(),  # type: ignore[operator]
    "replayed samples": lambda body, head, batch: head(body(REPLAYED)).square().mean(),
    "one number of the batch": lambda body, head, batch: head(body(REPLAYED * batch["scale"])).square().mean(),
}


@pytest.mark.parametrize("kind", list(CONSTANT))
def test_losses_that_no_sample_changes(kind: str) -> None:
    """Beside a task on samples, with which they share their modules; with accumulation, and batches of other sizes."""
    torch.manual_seed(0)
    workload = spindle.Workload("w", accumulate=2)
    body = workload.component("body", nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double())
    head = workload.component("head", nn.Linear(5, 3).double())
    data = [{"x": torch.randn(n, 5, dtype=torch.float64), "y": torch.arange(n) % 3, "scale": 0.5 + n} for n in SIZES]
    workload.task("ce", batch_size=6, data=data)(lambda b: F.cross_entropy(head(body(b["x"])), b["y"]))
    workload.task("whole", batch_size=6, data=data)(lambda b: CONSTANT[kind](body, head, b))
    metagraph = spindle.make_metagraph(workload)
    for plan in (widest_plan(metagraph, 2), random_plan(metagraph, 3, 0)):
        compared(workload, plan)


# -- flat and back ----------------------------------------------------------------------------------------------------

LEAVES = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.just(torch.ones(2)))
FIELDS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("uvw"), FIELDS, max_size=3))
def test_a_batch_comes_back_as_it_was(batch: Mapping[str, Any]) -> None:
    """Types and order too, also after its names have been sent; its innermost tensors stand side by side."""
    found = flat("here", batch)
    names = pickle.loads(pickle.dumps([*found]))
    assert repr(nested(dict(zip(names, found.values(), strict=True)))) == repr(dict(batch))
    assert all(not isinstance(value, dict) or not has_rows(value) for value in found.values())
    assert repr(flat("here", found)) == repr(found)


def has_rows(value: Any) -> bool:
    """Whether a value holds tensors or lists anywhere."""
    if isinstance(value, dict):
        return any(map(has_rows, value.values()))
    return isinstance(value, Tensor | list | tuple)


def test_two_fields_of_one_name_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"two fields of its batch are called 'a\.b'"):
        flat("task 't'", {"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)})


def test_rows_of_inner_fields_are_counted() -> None:
    """By their full names; without that they stay whole. A batch without any may hold None there."""
    batch = {"inputs": {"ids": torch.ones(2, 3), "pixels": torch.ones(5, 4)}}
    whole = nested(sampled("task 't'", batch, {}, 2).part(1, 2))
    assert (whole["inputs"]["ids"].shape, whole["inputs"]["pixels"].shape) == ((1, 3), (5, 4))
    found = sampled("task 't'", batch, {"inputs.pixels": [1, 4]}, 2)
    assert nested(found.part(1, 2))["inputs"]["pixels"].shape == (4, 4)
    without = sampled("task 't'", {"ids": torch.ones(2, 3), "pixels": None}, {"pixels": [0, 0]}, 2)
    assert without.part(0, 1)["pixels"] is None
