"""Runs of random scripts: by a loop for one process that has no Spindle in it, and by Spindle; and what differs.

Compared are the losses of each step, and, where a checkpoint was written and at the end, all parameters, buffers,
states of the optimizer and learning rates.
"""

import contextlib
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spindle
from spindle.errors import InfeasibleError, InputError, ProgramError
from spindle.runtime.checkpoints import checkpoint
from tests.random_plans import random_plan, widest_plan
from tests.scripts.random_scripts import BATCH_SIZE, SAVED_AFTER, STEPS, Case
from tests.scripts.script_pieces import BY_NAME, OF_USER, SCHEDULES, Scheduler, data_of, factory_of, passes
from tests.scripts.script_tasks import freeze, function_of, modules_of, named_parameters_of, tensors_of

RELATIVE, ABSOLUTE = 1e-9, 1e-10
"""A value may be off by RELATIVE of the largest of its tensor, and by ABSOLUTE: the rounding of what is zero (1e-15, as
the gradient of a bias before batch norm), which an optimizer that divides by the size of gradients multiplies by up to
1 / EPS in each of some steps."""


# -- what a run leaves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """All tensors after some steps: parameters and buffers, states of the optimizer as `optimizer:NAME:KEY`, and the
    learning rates of groups in which something was trained.
    """

    tensors: dict[str, Tensor]
    states: dict[str, Tensor]
    rates: frozenset[float]
    idle_rates: frozenset[float] = frozenset()  # of groups in which nothing was


@dataclass
class Outcome:
    """Losses by step, and snapshots by the number of steps done. `final`: what is in the user's modules."""

    losses: list[dict[str, float]] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)


# -- one process ------------------------------------------------------------------------------------------------------


class Plain:
    """A script in one process: plain PyTorch."""

    def __init__(self, case: Case) -> None:
        self.case, self.modules, self.step = case, modules_of(case, 0), 0
        self.named = named_parameters_of(self.modules)
        factory = factory_of(case.optimizer, case.groups)
        self.optimizer = factory(list(self.named) if case.groups in BY_NAME else [p for _, p in self.named])
        self.origins: list[int] = []
        self.optimizer.param_groups[:] = self._with_settings()
        self.schedule = None
        if case.schedule in OF_USER:
            self.schedule = OF_USER[case.schedule](self.optimizer, self.origins)
        elif case.schedule:
            self.schedule = SCHEDULES[case.schedule](self.optimizer)
        self.functions = [function_of(task, self.modules) for task in case.tasks]
        self.feeds = [passes(data_of(task.data, task.samples, BATCH_SIZE, task.seed), task.data) for task in case.tasks]
        self.stepped: set[nn.Parameter] = set()

    def _with_settings(self) -> list[dict[str, Any]]:
        """Each group without those of components with settings of their own, which make groups beside it."""
        component_of = {parameter: name.partition(".")[0] for name, parameter in self.named}
        found: list[dict[str, Any]] = []
        for number, group in enumerate(self.optimizer.param_groups):
            parts: dict[str, dict[str, Any]] = {} if group["params"] else {"": dict(group)}
            for parameter in group["params"]:
                own = self.case.component(component_of[parameter])
                key = own.name if own.settings else ""
                parts.setdefault(key, {**group, "params": [], **dict(own.settings)})["params"].append(parameter)
            found += parts.values()
            self.origins += [number] * len(parts)
        return found

    def run(self) -> Outcome:
        """All steps."""
        found, case = Outcome(), self.case
        for self.step in range(STEPS):
            if case.middle and self.step == SAVED_AFTER:
                found.snapshots[self.step] = self.snapshot()
                freeze(case, self.modules, self.step)
            found.losses.append(self._step())
        found.snapshots[STEPS], found.final = self.snapshot(), tensors_of(self.modules)
        return found

    def _step(self) -> dict[str, float]:
        case, losses = self.case, dict[str, float]()
        parameters = [parameter for _, parameter in self.named]
        for parameter in parameters:
            parameter.grad = None
        for index, task in enumerate(case.tasks):
            if self.step % task.every:
                continue
            values = []
            for _ in range(case.accumulate):
                loss = self.functions[index](next(self.feeds[index]))
                (loss * task.weight / case.accumulate).backward()  # type: ignore[no-untyped-call]
                values.append(loss.item())
            losses[f"task{index}"] = sum(values) / len(values)
        self.stepped.update(parameter for parameter in parameters if parameter.grad is not None)
        if case.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, case.max_grad_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return losses

    def snapshot(self) -> Snapshot:
        """All there is now."""
        states = {
            f"optimizer:{name}:{key}": torch.as_tensor(value).detach().clone()
            for name, parameter in self.named
            if parameter in self.stepped
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        rates: dict[bool, set[float]] = {True: set(), False: set()}
        for group in self.optimizer.param_groups:
            is_live = any(parameter in self.stepped for parameter in group["params"])
            rates[is_live] |= {float(group["lr"])} if group["lr"] is not None else set()
        return Snapshot(tensors_of(self.modules), states, frozenset(rates[True]), frozenset(rates[False]))


# -- Spindle ----------------------------------------------------------------------------------------------------------


def workload_of(case: Case, modules: Mapping[str, nn.Module]) -> spindle.Workload:
    """The same script as a workload."""
    workload = spindle.Workload(
        "script",
        accumulate=case.accumulate,
        in_flight=case.in_flight,
        max_grad_norm=case.max_grad_norm,
        shard_optimizer=case.shard_optimizer,
        recompute=[component.name for component in case.components if component.recompute],
    )
    for component in case.components:
        workload.component(component.name, modules[component.name], optimizer=dict(component.settings))
    for index, task in enumerate(case.tasks):
        workload.task(
            f"task{index}",
            batch_size=min(BATCH_SIZE, task.samples),
            data=data_of(task.data, task.samples, BATCH_SIZE, task.seed),
            weight=task.weight,
            every=task.every,
        )(function_of(task, modules))
    return workload


def planned(case: Case, directory: Path, num_groups: int = 1) -> Outcome:
    """All steps as Spindle runs them; after a checkpoint everything is made anew, as in a new process. `num_groups`:
    that the user's code makes.
    """
    found = Outcome()
    schedule: Scheduler | None = SCHEDULES.get(case.schedule)
    if case.schedule in OF_USER:
        of_user = OF_USER[case.schedule]
        schedule = lambda optimizer: of_user(optimizer, range(num_groups))  # noqa: E731
    parts = [(0, SAVED_AFTER, case.num_ranks), (SAVED_AFTER, STEPS, case.ranks_after)]
    for first, last, num_ranks in parts if case.middle else [(0, STEPS, case.num_ranks)]:
        modules = modules_of(case, first)
        workload = workload_of(case, modules)
        metagraph = spindle.make_metagraph(workload)
        seed = case.plan_seed + first
        plan = widest_plan(metagraph, num_ranks) if case.is_widest else random_plan(metagraph, num_ranks, seed)
        result = spindle.train(
            workload,
            plan,
            optimizer=factory_of(case.optimizer, case.groups),
            scheduler=schedule,
            steps=last,
            launcher="threads",
            timeout_s=20.0,
            checkpoints=directory,
            resume=first > 0,
        )
        found.losses += result.losses
        found.snapshots[last], found.final = _read(checkpoint.path_of(directory, last)), tensors_of(modules)
    return found


def _read(path: Path) -> Snapshot:
    tensors = checkpoint.tensors(path, lambda _: True)
    states = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer:")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in states}
    return Snapshot(weights, states, frozenset(_rates(checkpoint.read(path).progress["optimizer"])))


def _rates(value: Any) -> Iterator[float]:
    """Every learning rate in what a checkpoint says of the optimizer, however it is put together."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "lr" and inner is not None:
                yield float(inner)
            else:
                yield from _rates(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _rates(inner)


# -- what differs -----------------------------------------------------------------------------------------------------


def differences(got: Outcome, expected: Outcome) -> list[str]:
    """A line for each value that is not what one process gives."""
    found: list[str] = []
    for step, losses in enumerate(expected.losses):
        ours = got.losses[step] if step < len(got.losses) else {}
        if losses.keys() != ours.keys():
            found.append(f"step {step}: losses of {sorted(ours)}, not of {sorted(losses)}")
        for task in losses.keys() & ours.keys():
            found += _differs(f"step {step}: loss of {task}", _number(ours[task]), _number(losses[task]))
    for done, snapshot in expected.snapshots.items():
        own, where = got.snapshots[done], f"after {done} steps: "
        found += _all_differ(where, own.tensors, snapshot.tensors)
        found += _all_differ(where, own.states, snapshot.states)
        found += _rates_differ(where, own.rates, snapshot)
    return [*found, *_all_differ("in the modules: ", got.final, expected.final)]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _all_differ(where: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() - got.keys()):
        yield f"{where}{name} is missing"
    for name in sorted(got.keys() - expected.keys()):
        yield f"{where}{name} is there, and not in one process"
    for name in sorted(got.keys() & expected.keys()):
        yield from _differs(f"{where}{name}", got[name], expected[name])


def _differs(what: str, got: Tensor, expected: Tensor) -> Iterator[str]:
    if got.shape != expected.shape:
        yield f"{what} is of shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        return
    got, expected = got.double(), expected.double()
    error = (got - expected).abs().max() if got.numel() else got.new_zeros(())
    largest = expected.abs().max() if got.numel() else got.new_zeros(())
    if not error <= ABSOLUTE + RELATIVE * largest:
        yield f"{what} is off by {float(error):.2g} of {float(largest):.2g}"


def _rates_differ(where: str, got: frozenset[float], expected: Snapshot) -> Iterator[str]:
    def near(rate: float, others: frozenset[float]) -> bool:
        return any(abs(rate - other) <= RELATIVE * abs(other) + ABSOLUTE for other in others)

    allowed = expected.rates | expected.idle_rates
    if not all(near(rate, got) for rate in expected.rates) or not all(near(rate, allowed) for rate in got):
        yield f"{where}learning rates are {sorted(got)}, not {sorted(expected.rates)}"


# -- verdicts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when its body takes longer, and again each few seconds until it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def verdict_of(case: Case, seconds: float = 60.0) -> tuple[str, str]:
    """Returns "ok", "refused" (a sentence says what is not supported), "differs", "error" (a run that failed under
    way), "crash" (any other exception, a hang too) or "invalid" (one process cannot run it either); and the text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with within(seconds):
                plain = Plain(case)
                expected = plain.run()
        except Exception as error:
            return "invalid", "".join(traceback.format_exception(error)[-4:])
        if not all(torch.isfinite(value).all() for value in expected.final.values()):
            return "invalid", "its weights are not finite"
        try:
            with within(seconds), tempfile.TemporaryDirectory() as directory:
                got = planned(case, Path(directory), 1 + max(plain.origins))
        except ProgramError as error:
            return "error", f"ProgramError: {error}"
        except (InputError, InfeasibleError) as error:
            return "refused", str(error)
        except spindle.SpindleError as error:
            return "error", "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        except Exception as error:
            return "crash", "".join(traceback.format_exception(error)[-6:])
    wrong = differences(got, expected)
    return ("differs", "\n".join(wrong)) if wrong else ("ok", "")
