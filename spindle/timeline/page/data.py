"""Data: a plan and its views in, the compact JSON value that the page draws out.

Times are whole ticks of `tick_s` seconds, a power of ten that gives the longest step about 1e7 of them; a row is a flat
list of (what, gap since the end of the item before, duration); memory is in units of `memory_unit_bytes`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from spindle.timeline.accounts import account
from spindle.timeline.colors import fills, lines, text_on
from spindle.timeline.items import (
    CAUSE_TITLES,
    COMMUNICATING,
    COMPUTING,
    OWN_AXIS_RATIO,
    Cause,
    Item,
    Kind,
    StepView,
    View,
    What,
)
from spindle.timeline.memory import Level, MemoryModel
from spindle.timeline.table import SliceTable
from spindle.timeline.waves import leading, turn_by_wave, wave_times
from spindle.timeline.words import ranges
from spindle.values.plan import Plan

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

TICKS_PER_STEP = 1e7
KINDS = tuple(Kind)
CAUSES = tuple(Cause)


class Names:
    """Strings, each once, by the order in which they were first asked for."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._index = {name: place for place, name in enumerate(dict.fromkeys(names))}

    def __call__(self, name: str) -> int:
        """Index of a name."""
        return self._index.setdefault(name, len(self._index))

    def listed(self) -> list[str]:
        """All names by index."""
        return list(self._index)


def page_data(
    plan: Plan, table: SliceTable, views: Sequence[View], memory: MemoryModel | None, *, threshold: float
) -> dict[str, Json]:
    """What the page draws; `threshold`: share by which a wave may miss its prediction unmarked."""
    longest_s = max(step.step_s for view in views for step in view.steps)
    peak_bytes = max((level for _, _, level in _all_levels(views, memory)), default=0.0)
    encoder = _Encoder(
        tick_s=10.0 ** math.ceil(math.log10(longest_s / TICKS_PER_STEP)) if longest_s > 0 else 1.0,
        unit_bytes=2.0 ** max(0, math.ceil(math.log2(peak_bytes)) - 20) if peak_bytes > 0 else 1.0,
        tasks=Names(task_names(views)),
        components=Names(component_names(views)),
        memory=memory,
        threshold=threshold,
        turns=turn_by_wave(plan),
    )
    encoded = [encoder.view(view) for view in views]
    tasks, components = encoder.tasks.listed(), encoder.components.listed()
    most = max(len(components), len(tasks))
    return {
        "tick_s": encoder.tick_s,
        "memory_unit_bytes": encoder.unit_bytes,
        "capacity_bytes": plan.cluster.device.memory_bytes if plan.cluster else 0.0,
        "num_devices": plan.num_devices,
        "devices_per_node": plan.devices_per_node,
        "threshold": threshold,
        "own_axis_ratio": OWN_AXIS_RATIO,
        "kinds": [kind.value for kind in KINDS],
        "causes": [[cause.value, CAUSE_TITLES[cause], _group(cause)] for cause in CAUSES],
        "tasks": tasks,
        "components": components,
        "fills": [[fill, text_on(fill)] for fill in fills(most)],
        "lines": {"light": lines(most, dark=False), "dark": lines(most, dark=True)},
        "slices": [
            [s.first_layer, s.last_layer, plan.metagraph[s.metaop].layers if plan.metagraph else 0, ranges(s.devices)]
            for s in table.slices
        ],
        "views": encoded,
        "strings": encoder.strings.listed(),
    }


def task_names(views: Sequence[View]) -> list[str]:
    """Tasks in the order of the alphabet, so that a task keeps its color from plan to plan."""
    return sorted_names({item.what.task for view in views for row in view.shown.rows for item in row})


def component_names(views: Sequence[View]) -> list[str]:
    """Components in the order of the alphabet, so that a component keeps its color from plan to plan."""
    return sorted_names({item.what.component for view in views for row in view.shown.rows for item in row})


def sorted_names(names: Iterable[str]) -> list[str]:
    """By the alphabet, but 9 before 10; without the empty name."""
    padded = {name: re.sub(r"\d+", lambda number: number[0].zfill(12), name) for name in names if name}
    return sorted(padded, key=lambda name: (padded[name], name))


def _group(cause: Cause) -> str:
    if cause is Cause.OTHER:
        return "other steps"
    return "computing" if cause in COMPUTING else "communicating" if cause in COMMUNICATING else "idle"


def _all_levels(views: Sequence[View], memory: MemoryModel | None) -> Iterator[tuple[int, float, float]]:
    if memory is not None:
        for view in views:
            for device, row in enumerate(view.shown.rows):
                yield from ((device, at_s, level) for at_s, level in memory.levels(device, row))


@dataclass
class _Encoder:
    """Turns views into JSON values, and gathers the names that they use."""

    tick_s: float
    unit_bytes: float
    tasks: Names
    components: Names
    memory: MemoryModel | None
    threshold: float
    turns: Mapping[int, int]
    strings: Names = field(default_factory=Names)

    def view(self, view: View) -> dict[str, Json]:
        """A view; its items name what they are by index into `whats`."""
        whats: dict[What, int] = {}
        steps = [self.step(step, whats) for step in view.steps]
        return {
            "source": view.source,
            "first": view.first,
            "num_steps": view.num_steps,
            "whats": [self.what(what) for what in whats],
            "steps": steps,
        }

    def what(self, what: What) -> list[Json]:
        """kind, name, task, component, MetaOp, wave, bytes, slice, planned ticks, why, cause."""
        return [
            KINDS.index(what.kind),
            self.strings(what.name),
            self.tasks(what.task) if what.task else -1,
            self.components(what.component) if what.component else -1,
            self.strings(what.metaop),
            what.wave,
            what.num_bytes,
            what.slice,
            self.ticks(what.planned_s),
            self.strings(what.why),
            CAUSES.index(what.cause),
        ]

    def step(self, step: StepView, whats: dict[What, int]) -> dict[str, Json]:
        """A step."""
        waves = wave_times(step, threshold=self.threshold)
        return {
            "step": step.step,
            "ticks": self.ticks(step.step_s),
            "rows": [self.row(row, whats) for row in step.rows],
            "blocked": [self.blocked(row) for row in step.rows],
            "links": [number for link in step.links for number in link],
            "accounts": [self.accounts(row, step.step_s) for row in step.rows],
            "memory": [self.levels(device, row) for device, row in enumerate(step.rows)] if self.memory else [],
            "waves": [
                [
                    w.wave,
                    KINDS.index(w.kind),
                    *map(self.ticks, (w.start_s, w.end_s, w.seconds, w.planned_s)),
                    round(w.miss, 4),
                    int(leads),
                ]
                for w, leads in zip(waves, leading(waves, self.turns), strict=True)
            ],
        }

    def row(self, row: Sequence[Item], whats: dict[What, int]) -> list[int]:
        """(what, gap since the end of the item before, duration) of each item, flat."""
        found, at = [], 0
        for item in row:
            start, end = self.ticks(item.start_s), self.ticks(item.end_s)
            found += [whats.setdefault(item.what, len(whats)), start - at, end - start]
            at = end
        return found

    def blocked(self, row: Sequence[Item]) -> list[int]:
        """(place, ticks) of each item that was blocked, flat."""
        pairs = ((place, self.ticks(item.blocked_s)) for place, item in enumerate(row) if item.blocked_s)
        return [number for pair in pairs if pair[1] for number in pair]

    def accounts(self, row: Sequence[Item], step_s: float) -> list[int]:
        """Ticks by cause, in the order of CAUSES."""
        found = account(row, step_s)
        return [self.ticks(found.get(cause, 0.0)) for cause in CAUSES]

    def levels(self, device: int, row: Sequence[Item]) -> list[int]:
        """(ticks since the level before, level) of a device's memory, flat."""
        found, at = [], 0
        levels: Sequence[Level] = self.memory.levels(device, row) if self.memory else ()
        for at_s, level in levels:
            found += [self.ticks(at_s) - at, round(level / self.unit_bytes)]
            at = self.ticks(at_s)
        return found

    def ticks(self, seconds: float) -> int:
        """Whole ticks."""
        return round(seconds / self.tick_s)
