"""A driver that trains for ever; run as a process of its own, to be killed."""

import sys
from pathlib import Path

import torch

import spindle
from tests.faulty import fragile_workload
from tests.random_plans import widest_plan


def main() -> None:
    """Say so when the first steps are done, and go on."""
    workload = fragile_workload(Path(sys.argv[1]) / "never")
    plan = widest_plan(spindle.make_metagraph(workload), 2)

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 1:
            print("training", flush=True)

    spindle.train(
        workload,
        plan,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        steps=10**6,
        launcher="ray",
        on_step=on_step,
    )


if __name__ == "__main__":
    main()
