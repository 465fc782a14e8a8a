"""Random task graphs without torch: what capture could make of a workload. For the laws of contraction and lowering."""

import random
from dataclasses import dataclass, replace

from spindle.values.graph import Operator, Parameter, TaskGraph, TensorSpec


@dataclass(frozen=True)
class SampleGraph:
    """A task graph, and what lowering also wants to know of it."""

    graph: TaskGraph
    losses: dict[str, str]
    weights: dict[str, float]


@dataclass(frozen=True)
class _Draft:
    """An operator as drawn; gradients are worked out when all are there."""

    operator: Operator
    detached: frozenset[str]  # inputs that no gradient goes back to
    frozen: bool


def random_task_graph(seed: int, *, num_tasks: int = 2, operators_per_task: int = 6) -> SampleGraph:
    """Tasks of chains, forks and joins over four components that they share.

    Some operators mix samples, some tensors only go whole or have their samples in dimension 1, some components are
    frozen, some inputs detached. Every task ends in a loss that a gradient comes from.
    """
    rng = random.Random(seed)
    frozen = {name for name in "abcd" if rng.random() < 0.3}
    operators: list[Operator] = []
    losses: dict[str, str] = {}
    for index in range(num_tasks):
        drafts = _task(rng, f"t{index}", operators_per_task, frozen)
        operators += _with_gradients(drafts)
        losses[f"t{index}"] = drafts[-1].operator.outputs[0].name
    weights = {task: rng.choice((0.25, 1.0, 3.0)) for task in losses}
    return SampleGraph(TaskGraph(tuple(operators)), losses, weights)


def _task(rng: random.Random, task: str, num_operators: int, frozen: set[str]) -> list[_Draft]:
    batch_size = rng.randint(1, 9)
    drafts: list[_Draft] = []
    layers_of: dict[str, int] = {}
    reads: tuple[str, ...]
    for number in range(num_operators):
        before = drafts[-1].operator if drafts else None
        if before is not None and rng.random() < 0.5:
            component, kind, reads = before.component, before.kind, (before.outputs[0].name,)
        else:
            component, kind = rng.choice("abcd"), rng.choice(("k", "k", "l", "mix"))
            made = [tensor.name for draft in drafts for tensor in draft.operator.outputs]
            reads = tuple(sorted(rng.sample(made, min(len(made), rng.randint(0, 3)))))
        layer = layers_of[component] = layers_of.get(component, -1) + 1
        outputs = tuple(_tensor(rng, f"{task}/{number}.{i}", batch_size) for i in range(rng.choice((1, 1, 1, 2))))
        names = [f"{component}.{layer}.w", f"{component}.shared"][: rng.randint(0, 2)]
        drafts.append(
            _Draft(
                Operator(
                    name=f"{task}.{component}.{number}",
                    task=task,
                    component=component,
                    kind=kind,
                    batch_size=batch_size,
                    inputs=reads,
                    outputs=outputs,
                    parameters=tuple(Parameter(name=name, shape=(2,), dtype="float32") for name in names),
                    input_bytes=rng.choice((64, 64, 128)),
                    batch_fields=("x",) if not reads or rng.random() < 0.2 else (),
                    splittable=kind != "mix",
                ),
                frozenset(name for name in reads if rng.random() < 0.1),
                component in frozen,
            )
        )
    read = {name for draft in drafts for name in draft.operator.inputs}
    ends = tuple(t.name for draft in drafts for t in draft.operator.outputs if t.name not in read)
    loss = TensorSpec(name=f"{task}/loss", shape=(), dtype="float32", rows=0)
    drafts.append(
        _Draft(
            Operator(
                name=f"{task}.loss",
                task=task,
                component="loss",
                kind="loss",
                batch_size=batch_size,
                inputs=ends,
                outputs=(loss,),
                parameters=(Parameter(name="scale", shape=(), dtype="float64"),),
                splittable=False,
            ),
            frozenset(),
            frozen=False,
        )
    )
    return drafts


def _tensor(rng: random.Random, name: str, batch_size: int) -> TensorSpec:
    form = rng.random()
    if form < 0.15:
        return TensorSpec(name=name, shape=(3, 5), dtype="float32", rows=0)
    if form < 0.3:
        return TensorSpec(name=name, shape=(3, batch_size, 2), dtype="float32", row_dim=1)
    if form < 0.45:
        return TensorSpec(name=name, shape=(batch_size * 4, 2), dtype="float64", rows=4)
    return TensorSpec(name=name, shape=(batch_size, 2), dtype="float32")


def _with_gradients(drafts: list[_Draft]) -> list[Operator]:
    """Gradients come back from the loss, to whatever something trained lies at or before."""
    trained_before: set[str] = set()
    for draft in drafts:
        op = draft.operator
        trains = bool(op.parameters) and not draft.frozen
        if trains or trained_before & (set(op.inputs) - draft.detached):
            trained_before.update(tensor.name for tensor in op.outputs)
    wanted = {drafts[-1].operator.outputs[0].name}
    found: list[Operator] = []
    for draft in reversed(drafts):
        op = draft.operator
        live = any(tensor.name in wanted for tensor in op.outputs)
        if live:
            wanted |= (set(op.inputs) - draft.detached) & trained_before
        trained = live and not draft.frozen
        found.append(replace(op, parameters=tuple(replace(p, trainable=trained) for p in op.parameters)))
    return [
        replace(op, outputs=tuple(replace(t, needs_grad=t.name in wanted) for t in op.outputs))
        for op in reversed(found)
    ]
