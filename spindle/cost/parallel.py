"""Parallel layouts: a workload run by data, tensor and pipeline parallelism over the whole cluster, its tasks in turn,
as Megatron, DeepSpeed and FSDP run it, in; seconds of a step and bytes of the fullest device out.

- A replica is `tensor * pipeline` devices; the others hold copies of it. Each replica takes its share of a task's
  batch in micro-batches, one forward and one backward at a time (Narayanan et al. 2021): m + p - 1 passes a stage.
- Layers are divided evenly among the stages; vocabulary projections ride with the last, tables with the first.
- Gradients are reduced once a step over the replicas; sharded parameters are gathered for each layer.
- One task's activations are there at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from spindle.cost.layout import overlapped_s, sharded_s, tensor_parallel_s
from spindle.cost.links import collective_s
from spindle.cost.memory import gradient_bytes, layer_bytes, state_bytes
from spindle.cost.optimizers import step_s
from spindle.cost.roofline import OperatorTime, chain_rows, operator_work, time_operator
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.execution import STAGES, Parallel, as_styled, norm_copies
from spindle.values.graph import BYTES_BY_DTYPE, Operator, Parameter, TaskGraph

LOGIT_BYTES = 12.0
"""For each logit of a vocabulary projection: two bytes, a copy of four with its gradient, and a gradient of two. They
are gathered on every device of a tensor-parallel group."""
NORM_BOUNDARY = 4.0
"""Copies of a layer's boundary that it keeps: inputs and outputs of two norms."""


@dataclass(frozen=True, slots=True)
class ParallelCost:
    """Seconds of a step, what of it gradient reduction and the optimizer's step take, bytes of the fullest device."""

    step_s: float
    reduction_s: float
    update_s: float
    memory_bytes: float


def parallel_cost(graph: TaskGraph, cluster: Cluster, cost_options: CostOptions, layout: Parallel) -> ParallelCost:
    """A step of all tasks of `graph` on `cluster`, whose constants are those of the program that runs
    (`spindle.values.execution.as_run`). Raises WorkloadError when the layout does not divide the cluster.
    """
    replicas = layout.replicas(cluster)
    tasks: dict[str, list[Operator]] = {}
    for operator in graph.operators:
        tasks.setdefault(operator.task, []).append(operator)
    runs = [_TaskRun(tuple(operators), cluster, cost_options, layout, replicas) for operators in tasks.values()]
    trained = list({p.name: p for o in graph.operators for p in o.parameters if p.trainable}.values())
    backward_s = sum(run.time.backward_s for run in runs)
    ended_s = _with_reduction_s(backward_s, trained, cluster, cost_options, layout)
    divided = layout.tensor * layout.pipeline * (1 if layout.shard == "nothing" else replicas)
    stepped_s = sum(step_s(parameter, cluster.device, cost_options) for parameter in trained) / divided
    return ParallelCost(
        step_s=sum(run.time.forward_s for run in runs) + ended_s + stepped_s,
        reduction_s=ended_s - backward_s,
        update_s=stepped_s,
        memory_bytes=_held_bytes(graph.operators, cost_options, layout, replicas) + max(run.peak_bytes for run in runs),
    )


def _with_reduction_s(
    backward_s: float, trained: Sequence[Parameter], cluster: Cluster, cost_options: CostOptions, layout: Parallel
) -> float:
    """Backward and the reduction over the replicas; devices that share a layer are neighbors."""
    if layout.shard == "parameters":  # scattered layer by layer
        return backward_s
    wide = cost_options.execution.gradients == "float32"
    num_bytes = sum(prod(p.shape) * (max(_width(p), 4) if wide else _width(p)) for p in trained)
    replicas = layout.replicas(cluster)
    per_node = max(1, min(cluster.devices_per_node // layout.tensor, replicas))
    groups = (per_node,) * max(1, replicas // per_node)
    reduced_s = collective_s("all_reduce", num_bytes / layout.tensor / layout.pipeline, cluster, groups)
    if layout.pipeline == 1 and cluster.device.overlap_cost < 1:
        return overlapped_s(backward_s, reduced_s, cluster)
    return backward_s + reduced_s


def _held_bytes(operators: Sequence[Operator], cost_options: CostOptions, layout: Parallel, replicas: int) -> float:
    """Parameters, gradients, master copies and states on the fullest device."""
    tables = [o for o in operators if _is_table(o)]
    heads = [o for o in operators if _is_head(o)]
    body = [o for o in operators if not (_is_table(o) or _is_head(o))]
    ends = [tables + heads] if layout.pipeline == 1 else [tables, heads]
    at_ends = max(_states(end, cost_options, layout, replicas) for end in ends)
    return (_states(body, cost_options, layout, replicas) / layout.pipeline + at_ends) / layout.tensor


def _states(operators: Sequence[Operator], cost_options: CostOptions, layout: Parallel, replicas: int) -> float:
    fixed, states = state_bytes(operators, cost_options)
    gradients = sum(
        {p.name: gradient_bytes(p, cost_options) for o in operators for p in o.parameters if p.trainable}.values()
    )
    stage = STAGES.index(layout.shard)
    parts = [replicas if stage >= least else 1 for least in (3, 2, 1)]
    return (fixed - gradients) / parts[0] + gradients / parts[1] + states / parts[2]


@dataclass(frozen=True)
class _TaskRun:
    """One task in a layout."""

    operators: tuple[Operator, ...]
    cluster: Cluster
    cost_options: CostOptions
    layout: Parallel
    replicas: int

    @cached_property
    def share(self) -> float:
        """Samples of a replica."""
        return max(self.operators[0].batch_size / self.replicas, 1.0)

    @cached_property
    def micro_batch(self) -> float:
        """Samples that pass through at once."""
        return min(self.layout.micro_batch or self.share, self.share)

    @cached_property
    def micro_batches(self) -> int:
        """How many there are of a replica."""
        return max(1, ceil(self.share / self.micro_batch - 1e-9))

    @cached_property
    def time(self) -> OperatorTime:
        """Of the whole batch."""
        layer = self._sum([o for o in self.operators if not _is_head(o)])
        head = self._sum([o for o in self.operators if _is_head(o)])
        passes = (self.micro_batches + self.layout.pipeline - 1) / self.layout.pipeline
        return OperatorTime(
            passes * layer.forward_s + self.micro_batches * head.forward_s,
            passes * layer.backward_s + self.micro_batches * head.backward_s,
        )

    def _sum(self, operators: Sequence[Operator]) -> OperatorTime:
        """Of one micro-batch; layers that differ in nothing the model looks at are timed once."""
        alike: dict[tuple[object, ...], list[Operator]] = {}
        for o in operators:
            key = (o.component, o.kind, o.forward_flops, o.backward_flops, o.output_bytes)
            alike.setdefault(key, []).append(o)
        times = [(len(group), self._time(group[0])) for group in alike.values()]
        return OperatorTime(sum(n * t.forward_s for n, t in times), sum(n * t.backward_s for n, t in times))

    def _time(self, operator: Operator) -> OperatorTime:
        layout, cluster, again = self.layout, self.cluster, self.cost_options.recompute
        rows = chain_rows([o for o in self.operators if o.component == operator.component])
        time = time_operator(
            operator_work(operator, rows, recompute=again, execution=self.cost_options.execution),
            as_styled(cluster.device, self.cost_options.execution, operator.kind),
            data_parallel=operator.batch_size / self.micro_batch,
            tensor_parallel=layout.tensor,
            sequence_parallel=layout.sequence_parallel,
        )
        if not _is_head(operator) and not _is_table(operator):
            boundary = (operator.output_bytes or operator.input_bytes) * self.micro_batch / operator.batch_size
            traffic_s = tensor_parallel_s(boundary, cluster, layout.tensor)
            back_s = (2 if again else 1) * traffic_s if time.backward_s else 0.0
            time = OperatorTime(time.forward_s + traffic_s, time.backward_s + back_s)
        if layout.shard == "parameters":
            gathered = sum(p.num_bytes for p in operator.parameters) / layout.tensor
            return sharded_s(time, gathered, cluster, self.replicas, regather=not layout.keeps_gathered)
        return time

    @cached_property
    def peak_bytes(self) -> float:
        """Activations of the fullest stage: the first keeps most micro-batches, the last has the logits."""
        stages, recompute = self.layout.pipeline, self.cost_options.recompute
        kept = [self._kept_bytes(o) for o in self.operators if not _is_head(o)]
        held = [self._input_bytes(o) for o in self.operators if not _is_head(o)] if recompute else kept
        again = max(kept, default=0.0) if recompute else 0.0
        heads = [o for o in self.operators if _is_head(o)]
        logits = sum(LOGIT_BYTES * _num_logits(o) * self.micro_batch / o.batch_size for o in heads)
        first = min(self.micro_batches, stages) * sum(held) / stages + again
        last = sum(held) / stages + again + logits
        return max(first, last)

    def _input_bytes(self, operator: Operator) -> float:
        given = min(operator.input_bytes, operator.activation_bytes) * self.micro_batch / operator.batch_size
        return given / (self.layout.tensor if self.layout.sequence_parallel else 1)

    def _kept_bytes(self, operator: Operator) -> float:
        """What a layer keeps; norms' inputs and outputs whole, unless the sequence is divided too."""
        kept = layer_bytes(operator, self.cost_options)
        copies = NORM_BOUNDARY + (norm_copies(self.cost_options.execution) if "gated" in operator.kind.split() else 0.0)
        boundary = min(copies * operator.output_bytes, kept)
        whole = boundary / (self.layout.tensor if self.layout.sequence_parallel else 1)
        return (whole + (kept - boundary) / self.layout.tensor) * self.micro_batch / operator.batch_size


def _is_head(operator: Operator) -> bool:
    return operator.kind.startswith("lm_head")


def _is_table(operator: Operator) -> bool:
    return operator.kind.startswith("embedding")


def _width(parameter: Parameter) -> int:
    return BYTES_BY_DTYPE[parameter.dtype]


def _num_logits(operator: Operator) -> float:
    """Logits of the whole batch, from the FLOPs of the projection."""
    widths = [p.shape[1] for p in operator.parameters if len(p.shape) == 2]
    return operator.forward_flops / (2.0 * widths[0]) if widths else 0.0
