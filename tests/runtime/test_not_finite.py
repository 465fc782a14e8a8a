"""Losses and gradients that are no numbers: found before a parameter becomes one, by name, on all ranks alike."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import InputError, NotFiniteError, SpindleWarning
from spindle.runtime.devices import Streams
from spindle.runtime.steps.executor import Executor
from spindle.runtime.steps.finite import not_finite
from tests.random_plans import random_plan, widest_plan

GOOD = {"x": torch.arange(24.0).reshape(8, 3).sin()}
SPOILED: dict[str, dict[str, Tensor]] = {
    "nan": {"x": torch.full((8, 3), torch.nan)},
    "inf": {"x": torch.full((8, 3), torch.inf)},
    "one sample": {"x": torch.cat([GOOD["x"][:7], torch.full((1, 3), torch.nan)])},
}


class Steep(torch.autograd.Function):
    """A value whose gradient overflows, while the loss is fine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def workload(batches: list[dict[str, Tensor]], *, steep: bool = False, **options: Any) -> spindle.Workload:
    """Two tasks, of which `bad` reads these batches; a shared trunk."""
    torch.manual_seed(0)
    made = spindle.Workload("numbers", **options)
    trunk = made.component("trunk", nn.Sequential(*(nn.Linear(3, 3) for _ in range(2))))
    head = made.component("head", nn.Linear(3, 3))
    other = made.component("other", nn.Linear(3, 3))

    @made.task("bad", batch_size=8, data=batches)
    def bad(batch: dict[str, Tensor]) -> Tensor:
        y = head(trunk(batch["x"]))
        return F.mse_loss(Steep.apply(y) if steep else y, batch["x"])  # type: ignore[no-untyped-call]

    @made.task("good", batch_size=8, data=[GOOD])
    def good(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(other(trunk(batch["x"])), batch["x"])

    return made


sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(made: spindle.Workload, ranks: int, seed: int | None = None, **options: Any) -> Any:
    metagraph = spindle.make_metagraph(made)
    plan = widest_plan(metagraph, ranks) if seed is None else random_plan(metagraph, ranks, seed)
    return spindle.train(made, plan, optimizer=sgd, launcher="threads", **options)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", SPOILED)
def test_a_run_ends_before_its_weights_are_spoiled(kind: str, ranks: int, tmp_path: Path) -> None:
    """With step, task and component; the checkpoint before is whole, and finite."""
    made = workload([GOOD, GOOD, SPOILED[kind]])
    said = r"step 3 \(weights are as step 2 left them\): the loss of task 'bad' is (nan|inf|not finite)"
    with pytest.raises(NotFiniteError, match=said) as caught:
        trained(made, ranks, steps=5, checkpoints=tmp_path, checkpoint_every=2)
    assert "not_finite='skip'" in str(caught.value)
    again = workload([GOOD])
    assert spindle.load_checkpoint(again, tmp_path / "step-00000002") == 2
    assert all(bool(parameter.isfinite().all()) for _, parameter in again.named_parameters())


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"shard_optimizer": True}, {"max_grad_norm": 1.0}])
def test_a_skipped_step_leaves_no_trace_in_weights(seed: int | None, options: dict[str, Any]) -> None:
    """A run that skips the third step has the weights of one process that leaves it out."""
    made = workload([GOOD, GOOD, SPOILED["nan"], GOOD], **options)
    with pytest.warns(SpindleWarning, match=r"step 3: .*component .*; the optimizer did not step"):
        result = trained(made, 3, seed, steps=5, not_finite="skip")
    assert list(result.skipped) == [3]
    assert "the loss of task 'bad' is nan" in result.skipped[3]
    whys = result.skipped[3].split(", ")
    assert len(whys) == len(set(whys)), "two devices that found the same say it once"
    plain = workload([GOOD])
    optimizer = sgd([parameter for _, parameter in plain.named_parameters()])
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward([task.function(dict(GOOD)) for task in plain.tasks.values()])
        if options.get("max_grad_norm"):
            nn.utils.clip_grad_norm_([parameter for _, parameter in plain.named_parameters()], 1.0)
        optimizer.step()
    expected = dict(plain.named_parameters())
    for name, value in made.named_parameters():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_say_so_alike(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that neither compute the task nor hold what it trains, and of a batch of an earlier round."""
    told: list[str] = []
    plain = Executor.carry_out

    def noted(self: Executor, *args: Any) -> None:
        try:
            plain(self, *args)
        except NotFiniteError as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(Executor, "carry_out", noted)
    made = workload([GOOD, GOOD, SPOILED["nan"], GOOD], accumulate=2)
    metagraph = spindle.make_metagraph(made)
    with pytest.raises(NotFiniteError):
        spindle.train(made, random_plan(metagraph, 3, rank), optimizer=sgd, launcher="threads", steps=3)
    assert len(told) == 3
    assert all("step 2 (weights are as step 1 left them): the loss of task 'bad' is n" in each for each in told)


def test_a_gradient_alone_is_found() -> None:
    """The loss is a number, what comes back is none."""
    with pytest.raises(
        NotFiniteError, match=r"step 1 \(weights are as they were\): the gradient of component '(head|trunk)'"
    ):
        trained(workload([GOOD], steep=True), 2, steps=1)


def test_who_wants_to_go_on_does() -> None:
    """As runs did before."""
    made = workload([SPOILED["nan"]])
    result = trained(made, 2, steps=2, not_finite="ignore")
    assert len(result.losses) == 2
    assert not all(bool(parameter.isfinite().all()) for _, parameter in made.named_parameters())
    with pytest.raises(InputError, match="not_finite is 'halt'; give one of stop, skip, ignore"):
        trained(made, 2, steps=2, not_finite="halt")


def test_large_numbers_are_numbers() -> None:
    """A norm that adds up squares would overflow."""
    fine = {"a.w": torch.full((100,), 3e38), "b.w": torch.full((3,), 3e38, dtype=torch.bfloat16), "c.w": torch.empty(0)}
    streams = Streams(torch.device("cpu"))
    assert not_finite([{"t": torch.tensor(1e38)}], fine, None, streams) == ("", [])
    fine["b.w"][1] = torch.nan
    fine["a.v"] = torch.tensor([-torch.inf])
    said = (
        "the loss of task 't' is inf, the gradient of component 'a' is not finite (a.v), the gradient of component 'b' "
        "is not finite (b.w)"
    )
    for norm in (None, torch.tensor(torch.nan)):
        assert not_finite([{"t": torch.tensor(torch.inf)}], fine, norm, streams) == (said, ["t"])
    assert not_finite([{"t": torch.tensor(1.0)}], fine, torch.tensor(1.0), streams) == ("", [])
