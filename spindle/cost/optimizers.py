"""Optimizers: a trained parameter and an optimizer in; bytes that it keeps, and seconds of its step, out.

- Sixteen-bit parameters have a master copy of four bytes, unless the workload wants none; states are as wide as it, or
  as a wider parameter.
- Elementwise optimizers are bound by memory: a step reads gradient, master copy and states, and writes all but the
  gradient. `adamw_8bit` has states of one byte, with a scale for each 256 of them (Dettmers et al. 2021).
- `adafactor` keeps a row and a column of second moments of each matrix, no first moment (Shazeer and Stern 2018).
- `muon` keeps a momentum and makes it orthogonal in five steps of Newton and Schulz (Jordan et al. 2024); vectors,
  tables and vocabulary projections it leaves to AdamW.
- `shampoo` keeps, beside two states as AdamW (momentum and grafting), two statistics and their inverse roots for each
  block of `BLOCK` rows and columns, and computes the roots every `ROOTS_EVERY` steps (Gupta et al. 2018; Anil et al.
  2020).
- Offloaded: the gradient goes to the host and the new parameter comes back over `Device.host_bytes_per_s`, and the host
  moves the states at the same rate. Nothing hides it, which is the most that it can cost.
"""

from math import ceil, prod

from spindle.values.cluster import Device
from spindle.values.cost_options import CostOptions, Optimizer
from spindle.values.execution import PLAIN_UPDATE
from spindle.values.graph import Parameter

STATES: dict[Optimizer, float] = {
    "adamw": 2,
    "adam": 2,
    "adamw_8bit": 2 * (1 + 4 / 256) / 4,
    "adafactor": 0,
    "lion": 1,
    "muon": 1,
    "sgd": 0,
    "sgd_momentum": 1,
    "shampoo": 2,
}
"""States of full size for each trained element, in units of a four-byte one."""

BLOCK = 1024  # rows and columns that Shampoo preconditions together (the usual choice of its distributed version)
ROOTS_EVERY = 100  # steps from one computation of inverse roots to the next
ROOT_FLOPS = 25  # of an eigenvalue decomposition, times the cube of the block's side
NEWTON_SCHULZ = 5  # iterations of Muon
TABLES = ("embedding", "head", "positions")  # last words of names that Muon does not treat as matrices


def kept_bytes_of(parameter: Parameter, cost_options: CostOptions) -> float:
    """Bytes of master copy and states on the device; none where they are offloaded."""
    return (
        0.0 if cost_options.offload_optimizer else sum(_kept(parameter, cost_options.optimizer, _least(cost_options)))
    )


def step_s(parameter: Parameter, device: Device, cost_options: CostOptions) -> float:
    """Seconds of the optimizer's step over one parameter, on one device or on its host."""
    optimizer, width, least = _own(parameter, cost_options.optimizer), _width(parameter), _least(cost_options)
    elements = prod(parameter.shape)
    moved = elements * moved_bytes(optimizer, width, least) + 2 * _kept(parameter, optimizer, least)[1]
    moved *= PLAIN_UPDATE if cost_options.execution.optimizer == "plain" else 1.0
    flops, rate = _flops(parameter, optimizer), device.peak_flops * device.matmul_efficiency
    if optimizer == "shampoo":
        rate *= device.float32_rate
    if cost_options.offload_optimizer:
        return (2 * elements * width + moved) / device.host_bytes_per_s + flops / rate
    return moved / device.memory_bytes_per_s + flops / rate


def moved_bytes(optimizer: Optimizer, width: int, least: int = 4) -> float:
    """Bytes that an elementwise step reads and writes for each element of `width` bytes. Elements narrower than
    `least` have a master copy of `least` bytes.
    """
    state = max(width, least)
    master = 2 * state if width < least else 0  # read and written
    moved = width + master + 2 * STATES[optimizer] * state + width  # the parameter itself is written at last
    return moved + (width if width >= least else 0)


def _least(cost_options: CostOptions) -> int:
    """The fewest bytes of a number that an optimizer steps."""
    return 4 if cost_options.master_weights else 1


def _kept(parameter: Parameter, optimizer: Optimizer, least: int) -> tuple[float, float]:
    """(bytes of the master copy and states of full size, bytes of statistics that stand for rows and columns)."""
    optimizer, width = _own(parameter, optimizer), _width(parameter)
    state = max(width, least)
    elements = prod(parameter.shape)
    full = elements * ((float(least) if width < least else 0.0) + STATES[optimizer] * state)
    rows, columns = _sides(parameter)
    if optimizer == "adafactor":
        return full, state * float(rows + columns if columns else rows)
    if optimizer == "shampoo" and columns:
        return full, 2.0 * 4.0 * sum(side * side for side in _block_sides(rows, columns))
    return full, 0.0


def _flops(parameter: Parameter, optimizer: Optimizer) -> float:
    """FLOPs of matrix products and roots in a step; what is elementwise is bound by memory."""
    rows, columns = _sides(parameter)
    if not columns:
        return 0.0
    if optimizer == "muon":
        short, long = min(rows, columns), max(rows, columns)
        return NEWTON_SCHULZ * (4.0 * short * short * long + 2.0 * short**3)
    if optimizer == "shampoo":
        roots = ROOT_FLOPS / ROOTS_EVERY * sum(side**3 for side in _block_sides(rows, columns))
        # statistics and preconditioning: a product with a side of the block each, for either side
        return 4.0 * rows * columns * (min(rows, BLOCK) + min(columns, BLOCK)) + roots
    return 0.0


def _block_sides(rows: int, columns: int) -> list[int]:
    """Sides of the square statistics of all blocks: two for each block."""
    down, across = ceil(rows / BLOCK), ceil(columns / BLOCK)
    sides: list[int] = []
    for index in range(down):
        sides += [min(BLOCK, rows - index * BLOCK)] * across
    for index in range(across):
        sides += [min(BLOCK, columns - index * BLOCK)] * down
    return sides


def _sides(parameter: Parameter) -> tuple[int, int]:
    """Rows and columns of a matrix (what is behind the first dimension is one), (elements, 0) of a vector."""
    shape = parameter.shape
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape), 0)


def _own(parameter: Parameter, optimizer: Optimizer) -> Optimizer:
    """What steps this parameter: Muon leaves vectors and tables to AdamW."""
    is_table = parameter.name.rpartition(".")[2] in TABLES
    return "adamw" if optimizer == "muon" and (is_table or len(parameter.shape) < 2) else optimizer


def _width(parameter: Parameter) -> int:
    return parameter.num_bytes // max(prod(parameter.shape), 1)
