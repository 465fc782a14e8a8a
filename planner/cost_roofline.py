"""Roofline: one operator, a device and a share of the batch in, seconds of its forward and backward out.

- Matrix products run at a share of the device's peak that falls with the local matrix size: `Work` keeps the shapes.
- Everything between them (norms, activations, residuals) is bound by memory: bytes moved / bandwidth.
- Each operator starts a number of kernels; when they are short, starting them is what takes time.
- Backward repeats the products as many times as its FLOPs say (none for a frozen part with nothing trained before it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from spindle.cluster import Device
from spindle.graph import BYTES_BY_DTYPE, Operator

ATTENTION_EFFICIENCY = 0.6  # of what a large matrix product reaches: fused attention does softmax between its products
MATMUL_EFFICIENCY = 0.75  # of the peak, for large matrices
HALF_ROWS = 128.0  # rows of a product at which half of that is reached: the height of one tile
TRAFFIC = 2.0  # times that the inputs and outputs of products are moved by what stands between them
KERNELS_PER_MATMUL = 3.0  # the product itself, and on average two small kernels
LAUNCH_S = 5e-6  # one kernel, from PyTorch's eager mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one operator does on the whole batch.

    matmuls         (rows, wide, narrow) of each matrix product in forward; FLOPs are 2 * rows * wide * narrow
    other_flops     of forward beyond those: attention scores, and products whose shape is not known
    backward_ratio  FLOPs of backward / FLOPs of forward
    moved_bytes     read and written by forward besides the products' operands
    has_backward    whether any gradient passes
    """

    matmuls: tuple[tuple[float, int, int], ...] = ()
    other_flops: float = 0.0
    backward_ratio: float = 2.0
    moved_bytes: float = 0.0
    itemsize: int = 2
    has_backward: bool = True


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """Seconds of one operator on each device that runs its share."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def operator_work(operator: Operator, rows: float) -> Work:
    """Shapes and bytes of an operator; `rows` is how many rows of the whole batch its matrices multiply at most.

    An operator knows its parameters and its FLOPs, not which multiplies what: each matrix is taken to multiply `rows`
    rows, or fewer when the FLOPs do not allow that many; what is left are attention scores.
    """
    matrices = [p.shape for p in operator.parameters if len(p.shape) >= 2]
    elements = sum(prod(shape) for shape in matrices)
    multiplied = operator.forward_flops / (2.0 * elements) if elements else 0.0
    used = min(rows, multiplied) if rows else multiplied
    itemsize = BYTES_BY_DTYPE[operator.parameters[0].dtype] if operator.parameters else 4
    moved = float(operator.input_bytes + operator.output_bytes)
    return Work(
        matmuls=tuple((used, shape[0], prod(shape[1:])) for shape in matrices) if used else (),
        other_flops=max(operator.forward_flops - 2.0 * used * elements, 0.0),
        backward_ratio=operator.backward_flops / operator.forward_flops if operator.forward_flops else 1.0,
        moved_bytes=moved,
        itemsize=itemsize,
        has_backward=_has_backward(operator),
    )


def _has_backward(operator: Operator) -> bool:
    if operator.forward_flops:
        return operator.backward_flops > 0
    return any(p.trainable for p in operator.parameters) or operator.activation_bytes > 0


def chain_rows(operators: Sequence[Operator]) -> float:
    """Rows of the whole batch that pass through a chain of layers: of the tallest tensor that one hands to the next."""
    shapes = [tensor.shape for op in operators for tensor in op.outputs if len(tensor.shape) > 1]
    return float(max((prod(shape[:-1]) for shape in shapes), default=0))


def time_operator(work: Work, device: Device, *, data_parallel: int, tensor_parallel: int = 1) -> OperatorTime:
    """Seconds on each of data_parallel * tensor_parallel devices, communication left out."""
    rate = device.peak_flops * MATMUL_EFFICIENCY
    products = moved = 0.0
    for rows, wide, narrow in work.matmuls:
        local = rows / data_parallel
        products += 2.0 * (local + HALF_ROWS) * wide * narrow / tensor_parallel / rate
        moved += local * (wide / tensor_parallel + narrow) * work.itemsize
    shards = data_parallel * tensor_parallel
    products += work.other_flops / shards / (rate * ATTENTION_EFFICIENCY)
    moved = TRAFFIC * moved + work.moved_bytes / data_parallel
    elementwise = moved / device.memory_bytes_per_s
    launches = (1.0 + KERNELS_PER_MATMUL * len(work.matmuls)) * LAUNCH_S
    forward = max(products + elementwise, launches)
    if not work.has_backward:
        return OperatorTime(forward, 0.0)
    ratio = work.backward_ratio
    return OperatorTime(forward, max(ratio * products + 1.5 * elementwise, launches))
