"""Subprogram: some layers as a program of their own, between neighbors that stand for the rest of a step.

Run `BEFORE` has made what the layers read, run `AFTER` reads what they make; neither has operators. Who executes an
excerpt puts the outputs of the one and the gradients of the other where a step would have left them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spindle.runtime.programs.lower import make_buckets, slice_run, split_samples
from spindle.runtime.programs.program import Program, SliceRun
from spindle.values.graph import TaskGraph
from spindle.values.plan import Slice

BEFORE, AFTER = "before", "after"


def excerpt(
    graph: TaskGraph,
    parts: Sequence[Sequence[str]],
    count: int,
    *,
    losses: Mapping[str, str],
    recompute: bool = False,
    copy: tuple[int, ...] = (),
) -> Program:
    """A program for `count` ranks that share the batch: each part is a slice run of operators that follow each other.

    `losses`: the tensor that holds each task's loss; `recompute`: runs keep their inputs only. `copy`: these ranks
    alone run, which hold one copy of the layers between them, on the first of the shares that all `count` would have.
    """
    ranks, degree = copy or tuple(range(count)), len(copy) or 1
    operators = [[graph.by_name[name] for name in part] for part in parts]
    home = {name: index for index, part in enumerate(parts) for name in part}
    outward = set(losses.values()) | {
        tensor for op in graph for tensor in op.inputs if home.get(op.name) != home.get(graph.producers[tensor])
    }
    again = frozenset(op.component for part in operators for op in part) if recompute else frozenset[str]()
    runs = []
    for index, part in enumerate(operators):
        place = Slice(
            metaop=part[0].name,
            first_layer=0,
            num_layers=len(part),
            devices=ranks,
            start_s=0.0,
            end_s=0.0,
            tensor_parallel=degree,
        )
        run = slice_run(index, place, 0, part, outward, again)
        share = split_samples(part[0].batch_size, count // degree)[0]
        runs.append(replace(run, bounds=(share,) * degree) if copy else run)
    made = {tensor for run in runs for tensor in run.outputs}
    read = {tensor for run in runs for tensor in run.inputs}
    before = _neighbor(BEFORE, runs[0], outputs=sorted(read - made))
    after = _neighbor(AFTER, runs[-1], inputs=sorted(made - read - set(losses.values())))
    own = {task: tensor for task, tensor in losses.items() if tensor in made}
    return Program(
        num_ranks=max(ranks) + 1,
        tensors=tuple(graph.tensors[name] for name in sorted(read | made)),
        slices=(before, *runs, after),
        transfers=(),
        buckets=tuple(make_buckets(runs, graph, shard_optimizer=False)),
        losses=tuple(own.items()),
        weights=tuple((task, 1.0) for task in own),
        instructions=((),) * (max(ranks) + 1),
    )


def _neighbor(name: str, like: SliceRun, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> SliceRun:
    return SliceRun(
        name=name,
        metaop=name,
        task=like.task,
        component=name,
        wave=0,
        operators=(),
        ranks=like.ranks,
        bounds=like.bounds,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        trained=(),
        loads=False,
        backward=True,
        tensor_parallel=like.tensor_parallel,
    )
