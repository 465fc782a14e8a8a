"""Roofline: one operator, a device and a share of the batch in, seconds of its forward and backward out.

- Matrix products run at `matmul_efficiency` of the peak when their result has many tiles; a result of few tiles leaves
  units idle (`TILE`, `TAIL`), and every product reads its weights once, so small local batches are slow.
- What stands between the products (norms, activations, residuals, casts) is bound by memory: it moves the products'
  inputs and outputs `elementwise_traffic` times. Its share grows as matrices get narrow: one efficiency for all sizes
  would be off by a factor of four between a layer of a language model and one of a small encoder.
- Attention scores run at `attention_efficiency`; a causal kernel skips half of them.
- Backward repeats the products as often as its FLOPs say: twice, once where only the input gradient is due (frozen),
  not at all where nothing before it is trained; recomputing activations adds a forward.
- Each operator starts a number of kernels, and each takes `launch_s` besides its work: its start on the device, and on
  the host where the device waits for it. Narrow layers on small local batches take little else.

The constants are the device's (spindle.values.cluster.Device), as the program runs on it (spindle.values.execution);
docs/cost-model.md says what each was fitted on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from spindle.values.cluster import Device
from spindle.values.execution import USUAL, Execution, writes_scores
from spindle.values.graph import BYTES_BY_DTYPE, Operator

TILE = 128  # rows and columns of a result that one unit computes at a time (cuBLAS's and CUTLASS's usual choice)
TAIL = 0.25  # of a round of tiles is lost on average in the last round, partly hidden by smaller tiles and split sums
SCORE_PASSES = 12.0
"""Passes of forward over scores that plain attention writes to memory: fitted on half of the step times of
benchmarks/data/alephalpha_llama_a100_layouts.csv."""
USUAL_HEAD = 64  # width of a head where the kind does not say
_HEADS, _CONTEXT, _TOKENS = (re.compile(text) for text in (r"a\d+/\d+x\d+", r"separate\d+", r"t\d+x\d+"))
ATTENTION_BACKWARD = 2.5  # five products where forward has two (Dao et al. 2022)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one operator does on the whole batch.

    matmuls        (rows, wide, narrow) of each matrix product in forward; FLOPs are 2 * rows * wide * narrow
    attention_flops   of forward: scores and weighted sums that are computed (half of all under a causal mask)
    passes         how often backward repeats the products of forward: 2 trained, 1 frozen, 0 none
    recompute      forward runs once more before backward
    moved_bytes    read and written by forward besides the products' operands (a lookup's rows)
    score_bytes    the same of attention scores that are written to memory; tensor parallelism divides them
    update_bytes   written by backward however small the local batch (a lookup table's dense gradient)
    """

    matmuls: tuple[tuple[float, int, int], ...] = ()
    attention_flops: float = 0.0
    passes: float = 2.0
    recompute: bool = False
    moved_bytes: float = 0.0
    score_bytes: float = 0.0
    update_bytes: float = 0.0
    itemsize: int = 2


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """Seconds of one operator on each device that runs its share."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def operator_work(operator: Operator, rows: float, *, recompute: bool = False, execution: Execution = USUAL) -> Work:
    """Shapes and bytes of an operator; `rows` is how many rows of the whole batch its matrices multiply at most.

    An operator knows its parameters and its FLOPs, not which multiplies what: each matrix is taken to multiply `rows`
    rows, or fewer when the FLOPs do not allow that many; what is left are attention scores. The kinds of a workload
    spec say whether they are causal, and how many passes they make (`r3`).
    """
    words = operator.kind.split()
    repeats = _repeats(operator)
    matrices = _matrices(operator)
    used, linear = _multiplied(operator, matrices, rows, repeats)
    scores = max(operator.forward_flops - linear, 0.0)
    lookup = not operator.forward_flops
    # weights of fewer bits are unpacked to sixteen before they are multiplied
    itemsize = max(BYTES_BY_DTYPE.get(operator.parameters[0].dtype, 2), 2) if operator.parameters else 4
    plain = writes_scores(execution)
    passes_over = SCORE_PASSES * (0.5 if execution.attention == "fused_softmax" else 1.0)
    passes = _passes(operator, linear, scores)
    trainable = [p for p in operator.parameters if p.trainable and passes]
    return Work(
        matmuls=tuple((used * share, shape[0], prod(shape[1:])) for shape, share in matrices) * repeats if used else (),
        attention_flops=scores * (0.5 if "causal" in words and not plain else 1.0),
        passes=passes,
        recompute=recompute,
        moved_bytes=float(operator.input_bytes + operator.output_bytes) if lookup else 0.0,
        score_bytes=passes_over * itemsize * num_scores(operator, scores) if plain else 0.0,
        update_bytes=2.0 * sum(p.num_bytes for p in trainable) if lookup else 0.0,
        itemsize=itemsize,
    )


def _repeats(operator: Operator) -> int:
    return next((int(word[1:]) for word in operator.kind.split() if word[0] == "r" and word[1:].isdigit()), 1)


def _matrices(operator: Operator) -> list[tuple[tuple[int, ...], float]]:
    """Shapes of its matrices, and how many rows each multiplies for one of the layer's: more or fewer where
    cross-attention reads a context of another length.
    """
    words = operator.kind.split()
    context = next((int(word[8:]) for word in words if _CONTEXT.fullmatch(word)), 0)
    tokens = next((int(word[1:].partition("x")[0]) for word in words if _TOKENS.fullmatch(word)), 1)
    return [
        (p.shape, context / tokens if context and p.name.endswith("cross_kv") else 1.0)
        for p in operator.parameters
        if len(p.shape) >= 2
    ]


def _multiplied(
    operator: Operator, matrices: Sequence[tuple[tuple[int, ...], float]], rows: float, repeats: int
) -> tuple[float, float]:
    """Rows that each matrix multiplies, `rows` or fewer where the FLOPs do not allow that many; FLOPs of all."""
    elements = sum(share * prod(shape) for shape, share in matrices)
    multiplied = operator.forward_flops / repeats / (2.0 * elements) if elements else 0.0
    used = min(rows, multiplied) if rows else multiplied
    return used, 2.0 * used * elements * repeats


def score_flops(operator: Operator, rows: float) -> float:
    """FLOPs of forward that no matrix explains: attention scores and what is summed by them."""
    _, linear = _multiplied(operator, _matrices(operator), rows, _repeats(operator))
    return max(operator.forward_flops - linear, 0.0)


def num_scores(operator: Operator, flops: float) -> float:
    """Attention scores of the whole batch, from the FLOPs of forward on them: four for each score and head width."""
    widths = (int(word.rpartition("x")[2]) for word in operator.kind.split() if _HEADS.fullmatch(word))
    return flops / (4.0 * next(widths, USUAL_HEAD))


def _passes(operator: Operator, linear: float, scores: float) -> float:
    """Repetitions of forward's products in backward, from the FLOPs counted for it."""
    if not operator.forward_flops:
        wanted = operator.activation_bytes > 0 or any(tensor.needs_grad for tensor in operator.outputs)
        return 2.0 if wanted else 0.0
    if not linear:
        return operator.backward_flops / operator.forward_flops
    return max(operator.backward_flops - 2.0 * scores, 0.0) / linear


def chain_rows(operators: Sequence[Operator]) -> float:
    """Rows of the whole batch that pass through a chain of layers: of the tallest tensor that one hands to the next."""
    shapes = [tensor.shape for op in operators for tensor in op.outputs if len(tensor.shape) > 1]
    return float(max((prod(shape[:-1]) for shape in shapes), default=0))


def time_operator(
    work: Work, device: Device, *, data_parallel: float, tensor_parallel: int = 1, sequence_parallel: bool = True
) -> OperatorTime:
    """Seconds on each of data_parallel * tensor_parallel devices, communication left out.

    Without `sequence_parallel` each device of a tensor-parallel group moves the whole layer boundary, not its share.
    """
    products, moved = _products(work, device, data_parallel, tensor_parallel, sequence_parallel)
    share = data_parallel * tensor_parallel
    attention_rate = device.peak_flops * device.attention_efficiency * _rate_of(work.itemsize, device)
    scores = work.attention_flops / share / attention_rate
    moved += work.moved_bytes / data_parallel + work.score_bytes / share
    elementwise = moved / device.memory_bytes_per_s
    launches = (1.0 + device.kernels_per_matmul * len(work.matmuls)) * device.launch_s
    forward = products + scores + elementwise + launches
    if not work.passes:
        return OperatorTime(forward, 0.0)
    again = 1.0 if work.recompute else 0.0
    backward = (
        (work.passes + again) * (products + elementwise + launches)
        + (ATTENTION_BACKWARD + again) * scores
        + work.update_bytes / tensor_parallel / device.memory_bytes_per_s
    )
    return OperatorTime(forward, backward)


def _rate_of(itemsize: int, device: Device) -> float:
    """Rate of matrix products of that width over the device's peak, which is that of its training precision."""
    return {4: device.float32_rate, 8: device.float32_rate / 2}.get(itemsize, 1.0)


def _products(
    work: Work, device: Device, data_parallel: float, tensor_parallel: int, sequence_parallel: bool
) -> tuple[float, float]:
    """Seconds of forward's matrix products, and bytes that they and what stands between them move."""
    rate = device.peak_flops * device.matmul_efficiency * _rate_of(work.itemsize, device)
    # a single product (a vocabulary projection, glue) has no neighbor, so its operands are moved once
    traffic = device.elementwise_traffic if len(work.matmuls) > 1 else 1.0
    seconds = moved = 0.0
    for rows, wide, narrow in work.matmuls:
        local = rows / data_parallel
        tiles = ceil(local / TILE) * ceil(wide / tensor_parallel / TILE)
        idle = 1.0 + TAIL * device.parallel_units / tiles
        seconds += 2.0 * local * wide * narrow / tensor_parallel / rate * idle
        boundary = min(wide, narrow) / (tensor_parallel if sequence_parallel else 1)
        operands = local * (max(wide, narrow) / tensor_parallel + boundary)
        moved += (traffic * operands + wide * narrow / tensor_parallel) * work.itemsize
    return seconds, moved
