"""MetaGraphs to plan: seven families of multi-task multi-modal models over N devices, made from a seed.

    clip       pairs of modality encoders, joined by a contrastive loss
    ofasys     light adaptors into an encoder-decoder language model
    qwenval    vision and audio encoders into a large language model
    vla        two vision encoders, projector, language model, action expert
    unified    encoders of all tasks into one backbone, then decoders
    omni       any-to-any: encoders, language model, generators; heavy-tailed batches
    layered    random layered graphs of unlike operators: adversarial

Layer times come from a small roofline and alpha-beta model of a device; they fall strictly with the count while
count * time does not fall. Counts are powers of two, or divisors of the batch times a tensor-parallel degree ("div").
Traffic and memory are left out unless asked for, as in the tables of gaps to the bound.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from spindle.values.cluster import Cluster, Device, Link
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points

Counts = Literal["pow2", "div"]

PEAK_FLOPS = 312e12
MATMUL_EFFICIENCY = 0.62
MEMORY_BYTES_PER_S = 1.6e12
INTRA_BYTES_PER_S = 180e9
INTER_BYTES_PER_S = 22e9
INTRA_LATENCY_S = 12e-6
INTER_LATENCY_S = 28e-6
LAUNCH_S = 0.35e-3
DEVICE_MEMORY_BYTES = 80e9
ISLAND = 8
GRADIENT_OVERLAP = 0.7  # share of data-parallel traffic that hides behind backward


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: a Transformer block of `hidden` on `tokens`, or a linear layer when `parameters` is given."""

    hidden: int
    tokens: int
    heads: int
    parameters: int = 0

    @property
    def num_parameters(self) -> int:
        return self.parameters or 12 * self.hidden**2

    @property
    def forward_flops(self) -> float:
        """Of one sample."""
        if self.parameters:
            return 2.0 * self.tokens * self.parameters
        return 24.0 * self.tokens * self.hidden**2 + 4.0 * self.tokens**2 * self.hidden


def layer_time_s(layer: Layer, batch: int, data_parallel: int, tensor_parallel: int) -> float:
    """Forward and backward of one layer, whole batch, over data_parallel * tensor_parallel devices."""
    dp, tp, hidden = data_parallel, tensor_parallel, layer.hidden
    local_tokens = batch / dp * layer.tokens
    efficiency = MATMUL_EFFICIENCY * local_tokens / (local_tokens + 700.0) * (hidden / tp) / (hidden / tp + 160.0)
    compute_s = 3 * layer.forward_flops * batch / (dp * tp) / (PEAK_FLOPS * efficiency)
    moved_bytes = 6 * layer.num_parameters / tp + 60 * local_tokens * hidden / tp
    seconds = max(compute_s, moved_bytes / MEMORY_BYTES_PER_S) + LAUNCH_S
    if tp > 1:
        seconds += 4 * (INTRA_LATENCY_S * math.log2(tp) + 4 * (tp - 1) / tp * local_tokens * hidden / INTRA_BYTES_PER_S)
    if dp > 1:
        outside = dp * tp > ISLAND
        rate, latency_s = (INTER_BYTES_PER_S, INTER_LATENCY_S) if outside else (INTRA_BYTES_PER_S, INTRA_LATENCY_S)
        gradient_bytes = 4 * (dp - 1) / dp * layer.num_parameters / tp
        seconds += (1 - GRADIENT_OVERLAP) * gradient_bytes / rate + latency_s * math.log2(dp)
    return seconds


def curve(
    layer: Layer, batch: int, num_layers: int, num_devices: int, counts: Counts, max_tensor_parallel: int
) -> tuple[dict[int, float], dict[int, float]]:
    """(seconds of a layer, bytes per device of the chain) by count."""
    best: dict[int, tuple[float, float]] = {}
    for dp in (d for d in range(1, min(batch, num_devices) + 1) if batch % d == 0):
        for tp in (1, 2, 4, 8):
            n = dp * tp
            if tp > max_tensor_parallel or layer.heads % tp or n > num_devices or (counts == "pow2" and n & (n - 1)):
                continue
            state = layer.num_parameters / tp * (4 + 12 / dp)
            memory = num_layers * (state + 18 * (batch / dp) * layer.tokens * layer.hidden / tp)
            seconds = layer_time_s(layer, batch, dp, tp)
            if memory <= 0.9 * DEVICE_MEMORY_BYTES and (n not in best or seconds < best[n][0]):
                best[n] = (seconds, memory)
    if not best:  # does not fit anywhere: the largest count, with recomputation
        n = 1 << int(math.log2(num_devices))
        tp = max(t for t in (1, 2, 4, 8) if layer.heads % t == 0 and t <= n)
        best[n] = (layer_time_s(layer, max(batch, n // tp), n // tp, tp), 0.9 * DEVICE_MEMORY_BYTES)
    times: dict[int, float] = {}
    memories: dict[int, float] = {}
    last_s, last_area = math.inf, 0.0
    for n in sorted(best):
        seconds = max(best[n][0], last_area / n)  # no super-linear speed-up
        if seconds < last_s * 0.995:
            times[n], memories[n] = seconds, best[n][1]
            last_s, last_area = seconds, seconds * n
    return times, memories


@dataclass
class Builder:
    """Collects MetaOps and flows."""

    num_devices: int
    counts: Counts
    metaops: list[MetaOp] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)

    def add(
        self,
        component: str,
        task: int,
        num_layers: int,
        layer: Layer,
        batch: int,
        *,
        after: Iterable[str] = (),
        max_tensor_parallel: int = 8,
    ) -> str:
        """Add a MetaOp; returns its name."""
        batch = max(1, batch)
        times, memories = curve(layer, batch, num_layers, self.num_devices, self.counts, max_tensor_parallel)
        name = f"t{task}.{component}.{len(self.metaops)}"
        self.metaops.append(
            MetaOp(
                name=name,
                task=f"t{task}",
                component=component,
                layers=num_layers,
                layer_time_s=points(times),
                memory_bytes=points(memories),
                layer_param_bytes=2.0 * layer.num_parameters,
                output_bytes=2.0 * batch * layer.tokens * layer.hidden,
                parameters=component,
            )
        )
        self.flows += [Flow(source, name) for source in after]
        return name


# layers, and the layer itself
ENCODERS: dict[str, tuple[int, Layer]] = {
    "text": (24, Layer(hidden=1024, tokens=77, heads=16)),
    "vision": (32, Layer(hidden=1280, tokens=257, heads=16)),
    "audio": (12, Layer(hidden=768, tokens=229, heads=12)),
    "depth": (12, Layer(hidden=384, tokens=197, heads=8)),
    "thermal": (12, Layer(hidden=768, tokens=197, heads=12)),
    "motion": (6, Layer(hidden=512, tokens=391, heads=8)),
    "video": (24, Layer(hidden=1024, tokens=784, heads=16)),
    "box": (6, Layer(hidden=768, tokens=32, heads=12)),
    "struct": (12, Layer(hidden=768, tokens=160, heads=12)),
    "point": (12, Layer(hidden=384, tokens=512, heads=8)),
}
PAIRS = [
    ("vision", "text"),
    ("audio", "text"),
    ("vision", "audio"),
    ("depth", "text"),
    ("vision", "depth"),
    ("thermal", "text"),
    ("vision", "thermal"),
    ("motion", "text"),
    ("audio", "motion"),
    ("vision", "motion"),
    ("video", "text"),
    ("video", "audio"),
    ("depth", "audio"),
    ("thermal", "depth"),
    ("video", "motion"),
]
OFASYS_INPUTS: list[tuple[str, ...]] = [
    ("vision", "text"),
    ("text",),
    ("audio", "text"),
    ("video", "text"),
    ("vision", "box"),
    ("struct", "text"),
    ("motion", "text"),
    ("audio",),
    ("vision",),
    ("text", "struct", "vision"),
]


def task_batch(rng: random.Random, b: Builder, base: float, spread: float = 1.0) -> int:
    """Global batch of a task: grows with N^0.75; a power of two, or 3 * 2^k where counts are divisors."""
    wanted = base * (b.num_devices / 8) ** 0.75 * 2 ** rng.uniform(-spread, spread)
    batch = 2 ** max(0, round(math.log2(wanted)))
    if b.counts == "div":
        near = [c for c in (batch // 2, batch * 3 // 4, batch, batch * 3 // 2) if c >= 1]
        batch = min(near, key=lambda c: abs(math.log(c / wanted)))
    return max(4, int(batch))


def clip(b: Builder, tasks: int, rng: random.Random) -> None:
    for task in range(tasks):
        pair = PAIRS[task] if task < len(PAIRS) else rng.choice(PAIRS)
        batch = task_batch(rng, b, 192)
        encoders = [b.add(kind, task, *ENCODERS[kind], batch) for kind in pair]
        loss = Layer(hidden=1024, tokens=8, heads=16, parameters=2 * 1024**2)
        b.add("contrast", task, 1, loss, batch, after=encoders, max_tensor_parallel=1)


def ofasys(b: Builder, tasks: int, rng: random.Random) -> None:
    for task in range(tasks):
        inputs = OFASYS_INPUTS[task] if task < len(OFASYS_INPUTS) else rng.choice(OFASYS_INPUTS)
        batch = task_batch(rng, b, 128, 1.2)
        adaptors, tokens = [], 0
        for kind in inputs:
            num_layers, layer = ENCODERS[kind]
            tokens += layer.tokens
            adaptors.append(b.add(f"adaptor-{kind}", task, max(1, num_layers // 4), layer, batch))
        encoder = b.add(
            "lm-encoder", task, 24, Layer(hidden=1024, tokens=min(1024, tokens), heads=16), batch, after=adaptors
        )
        words = rng.choice((32, 64, 128, 256))
        b.add("lm-decoder", task, 24, Layer(hidden=1024, tokens=words, heads=16), batch, after=[encoder])


def qwenval(b: Builder, tasks: int, rng: random.Random) -> None:
    sizes = ((32, 4096, 32), (48, 6656, 52), (80, 8192, 64))
    num_layers, hidden, heads = sizes[0 if b.num_devices < 64 else 1 if b.num_devices < 512 else 2]
    combinations = ["v", "a", "va", ""]
    for task in range(tasks):
        inputs = combinations[task % 4] if task < 3 else rng.choice(combinations)
        batch = task_batch(rng, b, 24, 0.8)
        encoders, tokens = [], rng.choice((128, 256, 512))
        if "v" in inputs:
            encoders.append(b.add("vit", task, 48, Layer(hidden=1664, tokens=1024, heads=16), batch))
            tokens += 256
        if "a" in inputs:
            encoders.append(b.add("whisper", task, 32, Layer(hidden=1280, tokens=1500, heads=20), batch))
            tokens += 375
        if encoders:
            projector = Layer(hidden=hidden, tokens=tokens, heads=heads, parameters=2 * hidden**2)
            encoders = [b.add("projector", task, 1, projector, batch, after=encoders)]
        b.add("llm", task, num_layers, Layer(hidden=hidden, tokens=tokens, heads=heads), batch, after=encoders)


def vla(b: Builder, tasks: int, rng: random.Random) -> None:
    for task in range(tasks):
        batch = task_batch(rng, b, 48, 1.2)
        cameras = rng.choice((1, 2, 3))
        encoders = [
            b.add("siglip", task, 27, Layer(hidden=1152, tokens=256 * cameras, heads=16), batch),
            b.add("dino", task, 24, Layer(hidden=1024, tokens=261 * cameras, heads=16), batch),
        ]
        if rng.random() < 0.6:
            encoders.append(b.add("proprio", task, 4, Layer(hidden=512, tokens=16, heads=8), batch))
        linear = Layer(hidden=2048, tokens=256 * cameras, heads=16, parameters=2 * 2048**2)
        projector = b.add("projector", task, 1, linear, batch, after=encoders)
        llm = b.add("llm", task, 18, Layer(hidden=2048, tokens=256 * cameras + 64, heads=16), batch, after=[projector])
        actions = Layer(hidden=1024, tokens=rng.choice((16, 50)), heads=8)
        b.add("action", task, 18, actions, batch, after=[llm])


def unified(b: Builder, tasks: int, rng: random.Random) -> None:
    kinds = list(ENCODERS)
    encoders, batches, tokens = [], [], 0
    for task in range(tasks):
        kind = kinds[task % len(kinds)] if task < len(kinds) else rng.choice(kinds)
        batch = task_batch(rng, b, 64)
        batches.append(batch)
        tokens += batch * min(256, ENCODERS[kind][1].tokens)
        encoders.append(b.add(kind, task, *ENCODERS[kind], batch))
    batch = max(8, 2 ** round(math.log2(max(1, tokens / 512))))
    backbone = b.add("backbone", -1, 24, Layer(hidden=2048, tokens=512, heads=16), batch, after=encoders)
    for task in range(tasks):
        if rng.random() < 0.6:
            num_layers = rng.choice((4, 8, 12))
            decoder = Layer(hidden=rng.choice((768, 1024)), tokens=rng.choice((64, 256)), heads=8)
            b.add("decoder", task, num_layers, decoder, batches[task], after=[backbone])


def omni(b: Builder, tasks: int, rng: random.Random) -> None:
    for task in range(tasks):
        batch = task_batch(rng, b, 40, 2.0)
        encoders, tokens = [], 128
        for kind in rng.sample(["vision", "audio", "video", "text", "point"], rng.randint(1, 3)):
            tokens += ENCODERS[kind][1].tokens // 2
            encoders.append(b.add(kind, task, *ENCODERS[kind], batch))
        llm = b.add("llm", task, 28, Layer(hidden=3072, tokens=tokens, heads=24), batch, after=encoders)
        for kind in rng.sample(["img", "aud"], rng.randint(0, 2)):
            num_layers, hidden, length = {"img": (28, 1152, 1024), "aud": (12, 1024, 500)}[kind]
            generator = Layer(hidden=hidden, tokens=length, heads=16)
            b.add(f"generator-{kind}", task, num_layers, generator, batch, after=[llm])


def layered(b: Builder, tasks: int, rng: random.Random) -> None:
    before: list[str] = []
    depth = rng.randint(3, 6)
    for level in range(depth):
        made: list[str] = []
        for _ in range(max(1, round(tasks * 3 / depth * rng.uniform(0.5, 1.5)))):
            num_layers = rng.choice((1, 2, 3, 6, 12, 24, 48))
            hidden = rng.choice((384, 768, 1024, 2048, 4096))
            tokens = rng.choice((32, 77, 256, 512, 1024))
            batch = task_batch(rng, b, 48 * 1024 * 256 / (hidden * tokens))
            many = min(len(before), rng.randint(0 if level > 1 else 1, 3)) if before else 0
            layer = Layer(hidden=hidden, tokens=tokens, heads=8)
            after = rng.sample(before, many)
            made.append(b.add(f"r{level}-{len(made)}", level, num_layers, layer, batch, after=after))
        before = made if level == 0 else before[-2:] + made


FAMILIES: dict[str, Callable[[Builder, int, random.Random], None]] = {
    "clip": clip,
    "ofasys": ofasys,
    "qwenval": qwenval,
    "vla": vla,
    "unified": unified,
    "omni": omni,
    "layered": layered,
}


@dataclass(frozen=True, slots=True)
class Instance:
    """One row of a benchmark table."""

    family: str
    tasks: int
    num_devices: int
    seed: int = 0
    counts: Counts = "pow2"

    @property
    def name(self) -> str:
        suffix = "" if self.counts == "pow2" else "-div"
        seed = f"-s{self.seed}" if self.seed else ""
        return f"{self.family}-{self.tasks}-N{self.num_devices}{suffix}{seed}"

    def metagraph(self, *, traffic: bool = False, memory: bool = False) -> MetaGraph:
        """The MetaGraph; without activations' and parameters' bytes, or memory, unless asked for."""
        b = Builder(self.num_devices, self.counts)
        FAMILIES[self.family](b, self.tasks, random.Random(self.seed))
        metaops = tuple(_stripped(m, traffic=traffic, memory=memory) for m in b.metaops)
        return MetaGraph(metaops, tuple(b.flows))

    def cluster(self, *, islands: bool = False) -> Cluster:
        """Nodes of eight devices, or one node of all.

        Links are set so that moving an activation forward and its gradient back costs together what one transfer at 180
        (between nodes 20) GB/s with 30 microseconds of latency does.
        """
        per_node = min(ISLAND, self.num_devices) if islands else self.num_devices
        device = Device(
            name="bench", memory_bytes=DEVICE_MEMORY_BYTES, peak_flops=PEAK_FLOPS, memory_bytes_per_s=MEMORY_BYTES_PER_S
        )
        return Cluster(
            nodes=self.num_devices // per_node,
            devices_per_node=per_node,
            device=device,
            intra_node=Link(bytes_per_s=360e9, latency_s=15e-6),
            inter_node=Link(bytes_per_s=40e9, latency_s=15e-6),
        )


def _stripped(metaop: MetaOp, *, traffic: bool, memory: bool) -> MetaOp:
    if not traffic:
        metaop = replace(metaop, output_bytes=0.0, layer_param_bytes=0.0)
    return metaop if memory else replace(metaop, memory_bytes=())


def suite() -> list[Instance]:
    """The 45 instances of the tables."""
    rows: list[Instance] = []
    for n in (8, 16, 32, 64):
        rows += [Instance("clip", tasks, n) for tasks in (4, 10)]
        rows += [Instance("ofasys", tasks, n) for tasks in (4, 7)]
        rows += [Instance("vla", 6, n)]
    rows += [Instance("qwenval", 3, n) for n in (16, 32, 64, 256)]
    rows += [Instance("unified", 8, n) for n in (16, 64, 256)]
    rows += [Instance("omni", 12, n) for n in (32, 64, 256)]
    rows += [Instance("layered", 6, n) for n in (16, 64)]
    rows += [Instance("clip", 10, n, 1, "div") for n in (16, 32, 64)]
    rows += [Instance("vla", 6, 32, 1, "div"), Instance("ofasys", 7, 64, 1, "div")]
    rows += [Instance("clip", 30, 256), Instance("vla", 30, 256), Instance("omni", 60, 256)]
    rows += [Instance("clip", 60, 1024), Instance("ofasys", 60, 1024), Instance("omni", 60, 1024)]
    rows += [Instance("qwenval", 12, 1024), Instance("vla", 60, 1024)]
    return rows
