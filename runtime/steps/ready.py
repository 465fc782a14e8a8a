"""Ready: a slice run as one rank carries it out, with what stays the same from step to step looked up once.

Small models have hundreds of slices a second, and after each the caches hold other things than what is looked up here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spindle.capture.codes import OperatorCode
from spindle.record.substitutes.draws import Stream
from spindle.runtime.programs.program import Program, SliceRun
from spindle.values.graph import TensorSpec, base_task, micro_batch
from spindle.values.units import Bounds, Units


@dataclass(frozen=True, slots=True)
class Ready:
    """Run `run` on a rank that stands at `index` among its ranks, and computes part `part` in the group `copy`."""

    run: SliceRun
    index: int
    copy: tuple[int, ...]
    part: int
    task: str
    micro: int
    codes: tuple[OperatorCode, ...]
    inputs: tuple[tuple[TensorSpec, bool], ...]  # and whether a gradient goes back
    outputs: tuple[tuple[TensorSpec, torch.dtype], ...]

    def stream(self, now: Stream, first_batch: int, units: Units, bounds: Bounds) -> Stream:
        """Where the run's random numbers stand in a round that begins with batch `first_batch` of a step."""
        return Stream(
            seed=now.seed,
            step=now.step,
            batch=first_batch + self.micro,
            task=self.task,
            low=bounds[0],
            high=bounds[1],
            units=units,
            device=now.device,
            portable=now.portable,
            part=self.part,
            parts=len(self.copy),
            samples=bounds[1] - bounds[0],
        )


def ready_runs(program: Program, rank: int, codes: Mapping[str, OperatorCode]) -> dict[str, Ready]:
    """The runs of one rank, by name."""
    return {run.name: _ready(program, rank, run, codes) for run in program.slices if rank in run.ranks}


def _ready(program: Program, rank: int, run: SliceRun, codes: Mapping[str, OperatorCode]) -> Ready:
    specs, copy = program.tensor_by_name, run.copy_of(rank)
    return Ready(
        run=run,
        index=run.ranks.index(rank),
        copy=tuple(sorted(copy)),
        part=copy.index(rank),
        task=base_task(run.task),
        micro=micro_batch(run.task),
        codes=tuple(codes[name] for name in run.operators),
        inputs=tuple((specs[tensor], specs[tensor].needs_grad and run.backward) for tensor in run.inputs),
        outputs=tuple((specs[tensor], getattr(torch, specs[tensor].dtype)) for tensor in run.outputs),
    )
