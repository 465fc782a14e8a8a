"""CostOptions: valid counts, measured points, interpolation, and what the analytic model must never do."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from spindle.cost.memory import state_bytes
from spindle.cost.metaops import with_costs
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.cluster import Cluster
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import LoadEntry, Profile, ProfileEntry

SPEC = """
format: spindle.workload
version: 1
name: towers
components:
  image: {layers: 4, hidden: 256, heads: 4, tokens: 64, input_features: 48, output_tokens: 1, output_features: 32}
  text: {layers: 3, hidden: 128, heads: 2, tokens: 16, vocab: 100, output_tokens: 1, output_features: 32}
tasks:
  pair: {batch_size: 12, flow: [[image, text]], loss: contrastive}
"""


@pytest.fixture(scope="module")
def metagraph() -> MetaGraph:
    return contract(build_graph(parse_workload(SPEC)))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return parse_cluster("2x4:a100-80g")


def test_counts_divide_the_batch(metagraph: MetaGraph, cluster: Cluster) -> None:
    costed = with_costs(metagraph, cluster)
    assert tuple(costed["pair.image"].times) == (1, 2, 3, 4, 6)
    assert tuple(costed["pair.loss"].times) == (1,)
    assert tuple(costed["pair.image"].memory) == (1, 2, 3, 4, 6)


def test_tensor_parallel_adds_counts_inside_a_node(metagraph: MetaGraph, cluster: Cluster) -> None:
    costed = with_costs(metagraph, cluster, cost_options=CostOptions(tensor_parallel=4))
    assert tuple(costed["pair.image"].times) == (1, 2, 3, 4, 6, 8)
    plain = with_costs(metagraph, cluster)["pair.image"].times
    assert all(costed["pair.image"].times[n] <= plain[n] for n in plain)


def test_a_least_degree_saves_memory(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Every layer is then divided; what mixes samples still runs on one device."""
    divided = with_costs(metagraph, cluster, cost_options=CostOptions(tensor_parallel=4, min_tensor_parallel=4))
    assert tuple(divided["pair.image"].times) == (4, 8)
    assert tuple(divided["pair.loss"].times) == (1,)
    whole = with_costs(metagraph, cluster)["pair.image"]
    assert divided["pair.image"].memory[4] < whole.memory[4]
    assert divided["pair.image"].layer_state_bytes == pytest.approx(whole.layer_state_bytes / 4)


def test_more_work_takes_longer(cluster: Cluster) -> None:
    small = contract(build_graph(parse_workload(SPEC.replace("batch_size: 12", "batch_size: 1200"))))
    large = contract(build_graph(parse_workload(SPEC.replace("batch_size: 12", "batch_size: 2400"))))
    for n in (1, 2, 4):
        assert with_costs(large, cluster)["pair.image"].times[n] > with_costs(small, cluster)["pair.image"].times[n]


def test_time_falls_with_devices_and_device_time_rises(cluster: Cluster) -> None:
    heavy = SPEC.replace("tokens: 64", "tokens: 1024").replace("batch_size: 12", "batch_size: 48")
    times = with_costs(contract(build_graph(parse_workload(heavy))), cluster)["pair.image"].layer_time_s
    for (few, slow), (many, fast) in pairwise(times):
        assert fast < slow
        assert many * fast >= few * slow * (1 - 1e-9)


def test_measured_counts_are_taken_as_they_are(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Non-monotone points stay; between measured counts T = a + b/n; outside the prediction's ratio is kept."""
    kind = metagraph["pair.image"].operators[0].kind
    entries = tuple(
        ProfileEntry(kind=kind, num_devices=n, forward_s=f, backward_s=2 * f) for n, f in ((1, 0.4), (3, 0.2), (4, 0.3))
    )
    times = with_costs(metagraph, cluster, Profile("test", entries=entries))["pair.image"].times
    predicted = with_costs(metagraph, cluster)["pair.image"].times
    assert (times[1], times[3], times[4]) == pytest.approx((1.2, 0.6, 0.9))
    b = (1.2 - 0.6) / (1 - 1 / 3)
    assert times[2] == pytest.approx((1.2 - b) + b / 2)
    assert times[6] / times[4] == pytest.approx(predicted[6] / predicted[4])


@pytest.mark.parametrize(("cut_s", "degree", "total_s"), [(0.1, 2, 0.3), (0.3, 1, 0.6)])
def test_a_count_takes_the_quickest_layout_that_was_measured(
    metagraph: MetaGraph, cluster: Cluster, cut_s: float, degree: int, total_s: float
) -> None:
    """Two devices with a copy each, 0.2 s forward, or with one copy between them."""
    kind = metagraph["pair.image"].operators[0].kind
    entries = [
        ProfileEntry(kind=kind, num_devices=2, forward_s=f, backward_s=2 * f, tensor_parallel=tp)
        for tp, f in ((1, 0.2), (2, cut_s))
    ]
    costed = with_costs(metagraph, cluster, Profile("test", entries=tuple(entries)), CostOptions(tensor_parallel=2))
    assert costed["pair.image"].times[2] == pytest.approx(total_s)
    assert dict(costed["pair.image"].tensor_parallel).get(2, 1) == degree


def test_a_layout_that_is_not_allowed_is_not_taken(metagraph: MetaGraph, cluster: Cluster) -> None:
    kind = metagraph["pair.image"].operators[0].kind
    cut = ProfileEntry(kind=kind, num_devices=2, forward_s=1e-9, backward_s=1e-9, tensor_parallel=2)
    costed = with_costs(metagraph, cluster, Profile("test", entries=(cut,)))
    assert costed["pair.image"].times == with_costs(metagraph, cluster)["pair.image"].times


def test_what_reads_a_batch_is_charged_its_loader(metagraph: MetaGraph, cluster: Cluster) -> None:
    """By task and batch size; what reads none, or another task or size, is not."""
    metaop = metagraph["pair.image"]
    reading = tuple(replace(op, batch_fields=("pixels",)) for op in metaop.operators)
    read = MetaGraph(tuple(replace(m, operators=reading) if m is metaop else m for m in metagraph), metagraph.flows)
    size = metaop.operators[0].batch_size
    others = (
        LoadEntry(task="pair", batch_size=2 * size, seconds=1.0),
        LoadEntry(task="x", batch_size=size, seconds=2.0),
    )
    assert not any(m.load_s for m in with_costs(read, cluster, Profile("t", loads=others)))
    loads = (LoadEntry(task="pair", batch_size=size, seconds=0.5), *others)
    found = {m.name: m.load_s for m in with_costs(read, cluster, Profile("t", loads=loads)) if m.load_s}
    assert found == {"pair.image": 0.5}


def test_micro_batches_load_a_batch_each(metagraph: MetaGraph, cluster: Cluster) -> None:
    metaop = metagraph["pair.image"]
    reading = tuple(replace(op, task="pair#1", batch_fields=("pixels",)) for op in metaop.operators)
    loads = (LoadEntry(task="pair", batch_size=reading[0].batch_size, seconds=0.5),)
    part = MetaGraph((replace(metaop, task="pair#1", operators=reading),))
    assert with_costs(part, cluster, Profile("t", loads=loads))["pair.image"].load_s == 0.5


def test_recompute_takes_the_forward_that_keeps_nothing(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Twice, where it was measured; else forward twice."""
    kind = metagraph["pair.image"].operators[0].kind
    for bare_s, total_s in ((0.25, 0.25 + 1.0 + 0.25), (0.0, 0.5 + 1.0 + 0.5)):
        entry = ProfileEntry(kind=kind, num_devices=1, forward_s=0.5, backward_s=1.0, bare_forward_s=bare_s)
        profile = Profile("t", entries=(entry,))
        again = with_costs(metagraph, cluster, profile, CostOptions(recompute=True))["pair.image"]
        assert again.times[1] == pytest.approx(total_s)
        assert again.forward_fraction == pytest.approx((bare_s or 0.5) / total_s)
        assert with_costs(metagraph, cluster, profile)["pair.image"].times[1] == pytest.approx(1.5)


def test_sharded_states_are_told_and_updates_left_whole(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Who divides an update is known by plan."""
    plain, sharded = (
        with_costs(metagraph, cluster),
        with_costs(metagraph, cluster, cost_options=CostOptions(shard_optimizer=True)),
    )
    assert (plain.shard_optimizer, sharded.shard_optimizer) == (False, True)
    assert [m.layer_update_s for m in sharded] == [m.layer_update_s for m in plain]


def test_forward_fraction_is_measured(metagraph: MetaGraph, cluster: Cluster) -> None:
    kind = metagraph["pair.text"].operators[0].kind
    entry = ProfileEntry(kind=kind, num_devices=1, forward_s=0.1, backward_s=0.4)
    assert with_costs(metagraph, cluster, Profile("t", entries=(entry,)))[
        "pair.text"
    ].forward_fraction == pytest.approx(0.2)


def test_frozen_layers_have_no_backward_and_no_gradients_to_reduce(cluster: Cluster) -> None:
    spec = SPEC.replace("image: {layers: 4", "image: {trained: none, layers: 4")
    frozen = with_costs(contract(build_graph(parse_workload(spec))), cluster)["pair.image"]
    assert frozen.forward_fraction == 1.0
    assert frozen.layer_param_bytes == 0.0


def test_lookups_have_a_backward_only_where_a_gradient_comes_back(cluster: Cluster) -> None:
    """The table's dense gradient is written whatever the local batch; a forward-only task writes none."""
    wide = SPEC.replace("vocab: 100", "vocab: 100000")
    trained = with_costs(contract(build_graph(parse_workload(wide))), cluster)["pair.text.embed"]
    teacher = wide.replace("loss: contrastive", "loss: contrastive, forward_only: true")
    idle = with_costs(contract(build_graph(parse_workload(teacher))), cluster)["pair.text.embed"]
    assert idle.forward_fraction == 1.0
    written = 2 * 100_000 * 128 * 2 / cluster.device.memory_bytes_per_s
    assert trained.times[6] > written > idle.times[1]


def test_memory_counts_what_a_step_holds(cluster: Cluster) -> None:
    """Sixteen-bit training with Adam: 2 + 2 + 12 bytes a parameter, sharded ones divided, activations by devices."""
    metagraph = contract(build_graph(parse_workload(SPEC)))
    text = metagraph["pair.text"]
    parameters = sum(p.num_bytes // 2 for op in text.operators for p in op.parameters)
    kept = sum(op.activation_bytes for op in text.operators)
    boundary = 2 * max(op.output_bytes for op in text.operators)
    whole = with_costs(metagraph, cluster)["pair.text"].memory
    sharded = with_costs(metagraph, cluster, cost_options=CostOptions(shard_optimizer=True))["pair.text"].memory
    plain_sgd = with_costs(metagraph, cluster, cost_options=CostOptions(optimizer="sgd"))["pair.text"].memory
    for n in (1, 2, 4):
        assert whole[n] == pytest.approx(16 * parameters + (kept + boundary) / n)
        assert sharded[n] == pytest.approx((4 + 12 / n) * parameters + (kept + boundary) / n)
        assert plain_sgd[n] == pytest.approx(8 * parameters + (kept + boundary) / n)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("degrees", [(1, 1), (4, 1), (4, 4)])
def test_what_waits_for_backward_is_told_apart_from_states(
    metagraph: MetaGraph, cluster: Cluster, shard: bool, recompute: bool, degrees: tuple[int, int]
) -> None:
    """On any number of devices at least the states remain, and they alone where no layer is spread over devices."""
    most, least = degrees
    cost_options = CostOptions(
        shard_optimizer=shard, recompute=recompute, tensor_parallel=most, min_tensor_parallel=least
    )
    image = with_costs(metagraph, cluster, cost_options=cost_options)["pair.image"]
    fixed, spread = state_bytes(image.operators, cost_options)
    parts = dict(image.tensor_parallel)
    for n, num_bytes in image.memory.items():
        states = (fixed + (spread * parts.get(n, 1) / n if shard else spread)) / parts.get(n, 1)
        left = num_bytes - (image.kept_bytes + image.recomputed_bytes) / n
        assert left >= states * (1 - 1e-9)
        if most == 1:
            assert left == pytest.approx(states)
    assert image.kept_bytes > 0


def test_metaops_from_a_file_keep_their_costs(metagraph: MetaGraph, cluster: Cluster) -> None:
    from spindle.values.plan import without_operators

    costed = without_operators(with_costs(metagraph, cluster))
    assert with_costs(costed, cluster) == costed


def test_cost_options_loads_no_torch_and_no_ray() -> None:
    code = (
        "import sys, spindle.spec.file, spindle.spec.graph, spindle.values.contract, spindle.cost.metaops; "
        "print(sorted({'torch', 'ray', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
