"""Batches whose shapes change: python benchmarks/ragged.py [-o FILE]

- Balance: packed texts of log-normal lengths on two ranks, the same plan with bounds by tokens and by number of
  samples, in turns of a few steps in one run, through all batches.
- Prediction: what `spindle profile` and `spindle plan` say of the mean step and its percentiles, and what a run took.
- DistributedDataParallel: a two-tower multi-task workload on packed batches (ragged_models.py), in turns as above. It
  is written as its best user would: all tasks in one forward, one reduction a step, contrastive pairs of all ranks,
  losses equal to one process's.
- Recording: what a step pays for being recorded anew, and for going through the replay of a batch of the same shapes,
  beside a step of the same model in one process.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from race.peers import Peer, adam
from race.ragged import LARGE, SMALL, WIDE, Sizes, language_model, rows, texts, two_towers
from torch import Tensor

import spindle
from runtime import spindle_run, timed
from spindle.capture import capture
from spindle.capture.codes import OnDevice
from spindle.record.substitutes.draws import Stream
from spindle.runtime.controller import launched, prepare
from spindle.runtime.loading.recordings import Recipe, Recordings
from spindle.runtime.programs.messages import StepLayout
from spindle.values.plan import Plan, StepSpread
from spindle.values.units import SAMPLES as BY_COUNT
from spindle.values.units import shares
from spindle.workload import Workload

TURNS, STEPS, WIDTH = 8, 4, 256  # of all 32 batches each once
MOST_S = 120.0


def packed_text(sizes: Sizes = LARGE) -> Workload:
    """One task: next words of packed texts."""
    torch.manual_seed(0)
    workload = spindle.Workload("packed")
    lm = workload.component("lm", language_model(WIDTH))

    @workload.task("text", batch_size=sizes.samples, rows=rows, data=texts(sizes))
    def text(batch: dict[str, Tensor]) -> Tensor:
        logits = lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return F.cross_entropy(logits[0], batch["labels"][0])

    return workload


@dataclass(frozen=True)
class Compared:
    """Mean milliseconds a step of both sides, their ratio, and the largest relative error of their first losses."""

    ours_ms: float
    theirs_ms: float
    ratio: float
    loss_error: float = 0.0


def _compared(ours: list[float], theirs: list[float], loss_error: float = 0.0) -> Compared:
    """Turns of both sides on the same batches: all of them count, since they differ in size."""
    ours_s, theirs_s = statistics.fmean(ours), statistics.fmean(theirs)
    return Compared(1e3 * ours_s, 1e3 * theirs_s, theirs_s / ours_s, loss_error)


def more_tokens(sizes: Sizes) -> float:
    """Tokens of the larger of two shares by count, over those of the larger by tokens."""
    task, largest = packed_text(sizes).tasks["text"], [0, 0]
    for batch in map(task.sampled, task.batches()):
        tokens = batch.units.counts["input_ids"]
        for index, costs in enumerate((None, tokens)):
            largest[index] += max(sum(tokens[low:high]) for low, high in shares(batch.units, 2, costs))
    return largest[0] / largest[1]


def balance(sizes: Sizes) -> Compared:
    """Bounds by tokens and by count."""
    prepared = prepare(workload := packed_text(sizes), spindle.make_plan(workload, "1x2:cpu", pins={"lm": [0, 1]}))
    program = prepared.program
    counted = replace(program, slices=tuple(replace(run, weigh_by=BY_COUNT) for run in program.slices))
    options: dict[str, Any] = {"optimizer": adam, "launcher": "processes", "timeout_s": MOST_S}
    times: tuple[list[float], list[float]] = ([], [])
    with launched(prepared, **options) as ours, launched(replace(prepared, program=counted), **options) as theirs:
        for run in (ours, theirs):
            run.steps(STEPS)
        for _ in range(TURNS):
            for run, seconds in ((ours, times[0]), (theirs, times[1])):
                seconds.append(timed(run, STEPS)[0] / STEPS)
    return _compared(*times)


@dataclass(frozen=True)
class Predicted:
    """What was predicted of a step, and mean, P10 and P90 of what was measured, in seconds."""

    told: StepSpread
    mean_s: float
    p10_s: float
    p90_s: float


def planned(workload: Workload) -> Plan:
    """As users call it: profile, then plan."""
    optimizer: Any = adam
    profile = spindle.make_profile(workload, num_devices=2, optimizer=optimizer, launcher="processes")
    plan = spindle.make_plan(workload, "1x2:cpu", profile=profile)
    print(plan, flush=True)
    return plan


def prediction(workload: Workload, plan: Plan) -> Predicted:
    """Every batch of the data twice."""
    steps = 2 * len(list(next(iter(workload.tasks.values())).batches()))
    with spindle_run(workload, plan) as run:
        timed(run, STEPS)
        took = [timed(run, 1)[0] for _ in range(steps)]
    tenths = statistics.quantiles(took, n=10, method="inclusive")
    assert plan.spread is not None
    return Predicted(plan.spread, statistics.fmean(took), tenths[0], tenths[-1])


def beside_ddp(workload: Workload, plan: Plan, sizes: Sizes) -> Compared:
    """Spindle, planned on measured times, and DistributedDataParallel."""
    other = Peer("ddp", "packed, small" if sizes == SMALL else "packed, large", 2, 1)
    ours: list[float] = []
    theirs: list[float] = []
    with spindle_run(workload, plan) as run:
        mine, losses = timed(run, 1)[1], other.steps(1)[1]
        error = max(abs(mine[task] - loss) / abs(loss) for task, loss in losses.items())
        timed(run, STEPS), other.steps(STEPS)
        for _ in range(TURNS):
            ours.append(timed(run, STEPS)[0] / STEPS)
            theirs.append(other.steps(STEPS)[0] / STEPS)
    other.close()
    return _compared(ours, theirs, error)


@dataclass(frozen=True)
class Cost:
    """Milliseconds of CPU time: recording one of the first batches, a later one, a replay; a step in one process."""

    first_ms: float
    anew_ms: float
    replay_ms: float
    step_ms: float


def recording() -> Cost:
    """Of the packed language model, its whole batch."""
    workload = packed_text()
    captured = capture(workload)
    recordings = Recordings(Recipe.of(workload, captured).apart(), OnDevice(torch.device("cpu")))
    task = workload.tasks["text"]
    batches = [task.sampled(batch) for batch in task.batches()]

    def took(number: int) -> float:
        batch = batches[number]
        layout, stream = StepLayout(batch.units, {}, {}), Stream(task="text")
        started = time.process_time()
        recordings.loaded("text", batch, layout, stream).part((0, batch.units.num_samples))
        return 1e3 * (time.process_time() - started)

    took(0)
    first = [took(number) for number in range(1, 8)]  # while layers still run on the meta device
    anew = [took(number) for number in range(8, len(batches))]
    replayed = [took(number) for number in range(len(batches))]
    torch.set_num_threads(1)
    steps = []
    for batch in batches[:4]:
        started = time.process_time()
        task.function(dict(batch.fields)).backward()  # type: ignore[no-untyped-call]
        steps.append(1e3 * (time.process_time() - started))
    return Cost(*(statistics.median(taken) for taken in (first, anew, replayed, steps)))


def main() -> None:
    """Measure, and print or write a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the results there, as Markdown")
    options = parser.parse_args()
    cost, bounds, wide = recording(), balance(LARGE), balance(WIDE)
    text, small, large = packed_text(), two_towers(sizes=SMALL), two_towers(sizes=LARGE)
    plans = [planned(workload) for workload in (text, small, large)]
    ddp = [beside_ddp(small, plans[1], SMALL), beside_ddp(large, plans[2], LARGE)]
    told = [prediction(workload, plan) for workload, plan in zip((text, small, large), plans, strict=True)]
    page = f"""# Batches whose shapes change

`python benchmarks/ragged.py` on {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch
{torch.__version__}, transformers {transformers.__version__}; two ranks, float32, AdamW. All is packed; lengths are
log-normal, the deviation of their logarithm 0.9. *One tower*: a Qwen2 of 6 layers of width {WIDTH}, {LARGE.samples}
texts of {LARGE.text:g} tokens on average; with a long tail {WIDE.samples} of {WIDE.text:g}, deviation {WIDE.spread}.
*Two towers* of 6 layers of width 384: images and captions are matched, texts train the text tower. Small batches:
{SMALL}. Large ones: {LARGE}.

The larger share of a batch has more tokens by number of samples; attention over a dense mask costs their square.

| side by side, in turns | ms a step | beside it | ms a step | quicker by |
|---|---|---|---|---|
{_row("one tower, bounds by tokens", bounds, f"by number of samples: {more_tokens(LARGE) - 1:.0%} more tokens")}
{_row("the same, a long tail", wide, f"by number of samples: {more_tokens(WIDE) - 1:.0%} more tokens")}
{_row("two towers, small batches: Spindle", ddp[0], "DistributedDataParallel")}
{_row("two towers, large batches: Spindle", ddp[1], "DistributedDataParallel")}

First losses of the two towers differ by {max(found.loss_error for found in ddp):.0e} of their value.

| a step, in ms | mean | P10 | P90 |
|---|---|---|---|
{_rows("one tower", told[0])}
{_rows("two towers, small batches", told[1])}
{_rows("two towers, large batches", told[2])}

| recording on one rank, whole batch of one tower | ms of CPU time |
|---|---|
| recorded anew (new shapes), the first batches | {cost.first_ms:.1f} |
| recorded anew, later ones | {cost.anew_ms:.1f} |
| replay (known shapes) | {cost.replay_ms:.2f} |
| forward and backward in one process, beside it | {cost.step_ms:.0f} |
"""
    print(page)
    if options.output:
        options.output.write_text(page)


def _row(ours: str, found: Compared, theirs: str) -> str:
    gain = 100 * (found.ratio - 1)
    return f"| {ours} | {found.ours_ms:.0f} | {theirs} | {found.theirs_ms:.0f} | {gain:.0f} % |"


def _rows(name: str, found: Predicted) -> str:
    told, ms = found.told, 1e3
    return (
        f"| {name}, predicted from a profile | {ms * told.mean_s:.0f} | {ms * told.p10_s:.0f} | {ms * told.p90_s:.0f} |"
        f"\n| {name}, measured | {ms * found.mean_s:.0f} | {ms * found.p10_s:.0f} | {ms * found.p90_s:.0f} |"
    )


if __name__ == "__main__":
    main()
