"""A run that was resumed goes on as if it had never stopped: bit for bit under its plan, to rounding under another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import spindle
from spindle.runtime.checkpoints.checkpoint import latest
from spindle.values.plan import Plan
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import HandWritten, contrastive


class Rows(Dataset[dict[str, Tensor]]):
    """24 samples, a little noise drawn anew each time, as augmentation does."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        fixed = torch.Generator().manual_seed(index)
        a, b, y = (torch.randn(width, generator=fixed, dtype=torch.float64) for width in (5, 4, 8))
        return {"a": a + 0.1 * torch.randn(5, dtype=torch.float64), "b": b, "y": y}


class KeepsItsPlace:
    """A loader with a state of its own, as torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.start = self.position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.position, self.start = self.start, 0
        while self.position < 7:
            self.position += 1
            values = torch.arange(6 * 4, dtype=torch.float64).reshape(6, 4).sin() * self.position
            yield {"b": values, "y": values.repeat(1, 2).cos()}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


def towers(*, frozen: bool = False, sharded: bool = False) -> spindle.Workload:
    torch.manual_seed(0)
    workload = spindle.Workload("towers", max_grad_norm=5.0, shard_optimizer=sharded)
    workload.component("unused", HandWritten(2, depth=1).double())
    left = workload.component("left", HandWritten(5).double(), optimizer={"lr": 0.02})
    right = workload.component("right", HandWritten(4, depth=2).double())
    left.requires_grad_(not frozen)

    @workload.task("match", batch_size=6, data=DataLoader(Rows(), batch_size=6, shuffle=True))
    def match(batch: dict[str, Tensor]) -> Tensor:
        return contrastive(left(batch["a"]), right(batch["b"]))

    @workload.task("fit", batch_size=6, data=KeepsItsPlace(), every=2)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(right(batch["b"]), batch["y"])

    return workload


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
    decay = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [3])


def weights(workload: spindle.Workload) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in workload.named_parameters()}


def trained(workload: spindle.Workload, plan: Plan, steps: int, launcher: str = "threads", **options: Any) -> Any:
    return spindle.train(
        workload,
        plan,
        optimizer=adam,
        scheduler=schedule,
        steps=steps,
        launcher=launcher,  # type: ignore[arg-type]
        **options,
    )


def left_in(directory: Path) -> list[str]:
    """What a run leaves in its folder, beside the lock that it held and the record of a bad end."""
    return sorted(path.name for path in directory.iterdir() if path.name not in (".lock", "flight"))


@pytest.mark.parametrize("launcher", ["threads", pytest.param("processes", marks=pytest.mark.gloo)])
def test_the_same_plan_continues_bit_for_bit(tmp_path: Path, launcher: str) -> None:
    """Weights and losses after 9 steps equal those of 5 steps and 4 resumed ones, in other objects."""
    whole, first, second = towers(), towers(), towers()
    plan = random_plan(spindle.make_metagraph(whole), 2, 3)
    expected = trained(whole, plan, 9, launcher)
    trained(first, plan, 5, launcher, checkpoints=tmp_path)
    got = trained(second, plan, 9, launcher, checkpoints=tmp_path, resume=True)
    assert got.first_step == 5
    assert got.losses == expected.losses[5:]
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value), name


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_another_plan_continues_to_rounding(tmp_path: Path, num_ranks: int) -> None:
    """Two ranks begin with sharded states, others go on with them sharded or not."""
    whole, first, second = towers(), towers(sharded=True), towers(sharded=num_ranks == 3)
    metagraph = spindle.make_metagraph(whole)
    trained(whole, widest_plan(metagraph, 2), 9)
    trained(first, widest_plan(metagraph, 2), 5, checkpoints=tmp_path)
    trained(second, random_plan(metagraph, num_ranks, 8), 9, checkpoints=tmp_path, resume=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_a_part_unfrozen_later_begins_to_learn(tmp_path: Path) -> None:
    """A frozen tower stays as it is; resumed with it unfrozen, it moves, and what was trained goes on."""
    before, after = towers(frozen=True), towers()
    trained(before, widest_plan(spindle.make_metagraph(before), 2), 4, checkpoints=tmp_path)
    start = weights(towers())
    assert all(torch.equal(weights(before)[name], start[name]) for name in start if name.startswith("left"))
    trained(after, widest_plan(spindle.make_metagraph(after), 2), 6, checkpoints=tmp_path, resume=True)
    assert not torch.equal(weights(after)["left.stem.weight"], start["left.stem.weight"])


def test_every_so_often_and_the_newest_are_kept(tmp_path: Path) -> None:
    """Checkpoints after steps 3, 6 and, at the end, 7; the two newest stay, and nothing unfinished."""
    workload = towers()
    trained(workload, widest_plan(spindle.make_metagraph(workload), 2), 7, checkpoints=tmp_path, checkpoint_every=3,
            keep_checkpoints=2)  # fmt: skip
    assert left_in(tmp_path) == ["step-00000006", "step-00000007"]
    assert latest(tmp_path) == tmp_path / "step-00000007"


def test_resuming_from_nothing_begins(tmp_path: Path) -> None:
    """With resume=True the first run needs no other command than the later ones."""
    workload = towers()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    assert trained(workload, plan, 2, checkpoints=tmp_path / "new", resume=True).first_step == 0


def test_what_was_left_unfinished_is_no_checkpoint(tmp_path: Path) -> None:
    """A run killed while it wrote leaves the checkpoint before, which is the one resumed; then it is cleared away."""
    workload = towers()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    trained(workload, plan, 2, checkpoints=tmp_path)
    (tmp_path / ".step-00000004.part").mkdir()
    (tmp_path / ".step-00000004.part" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert trained(towers(), plan, 4, checkpoints=tmp_path, resume=True).first_step == 2
    assert left_in(tmp_path) == ["step-00000002", "step-00000004"]


def test_steps_that_are_done_already_are_refused(tmp_path: Path) -> None:
    """`steps` counts from the first run on."""
    workload = towers()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    trained(workload, plan, 2, checkpoints=tmp_path)
    with pytest.raises(spindle.SpindleError, match="2 steps are done already"):
        trained(workload, plan, 2, checkpoints=tmp_path, resume=True)
