"""Parity: every feature of the runtime on small models and one device, beside the user's own task functions in one
process on the CPU. One rank takes NCCL on a GPU; several share the device and talk over gloo.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import spindle
from spindle.runtime import parity
from spindle.runtime.comms.transport import ProcessTransport, join_store, serve_store
from spindle.runtime.controller import Prepared, prepare
from spindle.runtime.parallel.names import joined_pieces
from spindle.runtime.parity import Tolerance
from spindle.runtime.rank_spec import make_rank_specs
from spindle.runtime.reference import Outcome
from spindle.runtime.worker import Worker, merge_losses
from spindle.workload import Workload

ROOT = Path(__file__).parents[2]
WIDTH, HEADS, STEPS = 32, 4, 3


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:  # noqa: N803 - batch, time, channels
        batch, time_, _ = x_BTC.shape
        heads = self.qkv(self.first(x_BTC)).view(batch, time_, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = (
            F.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2).reshape(batch, time_, WIDTH)
        )
        y: Tensor = x_BTC + self.dropout(self.out(mixed))
        y = y + self.dropout(self.down(F.gelu(self.up(self.second(y)))))
        return y


class Tower(nn.Module):
    """A projection, layers, a head."""

    def __init__(self, inputs: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x.mean(1))
        return y


def build(
    dtype: torch.dtype, *, dropout: float = 0.0, frozen: bool = False, sharded: bool = False, **options: Any
) -> Workload:
    """Two towers on three tasks: contrastive, regression, and one tower alone."""
    torch.manual_seed(0)
    workload = Workload("parity", **options)
    left = workload.component("left", Tower(6, 3, dropout).to(dtype), shard="parameters" if sharded else None)
    right = workload.component("right", Tower(5, 2, dropout).to(dtype), optimizer={"lr": 0.02})
    if frozen:
        left.layers.requires_grad_(False)

    def data(rows: int, **widths: int) -> list[dict[str, Tensor]]:
        made = torch.Generator().manual_seed(rows)
        shapes = {name: (rows, width) if name == "y" else (rows, 7, width) for name, width in widths.items()}
        return [{n: torch.randn(*s, generator=made).to(dtype) for n, s in shapes.items()} for _ in range(2)]

    @workload.task("match", batch_size=8, data=data(8, a=6, b=5))
    def match(batch: dict[str, Tensor]) -> Tensor:
        a, b = F.normalize(left(batch["a"]), dim=-1), F.normalize(right(batch["b"]), dim=-1)
        logits = 5.0 * a @ b.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @workload.task("fit", batch_size=6, data=data(6, b=5, y=16), weight=0.5)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(right(batch["b"]), batch["y"])

    @workload.task("alone", batch_size=5, data=data(5, a=6, y=16), every=2)
    def alone(batch: dict[str, Tensor]) -> Tensor:
        return F.l1_loss(left(batch["a"]), batch["y"])

    return workload


@dataclass(frozen=True)
class Case:
    """A feature, the workload that uses it, and how near it must come."""

    name: str
    build: Callable[[], Workload]
    tolerance: Tolerance
    scheduled: bool = False


EXACT, SINGLE, ROUGH = (
    Tolerance(1e-9, 1e-10),
    Tolerance(1e-3, 1e-4, by_scale=True),
    Tolerance(1e-1, 1e-4, by_scale=True),
)
F64, F32 = torch.float64, torch.float32

CASES = (
    Case("float64", lambda: build(F64), EXACT),
    Case("float32", lambda: build(F32), SINGLE),
    Case("bf16 autocast", lambda: build(F32, precision="bf16"), ROUGH),
    Case("recompute", lambda: build(F64, recompute=["left", "right"]), EXACT),
    Case("recompute, bf16", lambda: build(F32, recompute=["left"], precision="bf16"), ROUGH),
    Case("dropout", lambda: build(F64, dropout=0.2), EXACT),
    Case("dropout, recompute", lambda: build(F64, dropout=0.2, recompute=["left"]), EXACT),
    Case("clipping", lambda: build(F64, max_grad_norm=0.3), EXACT),
    Case("accumulation", lambda: build(F64, accumulate=4, in_flight=2), EXACT),
    Case("frozen layers", lambda: build(F64, frozen=True), EXACT),
    Case("sharded optimizer", lambda: build(F64, shard_optimizer=True), EXACT),
    Case("sharded parameters", lambda: build(F64, sharded=True, max_grad_norm=0.3), EXACT),
    Case("schedule", lambda: build(F64), EXACT, scheduled=True),
)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """Momentum, so that updates show errors of former steps."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Half the rate each step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def prepared_for(case: Case, num_ranks: int) -> Prepared:
    """The case on a random plan; equal in every process."""
    sys.path.insert(0, str(ROOT))
    from tests.random_plans import random_plan

    workload = case.build()
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed=7, on_all=workload.shard_parameters)
    return prepare(workload, plan)


def run_rank(rank: int, number: int, num_ranks: int, port: int, device: str, folder: str) -> None:
    """One rank of a case; its report and weights into a file."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    case = CASES[number]
    prepared = prepared_for(case, num_ranks)
    spec = make_rank_specs(
        prepared.program,
        prepared.captured,
        prepared.workload,
        optimizer=momentum,
        scheduler=halving if case.scheduled else None,
    )[rank]
    share = None if device == "cuda" and num_ranks == 1 else torch.device(device, 0)  # None: NCCL
    transport = ProcessTransport(join_store("127.0.0.1", port, 60.0), rank, num_ranks, device=share)
    worker = Worker(spec, transport)
    report = worker.run(STEPS, keep_gradients=True, keep_spans=False)
    torch.save((report, worker.state(), worker.optimizer_state()), f"{folder}/{rank}.pt")
    worker.close()


def check(number: int, num_ranks: int, device: str) -> parity.ParityReport:
    """Run one case, and compare it with one process."""
    case = CASES[number]
    store = serve_store("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (number, num_ranks, store.port, device, folder)
        if num_ranks == 1:
            run_rank(0, *arguments)
        else:
            spawn(run_rank, arguments, nprocs=num_ranks)  # type: ignore[no-untyped-call]
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    prepared = prepared_for(case, num_ranks)
    reference = parity.run_reference(
        prepared.workload,
        STEPS,
        optimizer=momentum,
        scheduler=halving if case.scheduled else None,
    )
    reports = [report for report, _, _ in found]
    planned = Outcome(
        merge_losses(reports),
        [{report.rank: report.gradients[step] for report in reports} for step in range(STEPS)],
        {name: value for _, values, _ in found for name, value in values.items()},
        joined_pieces({name: value for _, _, states in found for name, value in states.items()}),
        {label: rate for report in reports for label, rate in report.learning_rates.items()},
    )
    return parity.compare(reference, planned, tolerance=case.tolerance)


def checked(device: str, ranks: list[int], *, small: bool) -> Iterator[dict[str, Any]]:
    """What is found of each case, on each number of ranks. `small`: of one case alone."""
    for number, case in enumerate(CASES):
        for num_ranks in ranks if not small or case.name == "recompute" else ():
            report = check(number, num_ranks, device)
            yield {
                "case": case.name,
                "ranks": num_ranks,
                "ok": report.ok,
                "largest_absolute_error": report.max_abs_error,
                "largest_relative_error": report.max_rel_error,
            }
