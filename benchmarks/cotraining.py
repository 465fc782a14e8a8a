"""StarVLA's co-training step as Spindle plans it beside its sequential loop, on the ranks of this machine.

    python benchmarks/cotraining.py [--ranks 2] [--turns 9] [-o benchmarks/results/cotraining.md]

Both train docs/examples/vla_cotraining: same modules, batches, optimizer groups, schedule and clipping. Both sides are
started, then take turns of a few steps; a figure is the median over turns, a ratio the median of the ratios of
neighboring turns.

- `the loop`: `loop.py` under DistributedDataParallel. Each task goes forward and backward in turn, and each backward
  reduces the gradients, as StarVLA's does under DeepSpeed.
- `losses summed`: one forward of both tasks, one backward, one reduction of a static graph, as one who knows writes it.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from race.peers import Peer, Step
from torch import Tensor, nn

import spindle
from spindle.runtime.controller import Run, launched, prepare
from spindle.verbs.source import load_workload

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "vla_cotraining"
SPINDLE, KINDS = "Spindle", ("the loop", "losses summed")
STEPS = 5


def stepper(kind: str, rank: int, num_ranks: int) -> Step:
    """A step of the example's loop on a rank, which trains on its share of each batch."""
    sys.path.insert(0, str(EXAMPLE))
    loop = __import__("loop")
    feeds = {
        "action": shares(loop.Scenes(32, seed=1), rank, num_ranks),
        "questions": shares(loop.Scenes(8, seed=2), rank, num_ranks),
    }
    if kind == "losses summed":
        return summed(loop, feeds)
    policy = nn.parallel.DistributedDataParallel(
        loop.Policy(), find_unused_parameters=True, gradient_as_bucket_view=True, forward_sync_buffers=False
    )
    made = loop.Loop(policy)

    def step() -> dict[str, Tensor]:
        losses = made.step(next(feeds["action"]), next(feeds["questions"]))
        return {task: torch.tensor(loss) for task, loss in losses.items()}

    return step


class Both(nn.Module):
    """The losses of both tasks in one forward."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, scenes: dict[str, Tensor], asked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.policy("action", scenes), self.policy("questions", asked)


def summed(loop: Any, feeds: dict[str, Iterator[dict[str, Tensor]]]) -> Step:
    """One backward of the summed losses."""
    policy = loop.Policy()
    made = loop.Loop(policy)
    both = nn.parallel.DistributedDataParallel(
        Both(policy), static_graph=True, gradient_as_bucket_view=True, forward_sync_buffers=False
    )

    def step() -> dict[str, Tensor]:
        made.optimizer.zero_grad()
        action, questions = both(next(feeds["action"]), next(feeds["questions"]))
        torch.autograd.backward(action + loop.LOSS_SCALE * questions)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        made.optimizer.step()
        made.schedule.step()
        return {"action": action, "questions": questions}

    return step


def shares(scenes: Any, rank: int, num_ranks: int) -> Iterator[dict[str, Tensor]]:
    """A rank's part of each batch, for ever."""
    while True:
        for batch in scenes:
            yield {name: value.chunk(num_ranks)[rank] for name, value in batch.items()}


@dataclass(frozen=True)
class Measured:
    """Seconds a step of Spindle and of each kind of loop by turn, and the plan."""

    plan: spindle.Plan
    turns: tuple[dict[str, float], ...]

    def row(self, kind: str) -> str:
        """Spindle beside a loop as a row of the table."""
        ours, theirs = ([turn[side] for turn in self.turns] for side in (SPINDLE, kind))
        low, middle, high = statistics.quantiles([their / our for our, their in zip(ours, theirs, strict=True)], n=4)
        ours_ms, theirs_ms = 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs)
        cells = (f"{ours_ms:.1f}", kind, f"{theirs_ms:.1f}", f"**{middle:.2f}**", f"{low:.2f} to {high:.2f}")
        return "| " + " | ".join(cells) + " |"


def measured(num_ranks: int, turns: int) -> Measured:
    """All sides in turns, after a turn to warm up."""
    workload, module = load_workload(str(EXAMPLE / "model.py"))
    profile = spindle.make_profile(workload, num_devices=num_ranks, optimizer=module.optimizer)
    plan = spindle.make_plan(workload, f"1x{num_ranks}:cpu", profile=profile)
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    peers = {kind: Peer(kind, "", num_ranks, threads, stepper) for kind in KINDS}
    factories = {"optimizer": module.optimizer, "scheduler": module.scheduler}
    found = []
    with launched(prepare(workload, plan), **factories, launcher="processes", timeout_s=60.0) as run:
        for _ in range(turns + 1):
            turn = {SPINDLE: timed(run)}
            found.append(turn | {kind: peer.steps(STEPS)[0] / STEPS for kind, peer in peers.items()})
    for peer in peers.values():
        peer.close()
    return Measured(plan, tuple(found[1:]))


def timed(run: Run) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    run.steps(STEPS, keep_spans=False)
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = measured(options.ranks, options.turns)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Co-training beside its sequential loop",
        "",
        f"`{' '.join(['python benchmarks/cotraining.py', *sys.argv[1:]])}`, {datetime.now(UTC):%Y-%m-%d}: "
        f"{options.ranks} processes, {STEPS} steps a turn, {options.turns} turns a side.",
        f"{packages}, Python {platform.python_version()}, {os.cpu_count()} cores of a {platform.machine()} machine; "
        f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}. Plan `{found.plan.method}`, predicted "
        f"{1e3 * found.plan.step_s:.1f} ms.",
        "",
        "| Spindle ms | beside | ms | times faster | quartiles |",
        "|--:|---|--:|--:|--:|",
        *(found.row(kind) for kind in KINDS),
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
