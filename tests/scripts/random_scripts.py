"""Random small training scripts: modules, tasks, data, optimizer, schedule and checkpoints put together by chance.

A Case is plain data, so that one that fails can be printed and made smaller. `script_runs.py` runs it.
"""

import functools
import random
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.scripts.script_pieces import DATA, GROUPS, OF_USER, OPTIMIZERS, SCHEDULES
from tests.scripts.script_towers import CHANGING, READS_WORDS, TOWERS, UNSAVED

STEPS, SAVED_AFTER = 5, 2
BATCH_SIZE = 4
MOMENTA = (
    *("momentum", "momentum_first", "momentum_lerp", "momentum_data"),
    *("momentum_count", "momentum_count_first"),
    *("averaged", "averaged_first"),
)
"""How a teacher follows its student; by a count of steps, and as torch's AveragedModel does, in the last ones."""
CLAMPS = ("clamp", "clamp_data", "clamp_assigned", "clamp_after", "clamp_data_after", "clamp_assigned_after")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentCase:
    """A component: a tower of some `depth`, a "scale", a "tied_head" or "teacher" `of` another component.

    `settings` are its own for the optimizer; `is_eval`: of a frozen one, whether it is in evaluation mode.
    """

    name: str
    kind: str
    depth: int = 1
    of: str = ""
    is_frozen: bool = False
    is_eval: bool = False
    settings: tuple[tuple[str, float], ...] = ()
    recompute: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCase:
    """A task: towers that its samples pass one after another, a loss, and what its code writes to.

    `others`: those that the second view of a sample passes, for losses of two views. `samples`: of one pass.
    """

    loss: str
    towers: tuple[str, ...]
    others: tuple[str, ...] = ()
    scale: str = ""
    head: str = ""
    teacher: str = ""
    writes: tuple[str, ...] = ()
    every: int = 1
    weight: float = 1.0
    data: str = "list"
    samples: int = 3 * BATCH_SIZE
    seed: int = 0

    @property
    def uses(self) -> tuple[str, ...]:
        """The components that its code calls, as often as it does."""
        return tuple(filter(None, (*self.towers, *self.others, self.head, self.scale, self.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A script, and the plans that run it.

    `middle`: "" trains in one go; "resume" goes on from a checkpoint under another plan; "thaw" and "freeze" change
    then whether component `changed` is frozen.
    """

    components: tuple[ComponentCase, ...]
    tasks: tuple[TaskCase, ...]
    optimizer: str = "sgd"
    groups: str = "one"
    schedule: str = ""
    accumulate: int = 1
    in_flight: int = 1
    max_grad_norm: float | None = None
    shard_optimizer: bool = False
    num_ranks: int = 2
    is_widest: bool = False
    plan_seed: int = 0
    middle: str = ""
    changed: str = ""
    ranks_after: int = 2

    def component(self, name: str) -> ComponentCase:
        """The component of a name."""
        return next(component for component in self.components if component.name == name)

    def is_frozen(self, name: str, step: int) -> bool:
        """Whether a component is frozen in a step."""
        if name == self.changed and self.middle in ("thaw", "freeze"):
            return (step < SAVED_AFTER) == (self.middle == "thaw")
        return self.component(name).is_frozen

    def __str__(self) -> str:
        lines = [f"  {_told(component)}" for component in self.components]
        lines += [f"  {_told(task)}" for task in self.tasks]
        return "\n".join([*lines, f"  {_told(self)}"])


def _told(value: Any) -> str:
    """A part of a case in a line, without what is as always."""
    fields = value.__dataclass_fields__
    shown = {name: getattr(value, name) for name in fields if name not in ("components", "tasks")}
    given = {name: given for name, given in shown.items() if given != fields[name].default}
    return f"{type(value).__name__}({', '.join(f'{name}={given!r}' for name, given in given.items())})"


# -- what is in a case ------------------------------------------------------------------------------------------------


def kinds_of(case: Case) -> frozenset[str]:
    """Names of all that is in a case; each can be switched off."""
    return frozenset((*_kinds_of_run(case), *_kinds_of_tasks(case), *_kinds_of_state(case)))


def _kinds_of_run(case: Case) -> Iterator[str]:
    yield from (component.kind for component in case.components)
    yield from (
        case.optimizer,
        f"groups_{case.groups}",
        f"schedule_{case.schedule or 'none'}",
        f"ranks_{case.num_ranks}",
    )
    used = {name for task in case.tasks for name in task.uses}
    flags = {
        "settings": any(component.settings for component in case.components),
        "frozen": any(component.is_frozen for component in case.components),
        "eval": any(component.is_eval for component in case.components),
        "recompute": any(component.recompute for component in case.components),
        "unused": any(c.name not in used for c in case.components),
        "accumulate": case.accumulate > 1,
        "in_flight": case.in_flight > 1,
        "clip": case.max_grad_norm is not None,
        "sharded": case.shard_optimizer,
        "resume": case.middle != "",
        "thaw": case.middle == "thaw",
        "freeze": case.middle == "freeze",
    }
    flags["settings_with_groups"] = flags["settings"] and case.groups != "one"
    yield from (name for name, is_there in flags.items() if is_there)


def _kinds_of_tasks(case: Case) -> Iterator[str]:
    yield f"tasks_{len(case.tasks)}"
    for task in case.tasks:
        yield from (task.loss, f"data_{task.data}", *(f"write_{name}" for name in task.writes))
        yield from ["every"] if task.every > 1 else []
        yield from ["ragged_end"] if task.samples % BATCH_SIZE else []
        yield from ["same_tower_twice"] if max(Counter(task.uses).values()) > 1 else []


def _kinds_of_state(case: Case) -> Iterator[str]:
    """What changes in several places, whose order counts: "batch_norm_shared", and "state_shared" for all."""
    for component in case.components:
        users = sum(component.name in task.uses for task in case.tasks)
        if component.kind not in CHANGING or not users:
            continue
        ways = {
            "shared": users > 1,
            "accumulated": case.accumulate > 1,
            "in_flight": case.in_flight > 1,
            "twice": any(task.uses.count(component.name) > 1 for task in case.tasks),
            "recomputed": component.recompute,
        }
        yield from (f"{kind}_{way}" for way, is_there in ways.items() if is_there for kind in (component.kind, "state"))


def is_valid(case: Case) -> bool:
    """Whether plain PyTorch can run a case: each task trains something, and no optimizer lacks what it takes."""
    for step in (0, STEPS):
        for task in case.tasks:
            learned = (*task.towers, *(task.others if task.loss == "contrastive" else ()))
            if all(case.is_frozen(name, step) for name in learned):
                return False
    for component in case.components:
        if component.kind == "prototypes" and any(task.uses.count(component.name) > 1 for task in case.tasks):
            return False  # autograd refuses that a weight changes between its use and backward
        if component.kind == "clamped" and any(task.uses.count(component.name) > 1 for task in case.tasks):
            return False  # likewise
        if component.kind == "sized" and any(
            component.name in task.uses and task.samples % BATCH_SIZE == 3 for task in case.tasks
        ):
            return False
    used = {name for task in case.tasks for name in task.uses}
    if case.middle and any(component.kind in UNSAVED and component.name in used for component in case.components):
        return False  # it would begin anew in one process, too
    if case.optimizer == "muon" and case.groups != "matrices":
        return False
    if case.optimizer == "hf_adafactor" and case.schedule:
        return False  # it has no rate that a schedule could change
    if case.groups == "trained" and case.middle in ("thaw", "freeze"):
        return False  # its optimizer would not know what is thawed
    if case.changed and case.changed not in used:
        return False
    return case.accumulate % case.in_flight == 0


# -- chance -----------------------------------------------------------------------------------------------------------


def random_case(seed: int, without: Collection[str] = frozenset()) -> Case:
    """The case of a seed that has none of the kinds in `without`."""
    unknown = set(without) - all_kinds() if without else set()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such kind; choose among {', '.join(sorted(all_kinds()))}")
    for attempt in range(10_000):
        case = _drawn(random.Random(f"{seed}/{attempt}"))
        if is_valid(case) and not kinds_of(case) & set(without):
            return case
    raise ValueError(f"no case without {', '.join(sorted(without))}")


@functools.cache
def covering_seeds(count: int, without: frozenset[str] = frozenset()) -> tuple[int, ...]:
    """Seeds of different cases that together have all kinds but those of `without` about equally often."""
    left = {seed: kinds_of(random_case(seed, without)) for seed in range(20 * count)}
    seen = Counter[str]()
    found: list[int] = []
    for _ in range(count):
        worth = {kind: 1 / (1 + seen[kind]) ** 2 for kind in all_kinds()}
        best = max(left, key=lambda seed: sum(worth.get(kind, 0.0) for kind in left[seed]))
        seen.update(left.pop(best))
        found.append(best)
    return tuple(found)


def _drawn(rng: random.Random) -> Case:
    optimizer = rng.choice(list(OPTIMIZERS))
    components = _random_components(rng, optimizer)
    tasks = tuple(_random_task(rng, components) for _ in range(rng.choice([1, 1, 2, 2, 3])))
    accumulate = rng.choice([1, 1, 1, 2, 2, 4])
    middle = rng.choice(["", "", "", "resume", "resume", "thaw", "thaw", "freeze"])
    changeable = TOWERS.keys() - {"frozen_in_part"}
    towers = [component.name for component in components if component.kind in changeable and not component.is_frozen]
    return Case(
        components=components,
        tasks=tasks,
        optimizer=optimizer,
        groups="matrices" if optimizer == "muon" else rng.choice(["one", "one", *GROUPS]),
        schedule=rng.choice(["", "", *SCHEDULES, *OF_USER]),
        accumulate=accumulate,
        in_flight=rng.choice([1, min(2, accumulate), accumulate]),
        max_grad_norm=rng.choice([None, None, 1.0, 0.3]),
        shard_optimizer=rng.random() < 0.3,
        num_ranks=rng.choice([1, 2, 2, 3]),
        is_widest=rng.random() < 0.3,
        plan_seed=rng.randrange(10**6),
        middle=middle,
        changed=rng.choice(towers) if towers and middle in ("thaw", "freeze") else "",
        ranks_after=rng.randint(1, 3),
    )


def _random_components(rng: random.Random, optimizer: str) -> tuple[ComponentCase, ...]:
    found: list[ComponentCase] = []
    for name in "abc"[: rng.randint(1, 3)]:
        is_frozen = rng.random() < 0.12
        own = {"lr": rng.choice([0.002, 0.02])} if optimizer != "hf_adafactor" else {"weight_decay": 0.02}
        found.append(
            ComponentCase(
                name=name,
                kind=rng.choice(["mlp", "mlp", "mlp", *TOWERS]),
                depth=rng.randint(1, 2),
                is_frozen=is_frozen,
                is_eval=is_frozen and rng.random() < 0.5,
                settings=tuple(own.items()) if rng.random() < 0.15 else (),
                recompute=rng.random() < 0.12,
            )
        )
    words = [component.name for component in found if component.kind in READS_WORDS]
    if words and rng.random() < 0.5:
        found.append(ComponentCase(name="head", kind="tied_head", of=words[0]))
    if rng.random() < 0.25:
        found.append(ComponentCase(name="teacher", kind="teacher", of=rng.choice(found[: len(words) or 1]).name))
    if rng.random() < 0.3:
        found.append(ComponentCase(name="scale", kind="scale"))
    return tuple(found)


def _random_task(rng: random.Random, components: tuple[ComponentCase, ...]) -> TaskCase:
    by_kind = {component.kind: component for component in components}
    losses = ["mse", "cross_entropy", "contrastive", "detached"]
    losses += ["tied", "tied"] if "tied_head" in by_kind else []
    losses += ["distill", "distill"] if "teacher" in by_kind else []
    loss = rng.choice(losses)
    first = {"tied": by_kind.get("tied_head"), "distill": by_kind.get("teacher")}.get(loss)
    towers = (first.of,) if first else _random_chain(rng, components)
    others = _random_chain(rng, components) if loss in ("contrastive", "detached") else ()
    if loss == "contrastive" and rng.random() < 0.3:
        others = towers
    scale = "scale" if loss == "contrastive" and "scale" in by_kind and rng.random() < 0.8 else ""
    writes = [rng.choice(CLAMPS)] if scale and rng.random() < 0.4 else []
    if loss == "distill":
        writes += rng.choice([[], *([momentum] for momentum in MOMENTA)])
        writes += rng.choice([[], ["center"], ["center_assigned"]])
    return TaskCase(
        loss=loss,
        towers=towers,
        others=others,
        scale=scale,
        head="head" if loss == "tied" else "",
        teacher="teacher" if loss == "distill" else "",
        writes=tuple(writes),
        every=rng.choice([1, 1, 1, 2]),
        weight=rng.choice([1.0, 1.0, 0.5, 2.0]),
        data=rng.choice(["list", "list", *DATA]),
        samples=rng.choice([4, 8, 10, 11, 12]),
        seed=rng.randrange(1000),
    )


def _random_chain(rng: random.Random, components: tuple[ComponentCase, ...]) -> tuple[str, ...]:
    """A tower, or two of which the second reads what the first gives."""
    towers = [component for component in components if component.kind in TOWERS]
    first = rng.choice(towers)
    later = [c.name for c in towers if c.kind not in READS_WORDS and c is not first]
    return (first.name, rng.choice(later)) if later and rng.random() < 0.3 else (first.name,)


# -- smaller cases ----------------------------------------------------------------------------------------------------


def smaller(case: Case) -> list[Case]:
    """Valid cases with less in them, to find the least that still fails."""
    found = [replace(case, tasks=_but(case.tasks, index)) for index in range(len(case.tasks)) if case.tasks[1:]]
    named = {name for task in case.tasks for name in task.uses} | {component.of for component in case.components}
    unused = [index for index, component in enumerate(case.components) if component.name not in named]
    found += [replace(case, components=_but(case.components, index)) for index in unused if case.components[1:]]
    plain = {"middle": "", "schedule": "", "groups": "one", "optimizer": "sgd", "accumulate": 1, "in_flight": 1,
             "max_grad_norm": None, "shard_optimizer": False, "num_ranks": 1, "ranks_after": 1,
             "is_widest": True}  # fmt: skip
    found += [replace(case, middle="resume", changed="")] if case.changed else []
    found += [replace(case, optimizer=kind) for kind in ("momentum",) if case.optimizer != "sgd"]
    found += _plainer(case, plain)
    for index, task in enumerate(case.tasks):
        plain = {"every": 1, "weight": 1.0, "data": "list", "samples": 3 * BATCH_SIZE, "scale": "", "writes": ()}
        others = _plainer(task, plain)
        others += [replace(task, writes=_but(task.writes, at)) for at in range(len(task.writes))]
        others += [replace(task, towers=(name,)) for name in task.towers if len(task.towers) > 1]
        others += [replace(task, others=(name,)) for name in task.others if len(task.others) > 1]
        others += [TaskCase(loss="mse", towers=task.towers, data=task.data, samples=task.samples, seed=task.seed)]
        found += [replace(case, tasks=_with(case.tasks, index, other)) for other in others if other != task]
    for index, component in enumerate(case.components):
        plain = {"depth": 1, "settings": (), "recompute": False, "is_eval": False, "is_frozen": False}
        changed = _plainer(component, plain)
        if component.kind in TOWERS and component.kind not in ("mlp", *READS_WORDS):
            changed.append(replace(component, kind="mlp"))
        found += [replace(case, components=_with(case.components, index, other)) for other in changed]
    return [each for each in found if each != case and _is_whole(each) and is_valid(each)]


def _plainer(value: Any, plain: dict[str, Any]) -> list[Any]:
    return [replace(value, **{name: to}) for name, to in plain.items() if getattr(value, name) != to]


def _but(values: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return values[:index] + values[index + 1 :]


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _is_whole(case: Case) -> bool:
    """Whether all that is named is there, and words come first."""
    kinds = {component.name: component.kind for component in case.components}
    used = {name for task in case.tasks for name in task.uses} | {component.of for component in case.components} - {""}
    chains = [chain for task in case.tasks for chain in (task.towers, task.others)]
    return used <= kinds.keys() and all(kinds[name] not in READS_WORDS for chain in chains for name in chain[1:])


@functools.cache
def all_kinds() -> frozenset[str]:
    """Every kind that chance brings."""
    cases = (_drawn(random.Random(seed)) for seed in range(3000))
    return frozenset(kind for case in cases if is_valid(case) for kind in kinds_of(case))
