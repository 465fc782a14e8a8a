"""Random values of every file format, as wild as their rules allow."""

from dataclasses import replace

from hypothesis import strategies as st

from spindle.values.calibration import CONSTANTS, Calibration, MeasuredStep
from spindle.values.cluster import Cluster, Device, Link, Protocol
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.outlook import Gain, Moves, Outlook
from spindle.values.plan import (
    Alternative,
    Certificate,
    Memory,
    Plan,
    SizeRange,
    Slice,
    StepSpread,
    StepWork,
    TimePrices,
    make_waves,
)
from spindle.values.profile import LinkEntry, LoadEntry, Profile, ProfileEntry
from spindle.values.trace import Span, SpanKind, Trace

text = st.text(st.characters(categories=["L", "N", "P"], include_characters=" "), min_size=1, max_size=8)
amounts = st.floats(0, 1e18, allow_subnormal=False)
seconds = st.floats(1e-9, 1e6)
durations = st.floats(0, 1e8, allow_subnormal=False)
counts = st.integers(1, 4096)


@st.composite
def metagraphs(draw: st.DrawFn) -> MetaGraph:
    """Up to five MetaOps of any names, costs and memory, with flows that carry a given or a default number of bytes."""
    names = draw(st.lists(text, min_size=1, max_size=5, unique=True))
    metaops = tuple(
        MetaOp(
            name=name,
            task=draw(text),
            component=draw(text),
            layers=draw(counts),
            layer_time_s=points(draw(st.dictionaries(counts, seconds, min_size=1, max_size=4))),
            memory_bytes=points(draw(st.dictionaries(counts, amounts, max_size=4))),
            layer_param_bytes=draw(amounts),
            layer_state_bytes=draw(amounts),
            kept_bytes=draw(amounts),
            gathered_bytes=draw(amounts),
            load_s=draw(durations),
            output_bytes=draw(amounts),
            parameters=draw(st.one_of(st.just(""), text)),
            forward_fraction=draw(st.floats(0, 1)),
        )
        for name in names
    )
    pairs = [(a, b) for i, b in enumerate(names) for a in names[:i] if draw(st.booleans())]
    flows = tuple(Flow(a, b, draw(st.one_of(st.none(), amounts))) for a, b in pairs)
    return MetaGraph(metaops, flows, shard_optimizer=draw(st.booleans()))


time_prices = st.builds(
    lambda price, waits: TimePrices(edges_s=(0.0, 1.0), device_prices=(price,), wait_prices=waits),
    seconds,
    st.lists(st.tuples(text, text, st.tuples(amounts)), max_size=2).map(tuple),
)

certificates: st.SearchStrategy[Certificate] = st.recursive(
    st.builds(
        Certificate,
        area_price=amounts,
        paths=st.lists(st.tuples(amounts, st.lists(text, max_size=3).map(tuple)), max_size=2).map(tuple),
        over_time=st.one_of(st.none(), time_prices),
    ),
    lambda inner: st.builds(
        Certificate, through=text, head=st.one_of(st.none(), inner), tail=st.one_of(st.none(), inner)
    ),
    max_leaves=4,
)

protocols = st.builds(
    Protocol,
    latency_s=durations,
    hop_s=durations,
    bytes_per_s=seconds,
    in_network=st.booleans(),
    operation=st.sampled_from((None, "all_reduce", "broadcast")),
)
links = st.builds(
    Link,
    bytes_per_s=seconds,
    latency_s=durations,
    protocols=st.lists(protocols, max_size=2).map(tuple),
    node_bytes_per_s=st.one_of(st.none(), seconds),
)
devices = st.builds(
    Device,
    name=text,
    memory_bytes=seconds,
    peak_flops=seconds,
    memory_bytes_per_s=seconds,
    launch_s=durations,
    eager_traffic=amounts,
    kernels_per_matmul=amounts,
    full_float32_rate=seconds,
    parallel_units=counts,
)
clusters = st.builds(
    Cluster, nodes=st.integers(1, 256), devices_per_node=counts, device=devices, intra_node=links, inter_node=links
)

slices = st.builds(
    lambda metaop, first, layers, devices, start, span: Slice(
        metaop=metaop,
        first_layer=first,
        num_layers=layers,
        devices=tuple(sorted(devices)),
        start_s=start,
        end_s=start + span,
    ),
    text,
    st.integers(0, 100),
    counts,
    st.sets(st.integers(0, 31), min_size=1, max_size=4),
    seconds,
    durations,
)

named_times = st.dictionaries(text, durations, max_size=3).map(lambda values: tuple(sorted(values.items())))

size_ranges = st.builds(
    lambda task, field, sizes: SizeRange(task=task, field=field, least=min(sizes), most=max(sizes)),
    text,
    text,
    st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
)
spreads = st.builds(
    lambda steps, mean, ends: StepSpread(steps=steps, mean_s=mean, p10_s=min(ends), p90_s=max(ends)),
    counts,
    durations,
    st.tuples(durations, durations),
)

shares = st.floats(-2, 0.99)
moves = st.builds(
    Moves,
    name=st.sampled_from(("host", "network", "batch")),
    half=st.one_of(st.none(), shares),
    as_is=shares,
    double=st.one_of(st.none(), shares),
)
gains = st.builds(
    lambda baseline, ends, proof, found: Gain(
        baseline=baseline, low=min(ends), share=sorted(ends)[1], high=max(ends), proof=proof, moves=found
    ),
    text,
    st.tuples(shares, shares, shares),
    st.sampled_from(("", "profile", "batches", "devices", "runs")),
    st.lists(moves, max_size=3).map(tuple),
)
outlooks = st.builds(
    lambda source, ends, gain: Outlook(source=source, low_s=min(ends), high_s=max(ends), gain=gain),
    text,
    st.tuples(durations, durations),
    st.one_of(st.none(), gains),
)
constants = st.sampled_from(CONSTANTS)
measured_steps = st.builds(MeasuredStep, gpus=counts, per_gpu_batch=counts, seconds=seconds, predicted_s=durations)
calibrations = st.builds(
    Calibration,
    device=text,
    compute=seconds,
    host=seconds,
    network=seconds,
    step_s=durations,
    source=text,
    method=text,
    rows=st.lists(measured_steps, max_size=3).map(tuple),
    undetermined=st.lists(constants, max_size=2).map(tuple),
    inseparable=st.lists(st.tuples(constants, constants), max_size=2).map(tuple),
)

plans_at_once = st.builds(
    Plan,
    num_devices=counts,
    devices_per_node=counts,
    method=text,
    waves=st.lists(slices, min_size=1, max_size=5).map(make_waves),
    makespan_s=durations,
    lower_bound_s=durations,
    planner_s=durations,
    baselines_s=named_times,
    reduction_s=durations,
    step_s=durations,
    baseline_steps_s=named_times,
    memory=st.builds(Memory, peak_bytes_per_device=st.lists(amounts, max_size=4).map(tuple), fits=st.booleans()),
    certificate=st.one_of(st.none(), certificates),
    metagraph=st.one_of(st.none(), metagraphs()),
    cluster=st.one_of(st.none(), clusters),
    spread=st.one_of(st.none(), spreads),
    sizes=st.lists(size_ranges, max_size=3).map(tuple),
    shard_parameters=st.lists(text, max_size=2).map(tuple),
    alternatives=st.lists(
        st.builds(
            Alternative,
            name=text,
            step_s=seconds,
            choice=text,
            peak_bytes=amounts,
            fits=st.booleans(),
            recompute=st.booleans(),
            shard_optimizer=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    work=st.one_of(st.none(), st.builds(StepWork, samples=amounts, tokens=amounts, flops=amounts)),
    fixed_s=durations,
    outlook=st.one_of(st.none(), outlooks),
)


def in_turns(plan: Plan, after: int) -> Plan:
    """The plan in two turns, the first of so many tasks or fewer, where it carries several tasks."""
    tasks = plan.metagraph.tasks if plan.metagraph else ()
    cut = min(after, len(tasks) - 1)
    return replace(plan, turns=(tasks[:cut], tasks[cut:])) if cut > 0 else plan


plans = st.builds(in_turns, plans_at_once, st.integers(0, 4))

profiles = st.builds(
    Profile,
    text,
    st.dictionaries(text, text, max_size=3).map(lambda values: tuple(sorted(values.items()))),
    st.lists(
        st.builds(
            ProfileEntry,
            kind=text,
            num_devices=counts,
            forward_s=seconds,
            backward_s=durations,
            peak_bytes=amounts,
            bare_forward_s=durations,
            update_s=durations,
            family=text,
            size=amounts,
        ),
        max_size=4,
    ).map(tuple),
    st.lists(
        st.builds(
            LinkEntry,
            operation=st.sampled_from(("all_reduce", "transfer")),
            level=st.sampled_from(("intra_node", "inter_node")),
            members=st.integers(2, 64),
            num_bytes=counts,
            seconds=seconds,
        ),
        max_size=3,
    ).map(tuple),
    st.lists(st.builds(LoadEntry, task=text, batch_size=counts, seconds=seconds, spread=amounts), max_size=3).map(
        tuple
    ),
)

traces = st.builds(
    lambda ranks, source, peaks, spans: Trace(
        num_ranks=ranks, source=source, spans=tuple(spans), peak_bytes=tuple(peaks)
    ),
    st.just(8),
    text,
    st.one_of(st.just([]), st.lists(counts, min_size=8, max_size=8)),
    st.lists(
        st.builds(
            lambda rank, kind, name, start, length, names, wave, num_bytes, step: Span(
                rank=rank,
                kind=kind,
                name=name,
                start_s=start,
                end_s=start + length,
                task=names[0],
                component=names[1],
                metaop=names[2],
                wave=wave,
                num_bytes=num_bytes,
                step=step,
            ),
            st.integers(0, 7),
            st.sampled_from(SpanKind),
            text,
            st.floats(-1e6, 1e6),
            durations,
            st.tuples(text, text, text),
            st.integers(-1, 100),
            st.integers(0, 2**40),
            st.integers(0, 1000),
        ),
        max_size=5,
    ),
)
