"""Modes of torch, hooks, and what tasks keep: as in a plain loop, or refused in a sentence that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import WorkloadError
from tests.plain_loops import WIDTH, Block, Modules, Tasks, assert_same, looped, planned, tower, workload

Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]


class Gated(Block):
    """A layer that is a gate where it trains, and else none."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * (self.inner(x) if self.training else self.up(x))
        return y


def modules() -> Modules:
    return {"trunk": tower(), "teacher": tower(Gated), "head": nn.Linear(WIDTH, 3)}


def loss(head: nn.Module, y: Tensor, b: Batch) -> Tensor:
    found: Tensor = F.cross_entropy(head(y), b["y"])
    return found


def both(kind: type[nn.Module]) -> Callable[[], Modules]:
    return lambda: {"stem": nn.Linear(WIDTH, WIDTH), "trunk": tower(kind), "head": nn.Linear(WIDTH, 3)}


def through(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
    return {"t": lambda b: loss(head, trunk(stem(b["x"])), b)}


# -- gradients on and off, in tasks -----------------------------------------------------------------------------------


def distilled(mode: Callable[[], Any], around: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[..., Tasks]:
    """A teacher's values under a mode, which a student learns."""

    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            with mode():
                wanted = teacher(b["x"])
            y = trunk(b["x"])
            found: Tensor = loss(head, y, b) + F.mse_loss(y, around(wanted)) + 0.1 * teacher(y).square().mean()
            return found

        return {"t": step}

    return tasks


def nested(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        with torch.no_grad():
            y = trunk(b["x"])
            with torch.enable_grad():
                z = teacher(y)
        return loss(head, z, b)

    return {"t": step}


def switched(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        torch.set_grad_enabled(False)
        y = teacher(b["x"])
        torch.set_grad_enabled(True)
        return loss(head, trunk(b["x"]) + y, b)

    return {"t": step}


def decorated(mode: Any) -> Callable[..., Tasks]:
    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        @mode  # type: ignore[untyped-decorator]
        def known(x: Tensor) -> Tensor:
            y: Tensor = teacher(x)
            return y

        return {"t": lambda b: loss(head, trunk(b["x"]) + known(b["x"]).clone(), b)}

    return tasks


def evaluated(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    """A task may set the mode of a layer, if it always sets the same before it calls it."""

    def step(b: Batch) -> Tensor:
        teacher.eval()
        return loss(head, teacher(trunk(b["x"])), b)

    return {"t": step}


def scaled(trunk: nn.Module, teacher: Any, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        for layer in teacher:
            layer.scale = 0.5
        return loss(head, teacher(trunk(b["x"])), b)

    return {"t": step}


def noting(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    """Losses that a task keeps, and does not read again, are its own affair."""
    seen: list[Tensor] = []

    def step(b: Batch) -> Tensor:
        found = loss(head, teacher(trunk(b["x"])), b)
        seen.append(found.detach())
        return found

    return {"t": step}


ACTIVATIONS = ("relu6", "elu", "celu", "selu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "mish")


def in_place(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    """Activations with `inplace=`, on values of the model, and on one of the batch that the model has read before."""

    def step(b: Batch) -> Tensor:
        x = b["x"].clone()
        y = trunk(b["x"]) + x
        F.relu(x, inplace=True)
        F.leaky_relu(x, 0.1, True).mul_(2.0)
        for name in ACTIVATIONS:
            y = getattr(F, name)(1.5 * y + 0.1 * x, inplace=True)
        return loss(head, nn.ReLU(inplace=True)(y + 0.1), b)

    return {"t": step}


def likelihoods(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    """Distributions of values of the model, whose checks of their arguments nothing can decide while it is recorded."""
    made: Any = torch.distributions
    normal, independent = made.Normal, made.Independent
    prior = independent(normal(torch.zeros(WIDTH).double(), torch.ones(WIDTH).double()), 1)

    def step(b: Batch) -> Tensor:
        y = trunk(b["x"])
        found = independent(normal(y, F.softplus(teacher(b["x"]))), 1)
        near: Tensor = made.Categorical(logits=head(y)).log_prob(b["y"]) + 0.1 * prior.log_prob(y)
        share: Tensor = made.Beta(y.square() + 1, 2.0).mean.sum(1)
        result: Tensor = (0.1 * made.kl_divergence(found, prior) - near + share).mean()
        return result

    return {"t": step}


def other_parameters(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    def step(b: Batch) -> Tensor:
        twice = {name: 2 * value for name, value in head.named_parameters()}
        y: Tensor = torch.func.functional_call(head, twice, (trunk(b["x"]),))
        return F.cross_entropy(y, b["y"])

    return {"t": step}


def unscaled(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"t": lambda b: scaler.scale(loss(head, trunk(b["x"]), b))}


def autocast(*, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Tasks]:
    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                y = trunk(b["x"])
            return loss(head, y, b)

        return {"t": step}

    return tasks


def on_gpus(dtype: torch.dtype) -> Callable[..., Tasks]:
    """Autocast as it is where there are GPUs; elsewhere torch switches it off."""

    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            mode: Any = torch.autocast("cuda", dtype=dtype)
            mode._enabled = True
            with mode:
                return loss(head, trunk(b["x"]), b)

        return {"t": step}

    return tasks


TASKS: dict[str, Callable[..., Tasks]] = {
    "no_grad": distilled(torch.no_grad),
    "inference_mode, then a copy": distilled(torch.inference_mode, torch.clone),
    "enable_grad in no_grad": nested,
    "set_grad_enabled as a call": switched,
    "no_grad as a decorator": decorated(torch.no_grad()),
    "inference_mode as a decorator": decorated(torch.inference_mode()),
    "eval() before each call": evaluated,
    "an attribute set before each call": scaled,
    "losses kept": noting,
    "activations in place": in_place,
    "distributions": likelihoods,
    "functional_call outside of layers": other_parameters,
    "a GradScaler that is off": unscaled,
    "autocast switched off": autocast(enabled=False),
}


class Again(nn.Module):
    """One layer that stands in a list of layers three times (ALBERT), and under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Block()
        self.layers = nn.ModuleList([self.layer] * 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_that_stands_in_a_list_several_times() -> None:
    def made() -> Modules:
        return {"stem": nn.Linear(WIDTH, WIDTH), "trunk": Again(), "head": nn.Linear(WIDTH, 3)}

    assert_same(planned(workload(made, through)), looped(workload(made, through)))


@pytest.mark.parametrize("name", TASKS)
def test_tasks_go_as_in_a_plain_loop(name: str) -> None:
    ours, theirs = (workload(modules, TASKS[name]) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


def test_values_of_inference_mode_count_as_constants() -> None:
    """One process raises where they meet what is trained; here they are what no_grad gives."""
    ours = workload(modules, distilled(torch.inference_mode))
    assert spindle.verify(ours, launcher="threads").ok
    assert_same(planned(ours), looped(workload(modules, distilled(torch.no_grad))))


def test_lists_that_a_task_keeps_are_as_they_were_after_planning() -> None:
    seen: list[Tensor] = []

    def tasks(trunk: nn.Module, teacher: nn.Module, head: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            seen.append(b["x"])
            return loss(head, teacher(trunk(b["x"])), b)

        return {"t": step}

    capture(workload(modules, tasks))
    assert seen == []


# -- in layers --------------------------------------------------------------------------------------------------------


class Ungraded(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.down(x).tanh()
        y: Tensor = x + gate * self.up(self.norm(x))
        return y


class Inferring(Block):
    @torch.inference_mode()
    def gate(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(x).tanh()
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.gate(x).clone() * self.up(self.norm(x))
        return y


class Switching(Block):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        gate = self.down(x).tanh()
        torch.set_grad_enabled(before)
        y: Tensor = x + gate * self.up(self.norm(x))
        return y


class Sloping(Block):
    """A layer that adds its own slope."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            slope = torch.autograd.grad(self.inner(z).sum(), z, create_graph=True)[0]
        return x + slope


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.func.grad(lambda z: self.inner(z).square().sum())(x)
        return y


class Replacing(Block):
    def forward(self, x: Tensor) -> Tensor:
        twice = {name: 2 * value for name, value in self.up.named_parameters()}
        y: Tensor = x + torch.func.functional_call(self.up, twice, (self.norm(x),))
        return y


class Hooking(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
        return x + y


@pytest.mark.parametrize("kind", [Ungraded, Inferring, Switching, Sloping, Functional, Replacing, Hooking])
def test_layers_go_as_in_a_plain_loop(kind: type[nn.Module]) -> None:
    ours, theirs = (workload(both(kind), through) for _ in range(2))
    assert_same(planned(ours), looped(theirs))


def _new_bias(head: nn.Linear) -> None:
    head.bias = nn.Parameter(head.bias.detach().clamp(-0.1, 0.1))


def _new_layer(trunk: nn.Module) -> None:
    trunk.get_submodule("0").up = SPARE


SPARE = nn.Linear(WIDTH, WIDTH).double()


class Renewing(Block):
    def forward(self, x: Tensor) -> Tensor:
        _new_bias(self.up)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "then", "words"),
    [
        (Block, lambda trunk, head: _new_bias(head), "another parameter in place of 'bias' of 'head'"),
        (Block, lambda trunk, head: _new_layer(trunk), "another module in place of 'up' of 'trunk.0'"),
        (Renewing, lambda trunk, head: None, "another parameter in place of 'bias' of 'trunk.0.up'"),
    ],
)
def test_what_the_optimizer_does_not_have_takes_no_place(kind: type[nn.Module], then: Any, words: str) -> None:
    """In a task or in a layer, with the line; the modules stay as they were."""

    def tasks(stem: nn.Module, trunk: nn.Module, head: nn.Module) -> Tasks:
        def step(b: Batch) -> Tensor:
            found = loss(head, trunk(stem(b["x"])), b)
            then(trunk, head)
            return found

        return {"t": step}

    made = workload(both(kind), tasks)
    before = [id(p) for _, p in made.named_parameters()]
    with pytest.raises(WorkloadError, match=f"line [0-9]+ of test_modes.py: it puts {words}"):
        capture(made)
    assert [id(p) for _, p in made.named_parameters()] == before


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.3),  # type: ignore[no-untyped-call]
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_a_hook_makes_anew(kind: str) -> None:
    """They stay in the module with their graph; it can be planned again all the same."""

    def made() -> Modules:
        found = both(Block)()
        for module in [m for m in found["trunk"].modules() if isinstance(m, nn.Linear)]:
            WEIGHTS[kind](module)
        return found

    ours, theirs = (workload(made, through) for _ in range(2))
    found = planned(ours)
    assert_same(found, looped(theirs))
    report = spindle.verify(ours, resume_under=1, launcher="threads")
    assert report.ok, str(report)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda _m, _i, output: 2 * output),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0],)),
    "backward": lambda m: m.register_full_backward_hook(lambda _m, into, _o: tuple(2 * g for g in into)),  # type: ignore[attr-defined]
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda _m, out: tuple(2 * g for g in out)),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("where", ["stem", "trunk", "trunk.0", "trunk.0.up"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_modules(kind: str, where: str) -> None:
    """Those of layers and of modules in them count; outside of layers, hooks on gradients are refused."""

    def make() -> Modules:
        made = both(Block)()
        HOOKS[kind](nn.ModuleDict(made).get_submodule(where))
        return made

    if "backward" in kind and "." not in where:
        with pytest.raises(WorkloadError, match="has a backward hook outside of blocks"):
            capture(workload(make, through))
        return
    ours, theirs = (workload(make, through) for _ in range(2))
    assert_same(planned(ours), looped(theirs))
