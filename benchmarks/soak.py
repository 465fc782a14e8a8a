"""Soak: thousands of steps with random faults and changes of tasks and devices; nothing may grow, no weight may differ.

    python benchmarks/soak.py                          10,000 steps; some twenty minutes
    python benchmarks/soak.py --steps 600 --seed 1     a short one
    python benchmarks/soak.py --write                  writes benchmarks/results/soak.md too

- The first part consists of legs: runs of `spindle.train` that each resume the one before, with other tasks and another
  plan for one to three devices. In each of them ranks fail, the newest checkpoint is damaged, a device is lost for
  good, or SIGTERM comes. The second part is one leg of two ranks in which nothing happens, for growth that is slow.
- What happened is the schedule: which tasks were trained under which plan from which step on. An undisturbed run of it
  must end with the same weights, states of the optimizer and averages, bit for bit; one that stays on one device all
  the time, in float64, with the same to rounding.
- While it trains, memory, open files, threads, processes and names are counted. The command ends with code 1 where
  something grew by more than the tolerance that the page states, or where a weight differs.
"""

import argparse
import contextlib
import math
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a fresh clone as well

import torch
from soaking.growth import Usage, grown, table_of, usage
from soaking.parts import (
    KINDS,
    PLACES,
    TASKS,
    Faults,
    Optimizer,
    damage,
    evaluation_of,
    plan_of,
    workload_of,
)
from torch import Tensor

import spindle
from spindle.errors import PreemptedError
from spindle.failures import Failures
from spindle.metrics import Callback, JsonLines, StepMetrics
from spindle.runtime.checkpoints.checkpoint import latest, tensors
from spindle.values.plan import Plan

EVERY = 20  # steps between two checkpoints
SAMPLE_EVERY = 100  # steps between two counts of what the run holds
DISTURBED = 0.6  # the part of all steps in which something happens
LEG_STEPS = 300
TIMEOUT_S = 5.0
TOLERANCE = 1e-7  # of the largest value of a tensor: what rounding may make of it in a run on one device
RESULTS = Path(__file__).parent / "results" / "soak.md"


@dataclass(frozen=True, slots=True)
class Segment:
    """From step `first` on these tasks are trained under this plan."""

    first: int
    tasks: tuple[str, ...]
    plan: Plan


@dataclass
class Soak:
    """A run that is disturbed, and what is known of it. `folder`: for all of its files."""

    steps: int
    rng: random.Random
    folder: Path
    say: Callable[[str], None]
    faults: Faults = field(init=False)
    segments: list[Segment] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    recovered: list[str] = field(default_factory=list)
    attempts: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.checkpoints, asked = self.folder / "checkpoints", self.folder / "faults"
        asked.mkdir()
        self.faults = Faults(asked)

    def run(self) -> None:
        """Train all steps."""
        disturbed = int(self.steps * DISTURBED)
        first = True
        while first or self.done < disturbed:
            until = min(disturbed, self.done + self.rng.randint(LEG_STEPS // 2, LEG_STEPS * 3 // 2))
            kept = [task for task in TASKS if task == "text" or self.rng.random() < 0.7]
            self.leg(tuple(kept), self.rng.choice((1, 2, 2, 2, 3)), until, calm=first)
            first = False
        self.leg(TASKS, 2, self.steps, calm=True)

    @property
    def done(self) -> int:
        """Steps that the newest checkpoint has."""
        newest = latest(self.checkpoints) if self.checkpoints.exists() else None
        return int(newest.name.removeprefix("step-")) if newest else 0

    def leg(self, tasks: tuple[str, ...], num_devices: int, until: int, *, calm: bool) -> None:
        """Go on from the newest checkpoint up to step `until`, in several starts where SIGTERM comes."""
        workload = workload_of(self.faults, tasks)
        plan = plan_of(workload, num_devices, 0 if calm else self.rng.randrange(1000))
        elastic = not calm and num_devices == 2 and self.rng.random() < 0.3
        while self.done < until:
            watch = Watching(self, tasks, until, calm=calm, elastic=elastic)
            with contextlib.suppress(PreemptedError):
                result = train(
                    workload,
                    plan,
                    self,
                    until,
                    callbacks=(watch, JsonLines(self.folder / "metrics.jsonl")),
                    save_async=self.rng.random() < 0.5,
                    failures=Failures(max_failures=12, backoff_s=0.0, elastic=elastic),
                )
                self.recovered += [sentence.splitlines()[0][:200] for sentence in result.recovered]
        self.happened.subtract(self.faults.forget())
        self.say(f"{self.done} steps, {len(tasks)} tasks, plan for {num_devices}: {dict(self.happened)}")
        if not calm and self.rng.random() < 0.2:
            self.damage_newest()
        self.usages.append(usage(self.done, self.folder, self.began_s, between=True))

    def damage_newest(self) -> None:
        """Damage the newest checkpoint, where there is an older one."""
        found = sorted(self.checkpoints.glob("step-*"))
        if len(found) > 1:
            damage(found[-1], self.rng)
            self.happened["checkpoint damaged"] += 1

    def starts(self, first: int, tasks: tuple[str, ...], plan: Plan) -> None:
        """An attempt starts after this step; later steps that were done are done again."""
        self.attempts += 1
        self.segments = [each for each in self.segments if each.first < first]
        last = self.segments[-1] if self.segments else None
        if last is None or (last.tasks, last.plan) != (tasks, plan):
            self.segments.append(Segment(first, tasks, plan))


class Watching(Callback):
    """What a leg does beside training: notes each start, counts what is held, and asks for faults."""

    def __init__(self, soak: Soak, tasks: tuple[str, ...], until: int, *, calm: bool, elastic: bool) -> None:
        self.soak, self.tasks, self.elastic = soak, tasks, elastic
        first, rng = soak.done + 1, soak.rng
        count = 0 if calm else rng.randint(1, 3)
        self.due = sorted(rng.sample(range(first, until + 1), min(count, until + 1 - first)))

    def on_train_begin(self, plan: Plan, first_step: int) -> None:
        """A start, or another one after a failure."""
        self.soak.starts(first_step, self.tasks, plan)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """A step is done, in which something may be due."""
        step = metrics.step
        if self.due and step >= self.due[0]:
            self.due.pop(0)
            self.disturb()
        if step % SAMPLE_EVERY == 0:
            soak = self.soak
            soak.usages.append(usage(step, soak.folder, soak.began_s, attempt=soak.attempts))

    def disturb(self) -> None:
        """Let something happen."""
        soak, rng = self.soak, self.soak.rng
        chance = rng.random()
        if self.elastic:
            self.elastic = False
            soak.happened["device lost"] += 1
            soak.faults.lose_device()
            soak.faults.ask("optimizer", "killed")
        elif chance < 0.1:
            soak.happened["SIGTERM"] += 1
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            place, kind = rng.choice(PLACES), rng.choice(KINDS)
            if chance < 0.3:
                soak.damage_newest()
            soak.happened[kind] += 1
            soak.faults.ask(place, kind)


def train(workload: Any, plan: Plan, soak: Soak, until: int, **options: Any) -> spindle.TrainResult:
    """What all runs share: optimizer, schedule, checkpoints."""
    faults = soak.faults

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        faults.start()
        made = Optimizer(parameters, lr=1e-3, foreach=True)
        made.faults = faults
        return made

    usual = {"launcher": "processes", "checkpoints": soak.checkpoints, "checkpoint_every": EVERY}
    return spindle.train(
        workload,
        plan,
        optimizer=optimizer,
        scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0 / (1.0 + step / 500)),
        steps=until,
        resume=True,
        keep_checkpoints=3,
        evaluation=evaluation_of(workload),
        evaluate_every=50,
        **{"timeout_s": TIMEOUT_S, **usual, **options},
    )


def undisturbed(soak: Soak, folder: Path, *, one_device: bool) -> dict[str, Tensor]:
    """What a run of the same schedule ends with, in which nothing fails; or one that stays on one device."""
    schedule = soak.segments
    if one_device:
        schedule = [s for k, s in enumerate(schedule) if k == 0 or s.tasks != schedule[k - 1].tasks]
    for index, segment in enumerate(schedule):
        until = schedule[index + 1].first if index + 1 < len(schedule) else soak.steps
        workload = workload_of(soak.faults, segment.tasks)
        plan = plan_of(workload, 1, 0) if one_device else segment.plan
        options = {"checkpoints": folder, "checkpoint_every": soak.steps, "timeout_s": 60.0}
        train(workload, plan, soak, until, **options, launcher="threads" if one_device else "processes")
    return held(folder)


def held(folder: Path) -> dict[str, Tensor]:
    """Weights, buffers, states of the optimizer and averages of the newest checkpoint."""
    newest = latest(folder)
    assert newest is not None
    return tensors(newest, lambda name: True)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a part of the largest value of its tensor."""
    errors = [
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        for name, value in expected.items()
        if value.is_floating_point() and value.numel()
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def own_folder() -> Path:
    """A folder in which this process and its ranks make all temporary files; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    (folder / "temporary").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "temporary")
    after_all_others = -1000  # multiprocessing removes a folder of its own in there
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=after_all_others)
    return folder


def soaked(steps: int, seed: int, say: Callable[[str], None]) -> tuple[str, list[str]]:
    """Do all of it: a report, and a sentence for each thing that is not as it should be."""
    folder = own_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each fault one
        soak = Soak(steps, random.Random(seed), folder, say)
        soak.run()
        took_s = time.monotonic() - soak.began_s
        say(table_of(soak.usages))  # what follows takes as long again, and more
        found = held(soak.checkpoints)
        wrong = [f"{name} is not that of the undisturbed run" for name in
                 differing(found, undisturbed(soak, folder / "calm", one_device=False))][:3]  # fmt: skip
        error = largest_error(found, undisturbed(soak, folder / "one", one_device=True))
    if not error <= TOLERANCE:
        wrong.append(f"weights differ from those of one device by {error:.2g}, tolerated are {TOLERANCE:g}")
    wrong += grown(soak.usages)
    counts = ", ".join(f"{count} x {what}" for what, count in sorted(soak.happened.items()) if count)
    told = (
        f"# Soak\n\n`python benchmarks/soak.py --steps {steps} --seed {seed}` on {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, ranks on CPU.\n\n"
        f"{steps} steps in {took_s:.0f} s, {soak.attempts} starts, {len(soak.segments)} changes of tasks or plan.\n"
        f"What happened: {counts or 'nothing'}. Ranks were started again {len(soak.recovered)} times.\n"
        f"Against the undisturbed run of the same schedule: {len(found)} tensors of weights, states and averages, "
        f"{'all equal bit for bit' if not any('undisturbed' in each for each in wrong) else 'NOT equal'}.\n"
        f"Against a run on one device in float64: they differ by at most {error:.1e} of a tensor's largest value.\n"
    )
    return f"{told}\n{table_of(soak.usages)}\n", wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else a product's last bit follows where its operands lie
    report, wrong = soaked(given.steps, given.seed, lambda text: print(text, file=sys.stderr, flush=True))
    report += "\n" + ("\n".join(wrong) or "Nothing grew, and no weight differs.") + "\n"
    print(report)
    if given.write:
        RESULTS.write_text(report)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
