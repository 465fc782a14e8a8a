"""Facts of a whole batch: code that uses one runs on the whole batch, though the first batch does not show it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spindle
from tests.random_plans import widest_plan

FACTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "a full mask": lambda batch: torch.where(batch["mask"].all(), 1.0, 0.5),
    "positions in all masks": lambda batch: batch["mask"].all(0).double().mean(),
    "the largest kind": lambda batch: 1.0 + batch["kind"].max(),
    "the share of a kind": lambda batch: (batch["kind"] == 0).double().mean(),
    "a flag of all": lambda batch: torch.where(batch["flag"].all(), 1.0, 0.5),
}


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_facts_of_a_batch_that_the_first_one_does_not_show(fact: str, num_ranks: int) -> None:
    """Nothing of the first batch differs between its parts; later ones differ in their first sample alone."""

    def make() -> spindle.Workload:
        torch.manual_seed(0)
        workload = spindle.Workload("facts")
        model = workload.component("model", nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "ab")))
        generator = torch.Generator().manual_seed(1)
        batches = [
            {
                "x": torch.randn(6, 4, generator=generator),
                "mask": torch.ones(6, 3, dtype=torch.bool),
                "kind": torch.zeros(6, dtype=torch.long),
                "flag": torch.ones(6, dtype=torch.bool),
            }
            for _ in range(3)
        ]
        for batch in batches[1:]:
            batch["mask"][0, 1], batch["kind"][0], batch["flag"][0] = False, 2, False

        @workload.task("task", batch_size=6, data=lambda: iter(batches))
        def task(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = (model(batch["x"]).square() * FACTS[fact](batch)).mean()
            return found

        return workload

    plain = make()
    optimizer = torch.optim.SGD([p for _, p in plain.named_parameters()], lr=0.1)
    wanted = []
    for batch in plain.tasks["task"].batches():
        optimizer.zero_grad()
        loss = plain.tasks["task"].function(dict(batch))
        torch.autograd.backward(loss)
        optimizer.step()
        wanted.append(float(loss.detach()))
    planned = make()
    plan = widest_plan(spindle.make_metagraph(planned), num_ranks)
    result = spindle.train(
        planned,
        plan,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        steps=3,
        launcher="threads",
        timeout_s=30.0,
    )
    assert [losses["task"] for losses in result.losses] == pytest.approx(wanted, rel=1e-5)
