"""Ready: a slice run as one rank carries it out, with what stays the same from step to step looked up once.

Small models have hundreds of slices a second, and after each the caches hold other things than what is looked up here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spindle.capture.codes import OperatorCode
from spindle.capture.draws import Stream
from spindle.capture.repeat import base_task, micro_batch
from spindle.graph import TensorSpec
from spindle.runtime.programs.program import Program, SliceRun


@dataclass(frozen=True, slots=True)
class Ready:
    """Run `run` on a rank that holds samples `low` to `high - 1` and computes part `part` in the group `copy`.

    `whole` names, by input, the run on this rank that made all of it; other inputs arrive, or in parts.
    """

    run: SliceRun
    low: int
    high: int
    copy: tuple[int, ...]
    part: int
    task: str
    micro: int
    codes: tuple[OperatorCode, ...]
    inputs: tuple[tuple[TensorSpec, bool], ...]  # and whether a gradient goes back
    outputs: tuple[tuple[TensorSpec, torch.dtype], ...]
    whole: Mapping[str, str]

    def stream(self, now: Stream, first_batch: int) -> Stream:
        """Where the run's random numbers stand in a round that begins with batch `first_batch` of a step."""
        return Stream(
            seed=now.seed,
            step=now.step,
            batch=first_batch + self.micro,
            task=self.task,
            low=self.low,
            device=now.device,
            portable=now.portable,
            part=self.part,
            parts=len(self.copy),
            samples=self.high - self.low,
        )


def ready_runs(program: Program, rank: int, codes: Mapping[str, OperatorCode]) -> dict[str, Ready]:
    """The runs of one rank, by name."""
    maker = {tensor: run for run in program.slices for tensor in run.outputs}
    return {run.name: _ready(program, rank, run, codes, maker) for run in program.slices if rank in run.ranks}


def _ready(
    program: Program, rank: int, run: SliceRun, codes: Mapping[str, OperatorCode], maker: Mapping[str, SliceRun]
) -> Ready:
    specs, copy, (low, high) = program.tensor_by_name, run.copy_of(rank), run.bounds_of(rank)
    return Ready(
        run=run,
        low=low,
        high=high,
        copy=tuple(sorted(copy)),
        part=copy.index(rank),
        task=base_task(run.task),
        micro=micro_batch(run.task),
        codes=tuple(codes[name] for name in run.operators),
        inputs=tuple((specs[tensor], specs[tensor].needs_grad and run.backward) for tensor in run.inputs),
        outputs=tuple((specs[tensor], getattr(torch, specs[tensor].dtype)) for tensor in run.outputs),
        whole={t: maker[t].name for t in run.inputs if _stays_whole(specs[t], maker[t], run, rank)},
    )


def _stays_whole(spec: TensorSpec, source: SliceRun, target: SliceRun, rank: int) -> bool:
    if rank not in source.ranks:
        return False
    return source.bounds_of(rank) == target.bounds_of(rank) if spec.rows else source.ranks[0] == rank
