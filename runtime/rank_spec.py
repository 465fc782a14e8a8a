"""A rank's spec: all that it needs to start, made of a captured workload and a program, and sent to it once."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from spindle.capture.codes import Captured, OperatorCode
from spindle.inputs.ema import EMA
from spindle.record.changes.copies import copied
from spindle.record.travel import let_travel
from spindle.runtime.checkpoints.tensor_files import Source
from spindle.runtime.checkpoints.weights import Readable, own_sources
from spindle.runtime.evaluation.evaluator import EvaluationSpec, beside
from spindle.runtime.faults.replicas import ReplicaSet, replica_sets, sets_of
from spindle.runtime.loading.counts import Limits
from spindle.runtime.loading.data import keeps_state
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.parallel.names import Held, held_by_rank, held_names
from spindle.runtime.programs.parts import parts_of
from spindle.runtime.programs.program import Program
from spindle.runtime.steps.finite import NotFinite
from spindle.runtime.steps.flats import ranges_by_parameter
from spindle.runtime.updates.after_steps import AfterSteps, after_steps_of
from spindle.runtime.updates.averages import Shared, shared_averages
from spindle.runtime.updates.masters import Numbers
from spindle.runtime.updates.optimizers import OptimizerFactory, described
from spindle.runtime.updates.schedules import Metric, SchedulerFactory
from spindle.values.graph import Parameter, base_task, num_micro_batches, parse_piece
from spindle.values.plan import SizeRange
from spindle.workload import Batch, Precision, Task, Workload


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """Everything one rank needs to start. Sent to it once. `program` is its part; `groups` are those of all ranks, who
    make them together.
    """

    program: Program
    rank: int
    codes: Mapping[str, OperatorCode]
    recipe: Recipe
    tasks: Mapping[str, Task]
    cuts: Mapping[str, Held] = field(default_factory=dict)  # by parameter
    clocks: Mapping[str, Tensor] = field(default_factory=dict)  # buffers that writes to parameters read
    partial: frozenset[str] = frozenset()
    owned: tuple[str, ...] = ()  # parameters and buffers that this rank answers for
    unused: Mapping[str, Tensor] = field(default_factory=dict)  # tensors of no task, for checkpoints; on rank 0
    stepped: frozenset[str] = frozenset()  # parameters that some rank updates; on rank 0
    groups: tuple[tuple[int, ...], ...] = ()
    links: tuple[tuple[int, int], ...] = ()
    unread: Mapping[str, Source] = field(default_factory=dict)  # such whose values only files hold
    weights: Mapping[str, Readable] = field(default_factory=dict)  # of parameters on the meta device
    rounds: int = 1
    precision: Precision = "fp32"
    parameters: tuple[Parameter, ...] = ()  # all of the workload, for the optimizer
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of the optimizer, by component
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    metric: Metric | None = None
    seed: int = 0
    timeout_s: float = 60.0
    sizes: tuple[SizeRange, ...] = ()  # of the batches that the plan was made for
    on_broken: NotFinite = "ignore"
    flight: Path | None = None  # the folder of its flight record
    replicas: tuple[ReplicaSet, ...] = ()  # what this rank and others hold alike
    check_replicas_every: int = 0
    numbers: Numbers = field(default_factory=Numbers)
    ema: EMA | None = None
    averages: tuple[Shared, ...] = ()  # running averages that this rank keeps for others, or gets from them
    after_steps: AfterSteps = ()
    evaluation: EvaluationSpec | None = None
    limits: Limits = field(default_factory=Limits)


def make_rank_specs(
    program: Program,
    captured: Captured,
    workload: Workload,
    *,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    timeout_s: float = 60.0,
    sizes: tuple[SizeRange, ...] = (),
    weights: Mapping[str, Source] | None = None,
    on_broken: NotFinite = "ignore",
    flight: Path | None = None,
    check_replicas_every: int = 0,
) -> list[RankSpec]:
    """For each rank the part of a captured workload that it runs. Takes time by the ranks that the slices have.

    `weights`: where the parameters lie that are on the meta device.
    """
    weights = weights or {}
    pieces = held_by_rank(program, captured)
    codes = [{name: captured.codes[name] for name in names} for names in program.operators_by_rank]
    shapes = {p.name: p.shape for operator in captured.graph for p in operator.parameters}
    ranges = [ranges_by_parameter(program, shapes, rank) for rank in range(program.num_ranks)]
    held = [held_names(own.values(), cut, kept) for own, cut, kept in zip(codes, pieces, ranges, strict=True)]
    owned, alike = owners(program, held), replica_sets(program, held) if check_replicas_every else []
    used = {parse_piece(name).whole for names in owned for name in names}
    every = (*workload.named_parameters(), *workload.named_buffers())
    unused = {name: tensor.detach() for name, tensor in every if name not in used and not tensor.is_meta}
    unread = {name: source for name, source in weights.items() if name not in used}
    groups = program.groups
    recipe, specs, numbers = Recipe.of(workload, captured), [], Numbers.of(workload)
    parameters = numbers.stepped(described(workload.named_parameters()))
    after_steps = after_steps_of(workload, program)
    floats = {name for name, value in workload.named_buffers() if value.is_floating_point()}
    averages = shared_averages(workload.ema, program, owned, held, floats)
    brought = {(row.owner, other) for row in averages for other in row.others}
    links = tuple(sorted({*program.links, *brought}))
    clocks = {name for code in captured.tasks.values() for write in code.writes for name in write.clocks}
    let_travel(component.module for component in workload.components.values())
    trained = [bucket.parameters for bucket in program.buckets]
    trained += [flat.parameters for flat in program.flats if flat.trained]
    stepped = frozenset(parse_piece(name).whole for names in trained for name in names)
    for rank, (own, part) in enumerate(zip(codes, parts_of(program), strict=True)):
        loads = {base_task(task) for task in program.loaded_by(rank)}
        specs.append(
            RankSpec(
                program=part,
                rank=rank,
                codes=own,
                recipe=recipe,
                tasks={name: as_needed(task, loads=name in loads) for name, task in workload.tasks.items()},
                cuts=pieces[rank],
                clocks={name: value.detach() for name, value in workload.named_buffers() if name in clocks},
                partial=captured.graph.partial,
                owned=tuple(owned[rank]),
                unused={} if rank else unused,
                stepped=frozenset() if rank else stepped,
                groups=groups,
                links=links,
                unread={} if rank else unread,
                weights=own_sources(weights, own.values()),
                rounds=workload.accumulate // num_micro_batches(captured.tasks),
                precision=captured.precision,
                parameters=parameters,
                settings=workload.optimizer_settings,
                optimizer=optimizer,
                scheduler=scheduler,
                metric=metric,
                seed=seed,
                timeout_s=timeout_s,
                sizes=sizes,
                on_broken=on_broken,
                flight=flight,
                replicas=sets_of(alike, rank),
                check_replicas_every=check_replicas_every,
                numbers=numbers,
                ema=workload.ema,
                averages=tuple(row for row in averages if rank in (row.owner, *row.others)),
                after_steps=after_steps,
            )
        )
    return specs


def as_needed(task: Task, *, loads: bool) -> Task:
    """A task as a worker needs it: when it takes part, and its data if the rank loads it. Its function travels in the
    recipe, without the weights of the modules that it would bring along.
    """
    return replace(task, function=_stayed_behind, data=task.data if loads else ())


def _stayed_behind(batch: Batch) -> Tensor:
    raise AssertionError("a worker records the functions of its recipe, never this one")


def separate(spec: RankSpec) -> RankSpec:
    """A rank spec with codes of its own, and loaders where they have a state: ranks of one process must not
    share them.
    """
    evaluation = spec.evaluation
    every = beside(spec.codes, evaluation)
    codes, own = copied((spec.codes, evaluation.codes if evaluation else {}), [code.module for code in every.values()])
    if evaluation is not None:
        evaluation = replace(evaluation, codes=own, tasks=_with_own_loaders(evaluation.tasks))
    return replace(spec, codes=codes, tasks=_with_own_loaders(spec.tasks), evaluation=evaluation)


def _with_own_loaders(tasks: Mapping[str, Task]) -> dict[str, Task]:
    return {
        name: replace(task, data=copy.deepcopy(task.data)) if keeps_state(task) else task
        for name, task in tasks.items()
    }


def owners(program: Program, held: Sequence[Iterable[str]]) -> list[list[str]]:
    """For each rank the parameters and buffers, of those `held` by each, that it answers for: trained ones whose bucket
    it speaks for, and others that no lower rank holds.
    """
    home = {name: bucket.answering for bucket in program.buckets for name in bucket.parameters}
    for rank, names in enumerate(held):
        for name in names:
            home.setdefault(name, rank)
    found: list[list[str]] = [[] for _ in held]
    for name, rank in home.items():
        found[rank].append(name)
    return found
