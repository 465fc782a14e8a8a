"""Compiled layers beside the same ones uncompiled: python benchmarks/compiled.py [-o FILE]

Both runs are started, then take turns of a few steps; a figure is the median over turns, a ratio the median of the
ratios of neighboring turns. Same modules, batches, plan and optimizer; losses are compared. The run that does not take
its turn waits on a pipe. The first turn of each, in which layers are compiled, is told by itself.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import spindle
from spindle.runtime.controller import Run, launched, prepare
from spindle.workload import Workload

STEPS, TURNS = 4, 5
WIDTH, WORDS, VOCABULARY, BATCH = 128, 32, 256, 8


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def language() -> nn.Module:
    """Layers of a Hugging Face language model: RMS norms, rotary embeddings and gates as operators of their own."""
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_attention_heads=WIDTH // 32,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


class Dropping(nn.Module):
    """A layer of torch with dropout in front of its residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The next states."""
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")), 0.1, self.training)


def llama(compile: bool) -> Workload:
    """A language model."""
    torch.manual_seed(0)
    made = Workload("llama")
    model: Any = made.component("lm", language(), compile=compile)
    batches = [{"ids": torch.randint(0, VOCABULARY, (BATCH, WORDS))} for _ in range(2)]

    @made.task("text", batch_size=BATCH, data=batches)
    def text(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(input_ids=batch["ids"], labels=batch["ids"]).loss
        return loss

    return made


def dropout(compile: bool) -> Workload:
    """Layers that draw."""
    torch.manual_seed(0)
    made = Workload("dropout")
    tower = made.component("tower", nn.Sequential(*(Dropping() for _ in range(6))), compile=compile)
    batches = [{"x": torch.randn(BATCH, WORDS, WIDTH)} for _ in range(2)]

    @made.task("fit", batch_size=BATCH, data=batches)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(tower(batch["x"]), batch["x"])

    return made


WORKLOADS: dict[str, Callable[[bool], Workload]] = {"llama": llama, "dropout": dropout}


def compare(name: str, num_ranks: int) -> str:
    """One row of the table."""
    plan = spindle.make_plan(WORKLOADS[name](False), f"1x{num_ranks}:cpu")
    with ExitStack() as stack:
        runs: list[Run] = [
            stack.enter_context(
                launched(prepare(WORKLOADS[name](compile), plan), optimizer=adam, launcher="processes", timeout_s=300.0)
            )
            for compile in (False, True)
        ]
        first = [turn(run) for run in runs]
        times, losses = ([], []), ([], [])  # type: ignore[var-annotated]
        for _ in range(TURNS):
            for side, run in enumerate(runs):
                seconds, found = turn(run)
                times[side].append(seconds / STEPS)
                losses[side].extend(found)
    plain_ms, compiled_ms = (1e3 * statistics.median(each) for each in times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    error = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    cells = [name, str(num_ranks), f"{plain_ms:.1f}", f"{compiled_ms:.1f}", f"**{ratio:.2f}**"]
    return "| " + " | ".join([*cells, f"{first[1][0] - first[0][0]:.0f}", f"{error:.0e}"]) + " |"


def turn(run: Run) -> tuple[float, list[float]]:
    """Seconds of some steps, and their losses."""
    began = time.perf_counter()
    losses, _ = run.steps(STEPS, keep_spans=False)
    return time.perf_counter() - began, [loss for step in losses for loss in step.values()]


def table(rows: list[str]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| workload | ranks | uncompiled ms | compiled ms | times faster | first turn, s longer | loss error |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    yield from rows


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in WORKLOADS:
        for num_ranks in (1, 2):
            rows.append(compare(name, num_ranks))
            print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# Compiled layers",
        "",
        f"`python benchmarks/compiled.py`: {STEPS} steps a turn, {TURNS} turns a side, float32, batches of {BATCH}.",
        f"{versions}, {os.cpu_count()} cores, {platform.machine()}.",
        "",
        *table(rows),
    ]
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
