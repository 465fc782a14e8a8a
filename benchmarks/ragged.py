"""Batches whose shapes change: python benchmarks/ragged.py [-o FILE]

Balance: packed texts of log-normal lengths on two ranks, the same plan with bounds by tokens and by number of samples,
in turns of a few steps in one run; the ratio is the median of the ratios of neighbouring turns.

Recording: what a step pays for being recorded anew, and for going through the replay of a batch of the same shapes,
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
from torch import Tensor

import spindle
from spindle.capture import capture
from spindle.record.draws import Stream
from spindle.runtime.controller import launched, prepare
from spindle.runtime.programs.messages import StepLayout
from spindle.runtime.recordings import Recipe, Recordings
from spindle.units import SAMPLES

SAMPLES_A_BATCH, VOCABULARY, TURNS, STEPS = 16, 512, 7, 6


def packed_rows(batch: dict[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Tokens of each text; texts follow each other along the second dimension."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([batch["position_ids"].shape[1]]))
    return dict.fromkeys(batch, (1, lengths))


def packed_batches(count: int, mean: float = 40.0, spread: float = 0.9) -> list[dict[str, Tensor]]:
    """Batches of 16 texts of log-normal lengths, packed into one row."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        normal = torch.randn(SAMPLES_A_BATCH, generator=generator)
        lengths = (mean * torch.exp(spread * normal - spread**2 / 2)).long().clamp(3, 400)
        ids = torch.randint(1, VOCABULARY, (1, int(lengths.sum())), generator=generator)
        positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
        found.append({"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)})
    return found


def language_model() -> Any:
    """A small Qwen2, its weights at random."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.Qwen2ForCausalLM(config)


def packed_text(batches: list[dict[str, Tensor]]) -> spindle.Workload:
    """One task: next words of packed texts."""
    workload = spindle.Workload("packed")
    lm = workload.component("lm", language_model())

    @workload.task("text", batch_size=SAMPLES_A_BATCH, rows=packed_rows, data=batches)
    def text(batch: dict[str, Tensor]) -> Tensor:
        logits = lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return workload


@dataclass(frozen=True)
class Balance:
    """Milliseconds a step with bounds by tokens and by samples, and the median ratio."""

    by_cost_ms: float
    by_count_ms: float
    ratio: float


def balance() -> Balance:
    """Both sides of the comparison in turns."""
    workload = packed_text(packed_batches(48))
    prepared = prepare(workload, spindle.make_plan(workload, "1x2:cpu", pins={"lm": [0, 1]}))
    program = prepared.program
    counted = replace(program, slices=tuple(replace(run, weigh_by=SAMPLES) for run in program.slices))
    options: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-4),
        "launcher": "processes",
        "timeout_s": 120.0,
    }
    times: tuple[list[float], list[float]] = ([], [])
    with launched(prepared, **options) as ours, launched(replace(prepared, program=counted), **options) as theirs:
        for run in (ours, theirs):
            run.steps(STEPS)
        for _ in range(TURNS):
            for run, seconds in ((ours, times[0]), (theirs, times[1])):
                started = time.perf_counter()
                run.steps(STEPS, keep_spans=False)
                seconds.append((time.perf_counter() - started) / STEPS)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Balance(1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1]), statistics.median(ratios))


@dataclass(frozen=True)
class Cost:
    """Milliseconds of CPU time: recording a batch anew, its replay, and a step in one process."""

    anew_ms: float
    replay_ms: float
    step_ms: float


def recording() -> Cost:
    """Of the packed language model, its whole batch."""
    workload = packed_text(packed_batches(8))
    captured = capture(workload)
    recordings = Recordings(Recipe.of(workload, captured).apart(), torch.device("cpu"))
    task = workload.tasks["text"]
    batches = [task.sampled(batch) for batch in task.batches()]

    def took(number: int) -> float:
        batch = batches[number]
        layout, stream = StepLayout(batch.units, {}, {}), Stream(task="text")
        started = time.process_time()
        recordings.loaded("text", batch, layout, stream).part((0, batch.units.num_samples))
        return 1e3 * (time.process_time() - started)

    took(0)
    anew = [took(number) for number in range(1, len(batches))]
    replayed = [took(number) for number in range(len(batches))]
    torch.set_num_threads(1)
    steps = []
    for batch in batches[:4]:
        started = time.process_time()
        task.function(dict(batch.fields)).backward()  # type: ignore[no-untyped-call]
        steps.append(1e3 * (time.process_time() - started))
    return Cost(statistics.median(anew), statistics.median(replayed), statistics.median(steps))


def main() -> None:
    """Measure, and print or write a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the results there, as Markdown")
    options = parser.parse_args()
    cost, compared = recording(), balance()
    text = f"""# Batches whose shapes change

`python benchmarks/ragged.py` on {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch
{torch.__version__}, transformers {transformers.__version__}. {SAMPLES_A_BATCH} packed texts of log-normal lengths (mean
40 tokens, deviation of the logarithm 0.9), a Qwen2 of 6 layers of width 192.

| two ranks, all layers on both | ms a step |
|---|---|
| bounds by tokens | {compared.by_cost_ms:.0f} |
| bounds by number of samples | {compared.by_count_ms:.0f} |
| by tokens is quicker by | {100 * (compared.ratio - 1):.0f} % |

| recording on one rank, whole batch | ms of CPU time |
|---|---|
| recorded anew (new shapes) | {cost.anew_ms:.1f} |
| replay (known shapes) | {cost.replay_ms:.2f} |
| forward and backward in one process, beside it | {cost.step_ms:.0f} |
"""
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
