"""Plain loops: a workload trained as planned beside a loop that anyone would write, which knows nothing of Spindle."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import spindle
from spindle.values.plan import Plan
from tests.random_plans import widest_plan
from tests.tiny_workloads import floats

WIDTH, STEPS = 8, 5


class Block(nn.Module):
    """A layer that is found to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act, self.down = nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(self.norm(x))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def tower(kind: type[nn.Module] = Block) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(kind(), kind())


def rows(seed: int = 1) -> list[dict[str, Tensor]]:
    """Three batches of four samples."""
    labels = torch.tensor([0, 1, 2, 1])
    return [{"x": floats(4, WIDTH, seed=seed + i, dtype=torch.float64), "y": labels.roll(i)} for i in range(3)]


Modules = dict[str, nn.Module]
Tasks = dict[str, Callable[[dict[str, Tensor]], Tensor]]


def workload(
    make: Callable[[], Modules],
    tasks: Callable[..., Tasks],
    *,
    as_made: bool = False,
    of_components: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> spindle.Workload:
    """`make` gives the components, which become float64 unless they are to stay `as_made`; `tasks`, called with them by
    name, the task functions. `of_components`: options of each component.
    """
    torch.manual_seed(0)
    made = spindle.Workload("plain", **options)
    modules = {name: module if as_made else module.double() for name, module in make().items()}
    own = of_components or {}
    held = {name: made.component(name, module, **own.get(name, {})) for name, module in modules.items()}
    for number, (name, function) in enumerate(tasks(**held).items()):
        made.task(name, batch_size=4, data=rows(number))(function)
    return made


def looped(made: spindle.Workload) -> dict[str, Tensor]:
    """Parameters after STEPS steps of a plain loop over the tasks."""
    trained = [parameter for _, parameter in made.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for task in made.tasks.values():
            batches = list(task.batches())
            task.function(dict(batches[step % len(batches)])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return values(made)


def planned(made: spindle.Workload, num_ranks: int = 2, plan: Plan | None = None) -> dict[str, Tensor]:
    """Parameters after STEPS steps as planned, every operator on as many ranks as it allows."""
    plan = plan or widest_plan(spindle.make_metagraph(made), num_ranks)
    spindle.train(
        made,
        plan,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        steps=STEPS,
        launcher="threads",
        timeout_s=30.0,
    )
    return values(made)


def values(made: spindle.Workload) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in made.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All parameters agree to the last few bits."""
    assert ours.keys() == theirs.keys()
    far = {
        n: float((ours[n] - theirs[n]).abs().max()) for n in ours if not torch.allclose(ours[n], theirs[n], 0, 1e-10)
    }
    assert not far
