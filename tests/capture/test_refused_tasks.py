"""What a planned run would not follow: modes, seeds, counters, kept values are refused in a sentence naming them."""

import copy
import functools
import itertools
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spindle.capture import capture
from spindle.errors import WorkloadError
from tests.parity.test_modes import Batch, Step, autocast, both, loss, modules, on_gpus, through
from tests.plain_loops import WIDTH, Block, Tasks, assert_same, looped, planned, workload


def penalty(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        x = trunk(b["x"])
        slope = torch.autograd.grad(head(teacher(x)).sum(), x, create_graph=True)[0]
        found: Tensor = slope.square().mean()
        return found

    return {"t": step}


def backward(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        loss(head, trunk(b["x"]), b).backward()  # type: ignore[no-untyped-call]
        return loss(head, teacher(b["x"]), b)

    return {"t": step}


def hooked(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        y = trunk(b["x"])
        y.register_hook(lambda gradient: 2 * gradient)
        return loss(head, y, b)

    return {"t": step}


def doing(before: Callable[..., Any], after: Callable[..., Any] = lambda **_: None) -> Callable[..., Tasks]:
    """A task that does something before its layers are called, and something behind."""

    def tasks(**held: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            before(**held)
            found = loss(held["head"], held["teacher"](held["trunk"](b["x"])), b)
            after(**held)
            return found

        return {"t": step}

    return tasks


def sparse(trunk: nn.Module, teacher: nn.Module, head: Any) -> Tasks:
    return {"t": lambda b: loss(head, trunk(b["x"]) + F.embedding(b["y"], head.weight, sparse=True), b)}


def transformed(transform: Callable[..., Any]) -> Callable[..., Tasks]:
    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        return {"t": lambda b: transform(lambda x: head(trunk(x)).sum(), b["x"]).square().mean()}

    return tasks


def one_mode_each(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(mode: bool) -> Step:
        def task(b: Batch) -> Tensor:
            teacher.train(mode)
            return loss(head, teacher(trunk(b["x"])), b)

        return task

    return {"training": step(True), "evaluating": step(False)}


def by_batch(trunk: nn.Module, teacher: Any, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        for layer in teacher:
            layer.scale = float(b["y"].sum())
        return loss(head, teacher(trunk(b["x"])), b)

    return {"t": step}


def fixed_noise(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            noise = torch.randn(WIDTH, dtype=torch.float64)
        return loss(head, trunk(b["x"]) + noise, b)

    return {"t": step}


def repeated_noise(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        state = torch.get_rng_state()
        y = F.dropout(trunk(b["x"]))
        torch.set_rng_state(state)
        return loss(head, y + F.dropout(trunk(b["x"])), b)

    return {"t": step}


def scaling(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    scaler = torch.amp.GradScaler("cpu")
    return {"t": lambda b: scaler.scale(loss(head, trunk(b["x"]), b))}


def weighted(weight: Callable[[], float]) -> Callable[..., Tasks]:
    """A task whose loss is weighted by what something outside of its batch says."""

    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        return {"t": lambda b: loss(head, trunk(b["x"]), b) * weight()}

    return tasks


class Counter:
    """What trainers keep: a step."""

    def __init__(self, until: int) -> None:
        self.step, self.until = 0, until

    def __call__(self) -> float:
        self.step += 1
        return 1.0 if self.step < self.until else 0.5


def counted(until: int) -> Callable[[], float]:
    step = 0

    def weight() -> float:
        nonlocal step
        step += 1
        return 1.0 if step < until else 0.5

    return weight


def noted(until: int) -> Callable[[], float]:
    seen: list[int] = []

    def weight() -> float:
        seen.append(0)
        return 1.0 if len(seen) < until else 0.5

    return weight


def in_dict(until: int) -> Callable[[], float]:
    state = {"step": 0}

    def weight() -> float:
        state["step"] += 1
        return 1.0 if state["step"] < until else 0.5

    return weight


STEPS_DONE = 0


def in_global() -> float:
    global STEPS_DONE
    STEPS_DONE += 1
    return 1.0 if STEPS_DONE < 1000 else 0.5


def in_class(until: int) -> Callable[[], float]:
    class State:
        step = 0

    def weight() -> float:
        State.step += 1
        return 1.0 if State.step < until else 0.5

    return weight


def by_numpy() -> Callable[[], float]:
    generator = np.random.default_rng(0)
    return lambda: 1.0 if generator.random() < 0.9 else 0.5


def in_namespace() -> Callable[[], float]:
    state = SimpleNamespace(step=0)

    def weight() -> float:
        state.step += 1
        return 0.1 * float(state.step)

    return weight


def freezing(**held: nn.Module) -> None:
    held["teacher"].requires_grad_(False)


def thawing(**held: nn.Module) -> None:
    held["teacher"].requires_grad_(True)


def freezing_by_hand(**held: nn.Module) -> None:
    for parameter in held["teacher"].parameters():
        parameter.requires_grad = False


SCRIPTED = """
def loss(scores):
    return (scores * scores).mean()
"""


def scripted(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    told: Any = torch.jit.CompilationUnit(SCRIPTED)
    return {"t": lambda b: told.loss(head(trunk(b["x"])))}


def _halved(**held: nn.Module) -> None:
    for parameter in held["head"].parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def _stepped(**held: nn.Module) -> None:
    torch.optim.SGD(held["trunk"].parameters(), lr=0.1).step()


GRADIENTS = {
    "zero_grad of a module": lambda **held: held["trunk"].zero_grad(),
    "zero_grad of an optimizer": lambda **held: torch.optim.SGD(held["trunk"].parameters(), lr=0.1).zero_grad(),
    "a step in a task": _stepped,
    "clip_grad_norm_": lambda **held: nn.utils.clip_grad_norm_(held["trunk"].parameters(), 1.0),
    "gradients in place": _halved,
    "gradients set": lambda **held: setattr(next(held["trunk"].parameters()), "grad", None),
}
"""What reads or changes gradients of earlier tasks."""

BATCH_ALONE = (
    r"line \d+ of test_refused_tasks.py: what it computes of one batch changes .*let it follow from the batch alone"
)

REFUSED: dict[str, tuple[Callable[..., Tasks], str]] = {
    "autograd.grad": (penalty, "it calls grad on a value of the model"),
    "backward": (backward, "it calls backward on a value of the model"),
    "a deep copy": (
        doing(lambda **m: copy.deepcopy(m["head"])),
        r"line \d+ of test_refused_tasks.py: it makes a deep copy of a module .*register the copy as a component",
    ),
    "sparse gradients": (sparse, r"line \d+ of test_refused_tasks.py: it looks up with sparse=True.*leave sparse out"),
    "a hook on a tensor": (hooked, "it calls register_hook on a value of the model"),
    "torch.func.grad": (transformed(lambda f, x: torch.func.grad(f)(x)), r"inside of a transform of torch\.func"),
    "torch.func.vmap": (transformed(lambda f, x: torch.func.vmap(f)(x)), r"inside of a transform of torch\.func"),
    "torch.func.jacrev": (transformed(lambda f, x: torch.func.jacrev(f)(x)), r"inside of a transform of torch\.func"),
    "torch.func.jvp": (transformed(lambda f, x: torch.func.jvp(f, (x,), (x,))[1]), r"a transform of torch\.func"),
    **{
        name: (doing(code), r"line \d+ of test_refused_tasks.py: it reads or changes gradients of parameters .p.grad;")
        for name, code in GRADIENTS.items()
    },
    "gradients left off": (
        doing(lambda **_: None, lambda **_: torch.set_grad_enabled(False)),
        "leaves gradients switched off .*with statement",
    ),
    "set_default_dtype": (
        doing(lambda **_: torch.set_default_dtype(torch.float64), lambda **_: torch.set_default_dtype(torch.float32)),
        r"calls torch\.set_default_dtype\(torch\.float64\), .*give dtype=",
    ),
    "float16 autocast": (autocast(enabled=True, dtype=torch.float16), "torch.autocast in float16.*precision='bf16'"),
    "autocast of GPUs": (on_gpus(torch.bfloat16), r"calls torch\.autocast\('cuda'\).*x\.device\.type"),
    "float16 autocast of GPUs": (on_gpus(torch.float16), "torch.autocast in float16"),
    "loss scaling": (scaling, "scales its loss with a GradScaler.*return the loss itself"),
    "manual_seed": (doing(lambda **_: torch.manual_seed(0)), "sets the state of torch's random numbers"),
    "fork_rng": (fixed_noise, r"line \d+ of test_refused_tasks.py: it sets the state of torch's random numbers"),
    "set_rng_state": (repeated_noise, "sets the state of torch's random numbers .*in a buffer"),
    "freezing": (doing(freezing, thawing), r"sets requires_grad of 'teacher\.0\.norm\.weight'; freeze .* before"),
    "freezing by hand": (doing(freezing_by_hand), r"sets requires_grad of 'teacher\.0\.norm\.weight'"),
    "eval() and train()": (
        doing(lambda **m: m["teacher"].eval(), lambda **m: m["teacher"].train()),
        r"switches the mode of layer 'teacher' \(train\(\)\) between calls of it.*copy\.deepcopy",
    ),
    "another mode each time": (
        doing(lambda **m: m["teacher"].train(not m["teacher"].training)),
        "switches the mode of layer 'teacher'",
    ),
    "another mode in each task": (one_mode_each, r"'evaluating'.*switches the mode of layer 'teacher' \(eval\(\)\)"),
    "an attribute by the batch": (by_batch, r"it sets 'scale' of layer 'teacher\.0' between calls of it"),
    "a clock": (weighted(lambda: time.perf_counter() % 1), BATCH_ALONE),
    "an iterator": (weighted(functools.partial(next, itertools.count())), BATCH_ALONE),
    "a counter of many steps": (weighted(counted(1000)), "depends on 'step', which its own calls change"),
    "a global": (weighted(in_global), "depends on 'STEPS_DONE'"),
    "an object's attribute": (weighted(Counter(1000)), r"depends on 'weight\.step'"),
    "a class's attribute": (weighted(in_class(1000)), r"depends on 'State\.step'"),
    "a generator of Python": (weighted(random.Random(0).random), "draws from 'Random', a generator of its own"),
    "a generator of numpy": (weighted(by_numpy()), "draws from 'generator', a generator of its own"),
    "a namespace": (weighted(in_namespace()), BATCH_ALONE),
    "a dict": (weighted(in_dict(1000)), r"depends on \"state\['step'\]\""),
    "a list": (weighted(noted(1000)), "depends on 'seen'"),
    "a scripted function": (scripted, "of code that cannot be followed"),
    "functional_call of a layer": (
        lambda **m: {
            "t": lambda b: loss(
                m["head"],
                torch.func.functional_call(m["trunk"], {n: 2 * p for n, p in m["trunk"].named_parameters()}, (b["x"],)),
                b,
            )
        },
        r"calls layer 'trunk\.0' with another 'weight' than its own",
    ),
}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp uses it
@pytest.mark.parametrize("name", REFUSED)
def test_tasks_that_a_planned_run_would_not_follow_are_refused(name: str) -> None:
    tasks, message = REFUSED[name]
    made = workload(modules, tasks)
    dtype, modes = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with pytest.raises(WorkloadError, match=message) as caught:
            capture(made)
        assert len(str(caught.value).splitlines()) == 1
        assert torch.is_grad_enabled() is modes
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(modes)


# -- layers that keep something ---------------------------------------------------------------------------------------


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.inner(x) / self.calls


class Averaging(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + self.inner(x - self.mean)


class Showing(Block):
    """What a layer keeps for others to see, and does not read, is its own affair."""

    shown: Tensor | None = None
    length = 0

    def forward(self, x: Tensor) -> Tensor:
        self.length = x.shape[-1]
        self.shown = self.inner(x)
        return x + self.shown


@pytest.mark.parametrize(("kind", "name"), [(Counting, "calls"), (Averaging, "mean")])
@pytest.mark.parametrize("where", ["in a list", "outside of one"])
def test_layers_that_keep_something_from_call_to_call_are_refused(kind: type[nn.Module], name: str, where: str) -> None:
    make = both(kind) if where == "in a list" else lambda: {**both(Block)(), "stem": kind()}
    whose = "layer 'trunk.0'" if where == "in a list" else f"a {kind.__name__}"
    told = rf"{whose} keeps a state of its own in attribute '{name}' \(line \d+ of test_refused_tasks.py\)"
    with pytest.raises(WorkloadError, match=told):
        capture(workload(make, through))


def test_layers_that_show_something_go_as_in_a_plain_loop() -> None:
    ours, theirs = (workload(both(Showing), through) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


def test_hooks_of_all_modules_are_refused() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(WorkloadError, match=r"a forward hook is registered for all modules.*remove it"):
            capture(workload(both(Block), through))
    finally:
        hook.remove()
