"""Reference: what one process does with a workload, step by step. All that `verify` and docs/exactness.md promise is
measured by it.

It runs the user's own task functions on whole batches and on the user's own modules, which get their values back
afterwards. It draws the same random numbers: they depend on the seed, the step, the task, the place in the code and the
sample.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spindle.capture import capture
from spindle.capture.codes import Captured, computing_in
from spindle.capture.eager import drawing_as_planned
from spindle.inputs.batch import with_own_tensors
from spindle.inputs.nested import nested
from spindle.inputs.weighing import shares
from spindle.record.substitutes.draws import Stream
from spindle.runtime.loading.data import Feed, wait_for_readers
from spindle.runtime.updates.averages import Averages, averaged
from spindle.runtime.updates.masters import Numbers, PlainMasters, master_tensors
from spindle.runtime.updates.optimizers import OptimizerFactory, make_optimizer
from spindle.runtime.updates.progress import optimizer_tensors
from spindle.runtime.updates.schedules import Metric, SchedulerFactory, make_schedule, step_schedule
from spindle.workload import Task, Workload

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What some steps did: losses by step, gradients by step and rank, and after the last step the values of parameters
    and buffers, the optimizer's states and the learning rates by parameter group.

    `buffers` names those of the values that are buffers. `loss_dtypes`: the type of each task's loss, which may be less
    exact than the model's: transformers compute losses in float32.
    """

    losses: list[dict[str, float]]
    gradients: list[dict[int, Gradients]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    loss_dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def run_reference(
    workload: Workload,
    steps: int,
    *,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    follow: Sequence[Gradients] = (),
) -> Outcome:
    """Train `steps` steps in this process, then give the modules their values back.

    `follow`: gradients of another run by step. Where they are given, the optimizer steps with them after this run's own
    were noted: then each step of both runs starts from the same parameters, and what differs in one step's gradients by
    rounding does not grow, as it would where an optimizer divides by the gradient's size.
    """
    captured = capture(workload)
    parameters = dict(workload.named_parameters())
    feeds = {name: Feed(task, seed) for name, task in workload.tasks.items()}
    found = Outcome([], buffers=frozenset(name for name, _ in workload.named_buffers()))
    with restored(workload):
        masters = PlainMasters(parameters, Numbers.of(workload))
        made = make_optimizer(optimizer, masters.stepped, workload.optimizer_settings)
        schedule = make_schedule(scheduler, made, metric)
        averages = Averages(workload.ema) if workload.ema is not None else None
        trained = {p.name for operator in captured.graph for p in operator.parameters if p.trainable}
        trained |= {write.target for write in captured.graph.writes}
        for step in range(steps):
            masters.clear()
            found.losses.append({})
            for name in workload.tasks_of(step, seed):
                stream = Stream(seed=seed, step=step, task=name)
                losses = _run_task(workload, captured, workload.tasks[name], feeds[name], stream, found, masters)
                found.losses[-1][name] = sum(losses) / len(losses)
            if workload.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(masters.stepped.values(), workload.max_grad_norm)
            found.gradients.append({0: {name: gradient.clone() for name, gradient in masters.gradients.items()}})
            for name, gradient in (follow[step] if follow else {}).items():
                masters.stepped[name].grad = gradient.clone()
            masters.before_step()
            made.optimizer.step()
            _after_step(workload, masters)
            masters.after_step()
            if averages is not None:
                buffers = dict(workload.named_buffers())
                averages.update(step + 1, functools.partial(averaged, averages.ema, trained, buffers, masters.held))
            if schedule is not None:
                step_schedule(schedule, metric, lambda: found.losses[-1])
        every = (*workload.named_parameters(), *workload.named_buffers())
        found.values.update({name: tensor.detach().clone() for name, tensor in every})
        found.states.update(optimizer_tensors(made.optimizer, masters.stepped, strict=False))
        found.states.update(master_tensors(masters.masters, masters.masters))
        found.states.update({} if averages is None else averages.tensors())
        found.learning_rates.update(made.learning_rates())
    for feed in feeds.values():
        feed.close()
    wait_for_readers()
    return found


def _run_task(
    workload: Workload,
    captured: Captured,
    task: Task,
    feed: Feed,
    place: Stream,
    found: Outcome,
    masters: PlainMasters,
) -> list[float]:
    """Forward and backward of a step's batches of one task; their losses."""
    losses = []
    batches = [feed.next() for _ in range(workload.accumulate)]
    counts = shares([task.counted(given) for given in batches])
    for batch, (given, share) in enumerate(zip(batches, counts, strict=True)):
        stream = Stream(
            seed=place.seed,
            step=place.step,
            batch=batch,
            task=task.name,
            units=given.units,
            high=given.units.num_samples,
        )
        drawing = drawing_as_planned(workload, captured, stream)
        with computing_in(workload.precision, torch.device("cpu")), drawing:
            loss = task.function(nested(with_own_tensors(given.fields)))  # a list of batches is the user's own
        losses.append(float(loss.detach() * share) if share else 0.0)
        found.loss_dtypes[task.name] = loss.dtype
        if loss.requires_grad and share:  # not where a batch lacks all that is trained
            torch.autograd.backward(loss * (task.weight / workload.accumulate * share))
            masters.collect()
    return losses


def _after_step(workload: Workload, masters: PlainMasters) -> None:
    """The user's functions, on what the optimizer has stepped."""
    for each in workload.after_steps:
        for name in each.names(masters.parameters):
            if masters.stepped[name].grad is not None:
                each.apply(masters.stepped[name])


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@contextlib.contextmanager
def restored(workload: Workload) -> Iterator[None]:
    """While open modules may change; then they have their tensors, values, gradients and plain attributes back."""
    modules = list({id(m): m for c in workload.components.values() for m in c.module.modules()}.values())
    held = [(dict(m._parameters), dict(m._buffers), _plain(m)) for m in modules]
    tensors = [t for parameters, buffers, _ in held for t in (*parameters.values(), *buffers.values()) if t is not None]
    values = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in {id(t): t for t in tensors}.values()]
    for tensor, _, _ in values:
        tensor.grad = None
    try:
        yield
    finally:
        for module, (parameters, buffers, plain) in zip(modules, held, strict=True):
            for own, before in ((module._parameters, parameters), (module._buffers, buffers)):
                own.clear()
                own.update(before)  # type: ignore[arg-type]
            module.__dict__.update(plain)
        with torch.no_grad():
            for tensor, value, gradient in values:
                tensor.copy_(value)
                tensor.grad = gradient


def _plain(module: nn.Module) -> Mapping[str, object]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
