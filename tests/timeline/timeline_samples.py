"""Small plans, their predictions and made-up runs, that the tests of the timeline share."""

from collections import defaultdict
from dataclasses import replace
from random import Random

from spindle.planner.simulate import simulate
from spindle.planner.solve import solve
from spindle.timeline.table import SliceTable, make_table
from spindle.values.cluster import Cluster, Device, Link
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.plan import Plan, Slice, make_waves
from spindle.values.trace import Span, SpanKind, Trace

GIB = 2.0**30


def cluster(num_devices: int) -> Cluster:
    """Up to eight devices a node, links of 1 GB/s."""
    return Cluster(
        nodes=-(-num_devices // 8),
        devices_per_node=min(num_devices, 8),
        device=Device(name="toy", memory_bytes=80 * GIB, peak_flops=1e12, memory_bytes_per_s=1e12),
        intra_node=Link(bytes_per_s=1e9, latency_s=1e-5),
        inter_node=Link(bytes_per_s=1e9, latency_s=1e-5),
    )


def metaop(name: str, layers: int, seconds: float, *, output_bytes: float = 1e6) -> MetaOp:
    """A MetaOp that scales well; its task and component are the two parts of its name."""
    task, _, component = name.partition(".")
    return MetaOp(
        name=name,
        task=task,
        component=component,
        layers=layers,
        layer_time_s=points({n: 1e-4 + seconds / n for n in (1, 2, 4, 8)}),
        memory_bytes=points({n: 8 * GIB / n + GIB for n in (1, 2, 4, 8)}),
        layer_param_bytes=1e7,
        output_bytes=output_bytes,
        parameters=component,
    )


def graph(*, prefix: str = "") -> MetaGraph:
    """Two tasks that share a vision encoder."""
    names = {name: f"{prefix}{name}" for name in ("clip", "caption")}
    clip, caption = names["clip"], names["caption"]
    metaops = (
        metaop(f"{clip}.vision", 6, 0.010),
        metaop(f"{clip}.text", 4, 0.006),
        metaop(f"{clip}.loss", 1, 0.001, output_bytes=4.0),
        metaop(f"{caption}.vision", 6, 0.004),
        metaop(f"{caption}.decoder", 3, 0.012),
    )
    pairs = ((clip, "vision", "loss"), (clip, "text", "loss"), (caption, "vision", "decoder"))
    return MetaGraph(metaops, tuple(Flow(f"{task}.{a}", f"{task}.{b}") for task, a, b in pairs))


def planned(num_devices: int = 4, *, prefix: str = "") -> tuple[Plan, Trace]:
    """A plan by the paper's planner, and its prediction."""
    plan = replace(solve(graph(prefix=prefix), cluster(num_devices), method="paper"), planner_s=0.0)
    return plan, simulate(plan)


def by_hand() -> Plan:
    """Device 0 runs a (3 s), then both devices b (1.5 s); a third of each is forward. Links carry 4 bytes in 1 s."""
    where = replace(cluster(2), intra_node=Link(bytes_per_s=4.0, latency_s=0.0))
    a = MetaOp(name="t.a", task="t", component="a", layers=1, layer_time_s=points({1: 3.0}), output_bytes=4.0)
    b = MetaOp(name="t.b", task="t", component="b", layers=2, layer_time_s=points({2: 0.75}))
    slices = (
        Slice(metaop="t.a", first_layer=0, num_layers=1, devices=(0,), start_s=0.0, end_s=3.0),
        Slice(metaop="t.b", first_layer=0, num_layers=2, devices=(0, 1), start_s=3.0, end_s=6.5),
    )
    return Plan(
        num_devices=2,
        devices_per_node=2,
        method="hand",
        waves=make_waves(slices),
        makespan_s=6.5,
        metagraph=MetaGraph((a, b), (Flow("t.a", "t.b"),)),
        cluster=where,
    )


def made_up_run(plan: Plan, predicted: Trace, *, steps: int = 3, seed: int = 0) -> Trace:
    """What a run of `plan` might record: the runtime's names, its order, and times that vary."""
    run = _Run(plan, make_table(plan, predicted), predicted, Random(seed))
    for step in range(steps):
        run.step(step)
    spans = sorted(run.spans, key=lambda s: (s.start_s, s.rank))
    return Trace(num_ranks=plan.num_devices, source="measured", spans=tuple(spans)).from_zero()


def slowed(trace: Trace, factor: float) -> Trace:
    """The same trace, all of it `factor` times as long."""
    spans = (replace(s, start_s=s.start_s * factor, end_s=s.end_s * factor) for s in trace)
    return replace(trace, spans=tuple(spans))


class _Run:
    """Runs a plan in its order, a clock for each device."""

    def __init__(self, plan: Plan, table: SliceTable, predicted: Trace, random: Random) -> None:
        self.plan, self.table, self.random = plan, table, random
        self.clock_s = [0.0] * plan.num_devices
        self.spans: list[Span] = []
        self.done_s: dict[tuple[bool, int], float] = {}
        reductions: dict[tuple[str, float], list[Span]] = defaultdict(list)
        for span in predicted:
            if span.kind is SpanKind.REDUCE:
                reductions[span.name, span.start_s].append(span)
        self.reductions = sorted(reductions.values(), key=lambda members: members[0].start_s)

    def step(self, step: int) -> None:
        order = range(len(self.table.slices))
        for task in sorted({metaop.task for metaop in self.plan.metagraph or ()}):
            self.add(0, SpanKind.LOAD, f"LOAD {task}", 1e-4, -1, step)
        for backward in (False, True):
            for index in reversed(order) if backward else order:
                self.slice(index, backward, step)
        for number, members in enumerate(self.reductions):
            for span in members:
                self.add(span.rank, SpanKind.REDUCE, f"REDUCE b{number}", 2e-5, -1, step)
        for number, members in enumerate(self.reductions):
            there_s = max(self.clock_s[s.rank] for s in members) + members[0].end_s - members[0].start_s
            for span in members:
                self.add(span.rank, SpanKind.REDUCE, f"AWAIT b{number}", there_s, -1, step, until=True)
        for rank in range(self.plan.num_devices):
            self.add(rank, SpanKind.STEP, "STEP", 1e-3, -1, step)

    def slice(self, index: int, backward: bool, step: int) -> None:
        ranks = self.table.slices[index].devices
        others = self.table.readers[index] if backward else self.table.feeders[index]
        for other in others:
            if self.table.slices[other].devices != ranks:
                name = f"s{index}<s{other}" if backward else f"s{other}>s{index}"
                for rank in ranks:
                    there_s = self.done_s[backward, other] + 1e-3
                    self.add(rank, SpanKind.TRANSFER, f"AWAIT {name}", there_s, index, step, until=True)
        seconds = (self.table.backward_s if backward else self.table.forward_s)[index] * self.random.uniform(1.0, 1.5)
        kind = SpanKind.BACKWARD if backward else SpanKind.FORWARD
        for rank in ranks:
            self.add(rank, kind, f"{kind.name} s{index}", seconds * self.random.uniform(1.0, 1.02), index, step)
        self.done_s[backward, index] = max(self.clock_s[rank] for rank in ranks)
        for other in self.table.feeders[index] if backward else self.table.readers[index]:
            if self.table.slices[other].devices != ranks:
                name = f"s{other}<s{index}" if backward else f"s{index}>s{other}"
                for rank in ranks:
                    self.add(rank, SpanKind.TRANSFER, f"TRANSFER {name}", 2e-5, other, step)

    def add(
        self, rank: int, kind: SpanKind, name: str, seconds: float, index: int, step: int, *, until: bool = False
    ) -> None:
        """A span of `seconds`, or until that moment."""
        start_s = self.clock_s[rank] + 1e-6
        end_s = max(seconds, start_s) if until else start_s + seconds
        metaop = self.plan.metagraph[self.table.slices[index].metaop] if self.plan.metagraph and index >= 0 else None
        self.spans.append(
            Span(
                rank=rank,
                kind=kind,
                name=name,
                start_s=start_s,
                end_s=end_s,
                task=metaop.task if metaop else name.partition(" ")[2] if kind is SpanKind.LOAD else "",
                component=metaop.component if metaop else "",
                metaop=metaop.name if metaop else "",
                wave=self.table.waves[index] if metaop else -1,
                num_bytes=1000 if kind in (SpanKind.TRANSFER, SpanKind.REDUCE) else 0,
                step=step,
            )
        )
        self.clock_s[rank] = end_s
