"""The true optimum of a tiny MetaGraph without traffic, by branch and bound over all active schedules.

Layers are the tasks; each is placed at the earliest time that its devices and the layer before it allow, in every order
and on every count. The best order and counts give the optimum, since a shortest schedule can be made active.
"""

from itertools import pairwise

from spindle.planner.problem import Problem, make_problem
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph

Placed = tuple[float, float, int]
"""(start, end, devices) of one layer."""


class OutOfNodes(Exception):
    """More than the given number of partial schedules."""


def optimum_s(metagraph: MetaGraph, cluster: Cluster, upper_s: float, *, most_nodes: int = 400_000) -> float:
    """The least makespan, at most `upper_s`; raises OutOfNodes when that takes too many partial schedules."""
    search = _Search(make_problem(metagraph, cluster), upper_s, most_nodes)
    search.extend((), [0] * len(metagraph), [0.0] * len(metagraph), 0.0)
    return search.best_s


class _Search:
    def __init__(self, problem: Problem, upper_s: float, most_nodes: int) -> None:
        self.problem, self.best_s, self.left = problem, upper_s, most_nodes
        self.seen: dict[tuple[tuple[Placed, ...], tuple[int, ...]], float] = {}
        tail = [0.0] * len(problem)
        for m in reversed(problem.order):
            tail[m] = max((tail[s] + self._fastest_s(s) for s in problem.successors[m]), default=0.0)
        self.tail_s = tail
        self.area_s = [min(n * problem.time(m, n) for n in problem.curves[m].counts) for m in range(len(problem))]

    def _fastest_s(self, m: int) -> float:
        return self.problem.layers[m] * self.problem.curves[m].times_s[-1]

    def extend(self, placed: tuple[Placed, ...], done: list[int], ends: list[float], area: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise OutOfNodes
        key = (tuple(sorted(placed)), tuple(done))
        if key in self.seen:
            return
        self.seen[key] = 0.0
        problem = self.problem
        open_ops = [m for m in range(len(problem)) if done[m] < problem.layers[m]]
        if not open_ops:
            self.best_s = min(self.best_s, max(ends))
            return
        rest = sum((problem.layers[m] - done[m]) * self.area_s[m] for m in open_ops)
        if (area + rest) / problem.num_devices >= self.best_s * (1 - 1e-9):
            return
        for m in open_ops:
            if any(done[p] < problem.layers[p] for p in problem.predecessors[m]):
                continue
            ready = ends[m] if done[m] else max((ends[p] for p in problem.predecessors[m]), default=0.0)
            for n in problem.curves[m].counts:
                time_s = problem.time(m, n)
                start = self._earliest(placed, ready, time_s, n)
                more = (problem.layers[m] - done[m] - 1) * problem.curves[m].times_s[-1]
                if start + time_s + more + self.tail_s[m] >= self.best_s * (1 - 1e-9):
                    continue
                done[m] += 1
                before, ends[m] = ends[m], start + time_s
                self.extend((*placed, (start, start + time_s, n)), done, ends, area + n * time_s)
                done[m] -= 1
                ends[m] = before

    def _earliest(self, placed: tuple[Placed, ...], ready: float, time_s: float, count: int) -> float:
        """The first time from `ready` on at which `count` devices are free for `time_s`."""
        for start in sorted({ready, *(end for _, end, _ in placed if end > ready)}):
            edges = sorted({start, start + time_s, *(t for p in placed for t in p[:2] if start < t < start + time_s)})
            used = max(sum(n for a, b, n in placed if a <= low and b >= high) for low, high in pairwise(edges))
            if used + count <= self.problem.num_devices:
                return start
        raise AssertionError("after the last layer all devices are free")
