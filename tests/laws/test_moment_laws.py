"""A draft that differs from another from some moment on is decoded from there to what it is decoded to as a whole."""

from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spindle.errors import InfeasibleError
from spindle.planner.problem import make_problem
from spindle.planner.search.decode import Decoded, Decoder, Draft, FlatDecoder, Moment
from spindle.planner.search.device_pool import make_device_pool
from spindle.planner.search.improve import Annealer
from spindle.planner.search.list_scheduler import Stuck
from spindle.planner.search.model import make_model
from spindle.planner.search.placed import PlacedDecoder
from spindle.planner.work import Work
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from tests.laws.planner_strategies import clusters, metagraphs


class Compared:
    """A decoder that decodes everything as a whole too."""

    def __init__(self, inner: Decoder) -> None:
        self.inner, self.model = inner, inner.model
        self.slice_units, self.reduction_units = inner.slice_units, inner.reduction_units
        self.resumed = 0

    def decode(
        self, draft: Draft, limit_s: float, since: Moment | None = None, keep: list[Moment] | None = None
    ) -> Decoded | None:
        found = self.inner.decode(draft, limit_s, since, keep)
        if since is not None:
            self.resumed += 1
            assert self.inner.decode(draft, inf, since) == self.inner.decode(draft, inf)
            whole = self.inner.decode(draft, limit_s)
            assert found == whole or (whole is None and found is not None and found[0] >= limit_s)
        return found

    def reduction_s(self, draft: Draft, decoded: Decoded) -> float:
        return self.inner.reduction_s(draft, decoded)


@pytest.mark.parametrize("on_floor", [False, True])
def test_resumed_schedules_are_whole_ones(on_floor: bool) -> None:
    resumed = 0

    @settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(metagraphs(plannable=1, memory=True), clusters(), st.integers(0, 99))
    def holds(metagraph: MetaGraph, cluster: Cluster, seed: int) -> None:
        nonlocal resumed
        try:
            problem = make_problem(metagraph, cluster)
        except InfeasibleError:
            return
        model = make_model(problem, 1.0)
        decoder = Compared(PlacedDecoder(model, make_device_pool(problem)) if on_floor else FlatDecoder(model))
        draft: Draft = [[(0, layers, float(i), 0.0, 0)] for i, layers in enumerate(model.layers)]
        try:
            annealer = Annealer(decoder, draft, Work(1.0, lambda: 0.0), seed)
        except Stuck:
            return
        for _ in annealer.run(3000.0):
            pass
        resumed += decoder.resumed

    holds()
    assert resumed > 100
