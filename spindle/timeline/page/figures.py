"""Figures: a plan and its views in, the numbers of the page out, as values for JSON."""

from collections.abc import Sequence
from typing import Any

from spindle.timeline.accounts import Accounts, account, idle_share, total
from spindle.timeline.items import COMPUTING, Item, View
from spindle.timeline.memory import MemoryModel
from spindle.timeline.waves import WaveTime, wave_times
from spindle.values.plan import Plan


def figures(plan: Plan, views: Sequence[View], memory: MemoryModel | None, *, threshold: float) -> dict[str, Any]:
    """Of the shown step of each view: seconds by cause, of all devices and of each; memory; waves in order of start.

    `busy_s` is time in computation; `by_cause_s` adds up to the step. `peak_bytes` is None where the plan says nothing,
    `measured_peak_bytes` where the run did not measure it.
    """
    return {
        "num_devices": plan.num_devices,
        "makespan_s": plan.makespan_s,
        "lower_bound_s": plan.lower_bound_s,
        "threshold": threshold,
        "views": [_view(view, memory, threshold) for view in views],
    }


def _view(view: View, memory: MemoryModel | None, threshold: float) -> dict[str, Any]:
    step = view.shown
    accounts = total(step)
    return {
        "source": view.source,
        "step": step.step,
        "num_steps": view.num_steps,
        "step_s": step.step_s,
        "idle_share": idle_share(accounts),
        "by_cause_s": _by_cause(accounts),
        "devices": [_device(device, row, view, memory) for device, row in enumerate(step.rows)],
        "waves": [_wave(wave) for wave in wave_times(step, threshold=threshold)],
    }


def _device(device: int, row: Sequence[Item], view: View, memory: MemoryModel | None) -> dict[str, Any]:
    accounts = account(row, view.shown.step_s)
    return {
        "device": device,
        "busy_s": sum(accounts.get(cause, 0.0) for cause in COMPUTING),
        "idle_share": idle_share(accounts),
        "by_cause_s": _by_cause(accounts),
        "peak_bytes": max(level for _, level in memory.levels(device, row)) if memory else None,
        "measured_peak_bytes": view.peak_bytes[device] if view.peak_bytes else None,
    }


def _by_cause(accounts: Accounts) -> dict[str, float]:
    return {cause.value: seconds for cause, seconds in accounts.items()}


def _wave(wave: WaveTime) -> dict[str, Any]:
    return wave._asdict() | {"kind": wave.kind.value, "missed": bool(wave.miss)}
