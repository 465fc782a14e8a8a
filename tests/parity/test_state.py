"""State beside gradients follows one process: running statistics, buffers that layers and tasks change."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spindle
from tests.parity.stateful import WIDTH, Make, follows, sgd, stack, tasks_on

few = settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Normed(nn.Module):
    """A layer with batch norm."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x)).tanh()
        return y


class Spectral(nn.Module):
    """A layer whose weight goes through power iteration, in the new form and the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.old(self.new(self.norm(x)).tanh())
        return y


class Centered(nn.Module):
    """A layer that takes away a moving mean, in place or by assignment, and reads it before it moves."""

    center: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.way = way
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.other(self.linear(x).tanh())
        y: Tensor = h * (1 + self.center.clone()) if self.way == "in place" else h * (1 + self.center)
        with torch.no_grad():
            if self.way == "in place":
                self.center.mul_(0.9).add_(h.mean(0), alpha=0.1)
            else:
                self.center = self.center * 0.9 + h.mean(0) * 0.1
        return y


class Checkpointed(nn.Module):
    """A layer that runs its inner one again in backward, by torch's own checkpoint."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.linear = inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, self.linear(x), use_reentrant=False)
        return y


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": Normed,
    "batch norm, cumulative": functools.partial(Normed, None),
    "spectral norm": Spectral,
    "center in place": functools.partial(Centered, "in place"),
    "center assigned": functools.partial(Centered, "assigned"),
}


def blocks(
    layer: str, tasks: int = 1, depth: int = 2, *, glue: bool = False, every: int = 1, **options: object
) -> Make:
    """Layers of a kind under some tasks, each a block of its own or all of them glue; `options` go to the workload."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("state", **options)  # type: ignore[arg-type]
        layers = [] if glue else [str(index) for index in range(depth)]
        trunk = workload.component("trunk", stack(LAYERS[layer], depth), layers=layers)
        return tasks_on(workload, trunk, tasks, every=every)

    return make


quiet = pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
each_layer = pytest.mark.parametrize("layer", LAYERS)
anywhere = given(num_ranks=st.integers(1, 4), seed=st.integers(0, 10**6), glue=st.booleans())


@quiet
@each_layer
@few
@anywhere
def test_layers_of_one_task(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """What a layer changes is as in one process, wherever it runs."""
    follows(blocks(layer, glue=glue), num_ranks, seed)


@quiet
@each_layer
@few
@anywhere
def test_layers_of_several_tasks(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Tasks change them in the order of the list, on whatever devices they run; one of them rests now and then."""
    follows(blocks(layer, tasks=3, glue=glue, every=2), num_ranks, seed)


@quiet
@each_layer
@few
@anywhere
def test_layers_computed_again(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Recomputation finds what it changes as it was, and leaves it as it stood."""
    follows(blocks(layer, tasks=2, glue=glue, recompute=("trunk",)), num_ranks, seed)


@quiet
@each_layer
@few
@anywhere
def test_layers_under_concurrent_micro_batches(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """All batches of a task come before those of the next one."""
    follows(blocks(layer, tasks=2, glue=glue, accumulate=2, in_flight=2), num_ranks, seed)


@quiet
@few
@given(num_ranks=st.integers(1, 4), seed=st.integers(0, 10**6), in_flight=st.sampled_from((1, 2)))
def test_statistics_in_rounds(num_ranks: int, seed: int, in_flight: int) -> None:
    """Statistics keep the order of one process though rounds let tasks take turns."""
    follows(blocks("batch norm", tasks=2, accumulate=4, in_flight=in_flight), num_ranks, seed)


@quiet
@few
@anywhere
def test_states_of_one_task_in_rounds(num_ranks: int, seed: int, glue: bool) -> None:
    """A state goes from the last run of a round to the first of the next."""
    follows(blocks("center in place", glue=glue, accumulate=4, in_flight=2), num_ranks, seed)


def test_states_of_several_tasks_in_rounds_are_refused() -> None:
    """Rounds let tasks take turns, which no order of one process is."""
    workload = blocks("spectral norm", tasks=2, accumulate=2)()
    with pytest.raises(
        spindle.SpindleError, match=r"both read or change buffer 'trunk.0.new.*set accumulate=1"
    ) as caught:
        spindle.train(workload, optimizer=sgd, steps=1, launcher="threads")
    assert "tasks 't0' and 't1'" in str(caught.value)
