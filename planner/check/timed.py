"""Prices over time: what `spindle.values.plan.TimePrices` prove, by arithmetic. The argument stands there."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spindle.planner.check.case import BadCertificate, CostedCase, usable
from spindle.values.metagraph import MetaOp
from spindle.values.plan import TimePrices

Array = npt.NDArray[np.float64]
ROUNDING = 1e-9  # of a window
SUMS = 1e-12  # of all that is added and taken away: no smaller difference proves anything


def horizon_proved_s(case: CostedCase, prices: TimePrices) -> float:
    """The prices' horizon when no schedule ends by it; 0 when they do not show that."""
    edges, device = np.array(prices.edges_s), np.array(prices.device_prices)
    starting, ending = defaultdict[str, Array](lambda: 0 * device), defaultdict[str, Array](lambda: 0 * device)
    for source, target, seconds in prices.wait_prices:
        if target not in case.metagraph.by_name or source not in case.metagraph.predecessors[target]:
            raise BadCertificate(f"the certificate prices a flow {source} -> {target} that the MetaGraph does not have")
        starting[target] = starting[target] + seconds
        ending[source] = ending[source] + seconds
    if not all(usable(case, metaop) for metaop in case.metagraph):
        return 0.0  # no schedule on so few devices, so nothing to prove
    earliest_s = _away_s(case, case.metagraph.topological_order, case.metagraph.predecessors)
    last_s = _away_s(case, case.metagraph.topological_order[::-1], case.metagraph.successors)
    worth, paid = case.plan.num_devices * float(device @ np.diff(edges)), 0.0
    for metaop in case.metagraph:
        window = (earliest_s[metaop.name], prices.horizon_s - last_s[metaop.name])
        if window[1] - window[0] < _own_s(case, metaop) * (1 - ROUNDING):
            return prices.horizon_s  # no room between what must come before and after
        paid += _least_paid(
            edges, device, starting[metaop.name], ending[metaop.name], usable(case, metaop), metaop.layers, window
        )
    lengths = np.diff(edges)
    waits = sum(float(np.array(seconds) @ lengths) for _, _, seconds in prices.wait_prices)
    return prices.horizon_s if paid - worth > SUMS * (worth + 2 * waits) else 0.0


def _own_s(case: CostedCase, metaop: MetaOp) -> float:
    return metaop.layers * min(t for _, t in usable(case, metaop))


def _away_s(case: CostedCase, order: tuple[str, ...], near: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Seconds that must pass on one side of each MetaOp: the longest chain, or the device time of all that is there."""
    far: dict[str, frozenset[str]] = {}
    found: dict[str, float] = {}
    for name in order:
        far[name] = frozenset(near[name]).union(*(far[other] for other in near[name]))
        area = sum(
            case.metagraph[other].layers * min(n * t for n, t in usable(case, case.metagraph[other]))
            for other in far[name]
        )
        chains = [found[other] + _own_s(case, case.metagraph[other]) for other in near[name]]
        found[name] = max([area / case.plan.num_devices, *chains])
    return found


def _least_paid(
    edges: Array,
    device: Array,
    starting: Array,
    ending: Array,
    times: list[tuple[int, float]],
    layers: int,
    window: tuple[float, float],
) -> float:
    """The least that a MetaOp pays, over all cells for its start and its end within its window.

    With any price of a layer, device time in [S, E] costs at least that price times the layers, less what the best
    count gains in each second of [S, E]. All is linear within a cell, so its corners decide.
    """
    middles = (edges[:-1] + edges[1:]) / 2
    inside = [float(t) for t in (*edges, *middles) if window[0] < t < window[1]]
    grid = np.array(sorted({window[0], *inside, window[1]}))
    interval = np.minimum(np.searchsorted(edges, grid[:-1], side="right") - 1, len(device) - 1)
    late_s = edges[-1] - grid[-1]
    best = np.full((len(grid) - 1, len(grid) - 1), -np.inf)
    after_start = _seconds_after(grid, starting[interval]) + _tail(edges, starting, late_s)
    after_end = _seconds_after(grid, ending[interval]) + _tail(edges, ending, late_s)
    for layer_price in {float(price * slope) for price in device for slope in _slopes(times)}:
        gain = np.maximum(0.0, np.max([layer_price / t - n * device for n, t in times], axis=0))
        gained = np.append(0.0, np.cumsum(gain[interval] * np.diff(grid)))
        at_start, at_end = gained + after_start, -gained - after_end
        at_start, at_end = np.minimum(at_start[:-1], at_start[1:]), np.minimum(at_end[:-1], at_end[1:])
        best = np.maximum(best, layer_price * layers + at_start[:, None] + at_end[None, :])
    shortest_s = layers * min(t for _, t in times) * (1 - ROUNDING)
    return float(best[grid[1:][None, :] - grid[:-1][:, None] >= shortest_s].min())


def _slopes(times: list[tuple[int, float]]) -> list[float]:
    """Devices for each further layer a second, from one useful count to the next; nothing, and more than any."""
    slopes, at, rate = [0.0], 0, 0.0
    while wider := [(n, 1 / t) for n, t in times if n > at and 1 / t > rate]:
        following = max(wider, key=lambda point: ((point[1] - rate) / (point[0] - at), point[0]))
        slopes.append((following[0] - at) / (following[1] - rate))
        at, rate = following
    return [*slopes, 4 * slopes[-1]]


def _seconds_after(grid: Array, price: Array) -> Array:
    """Price of the seconds from each point to the grid's end."""
    return np.append(np.cumsum((price * np.diff(grid))[::-1])[::-1], 0.0)


def _tail(edges: Array, price: Array, last_s: float) -> float:
    """Price of the last `last_s` seconds before the horizon."""
    return float(price @ np.clip(edges[1:] - np.maximum(edges[:-1], edges[-1] - last_s), 0.0, None))
