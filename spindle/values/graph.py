"""TaskGraph: every operator of every task of a workload, and which tensors they hand each other.

- An operator is one repeated block (a Transformer layer) or one piece of glue between blocks (paper, section 2.1).
- Data flow is not stored twice: an operator names the tensors it reads; one operator writes each tensor.
- Operators of different tasks are different even when they hold the same parameters (equal parameter names).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf, prod
from typing import TYPE_CHECKING

from spindle.errors import GraphError
from spindle.values.units import SAMPLES, Units

if TYPE_CHECKING:
    import networkx as nx

BYTES_BY_DTYPE = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


LOW_BIT_BYTES = {"int4": 0.5, "nf4": 0.5, "fp8": 1.0}
"""Bytes of a frozen weight in types that no tensor of an operator has; scales of blocks are not counted."""


def base_task(task: str) -> str:
    """The task that a micro-batch belongs to."""
    return task.partition("#")[0]


def micro_batch(task: str) -> int:
    """Which micro-batch of its task it is."""
    number = task.partition("#")[2]
    return int(number) if number.isdecimal() else 0


def in_one_process(tasks: Iterable[str]) -> tuple[str, ...]:
    """Tasks as one process runs them: one after another in the order given, and of each micro-batch after micro-batch.

    >>> in_one_process(["a", "b", "a#1", "b#1", "a"])
    ('a', 'a#1', 'b', 'b#1')
    """
    given = list(dict.fromkeys(tasks))
    bases = list(dict.fromkeys(map(base_task, given)))
    return tuple(sorted(given, key=lambda task: (bases.index(base_task(task)), micro_batch(task))))


def num_micro_batches(tasks: Iterable[str]) -> int:
    """How many micro-batches of each task run side by side."""
    return 1 + max(map(micro_batch, tasks), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor that one operator sends to others.

    `shape` is for the whole batch that was captured; other batches may have other sizes. It is cut along dimension
    `row_dim` by the rows that each sample has of `unit`; `rows` is how many entries that is for a sample, on average.
    rows 0 and unit "" mark a tensor that only exists whole. `needs_grad`: a gradient comes back for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int = 1
    row_dim: int = 0
    needs_grad: bool = True
    unit: str = SAMPLES

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_BY_DTYPE:
            raise GraphError(
                f"tensor {self.name!r}: dtype {self.dtype!r} is not known; cast to one of {', '.join(BYTES_BY_DTYPE)}"
            )
        if any(size < 0 for size in self.shape):
            raise GraphError(f"tensor {self.name!r}: shape {self.shape} has a negative size; sizes are 0 or more")
        if self.rows < 0:
            raise GraphError(f"tensor {self.name!r}: {self.rows} rows a sample; give 0 if it cannot be cut")
        if self.rows and not 0 <= self.row_dim < len(self.shape):
            raise GraphError(
                f"tensor {self.name!r}: shape {self.shape} has no dimension {self.row_dim} to hold rows; "
                "give rows=0 if it cannot be cut"
            )

    def shape_of(self, samples: int) -> tuple[int, ...]:
        """Shape of the part that belongs to a number of samples; the whole shape when it cannot be cut."""
        if not self.rows:
            return self.shape
        return (*self.shape[: self.row_dim], samples * self.rows, *self.shape[self.row_dim + 1 :])

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * BYTES_BY_DTYPE[self.dtype]


def unit_of(made: Iterable[TensorSpec]) -> str:
    """The unit whose rows whatever makes these tensors computes on: a packed one, if any of them is cut by it."""
    return next((tensor.unit for tensor in made if tensor.rows and tensor.unit != SAMPLES), SAMPLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter tensor under the user's own name; equal names are one shared parameter.

    Tensor parallelism cuts it into `pieces` along `piece_dim`; one piece cannot be cut. Where that dimension holds
    `packs` equal tensors one after the other, a piece has its part of each. `joined`: each part of a tensor-parallel
    run gives its layer all features and gets all from it. `partial`: it is not cut, but each part adds a share of its
    own to its gradient, where others add the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    pieces: int = 1
    piece_dim: int = 0
    packs: int = 1
    joined: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_BY_DTYPE and self.dtype not in LOW_BIT_BYTES:
            parts = " (the two parts of a complex one, which torch.view_as_complex puts together)"
            raise GraphError(
                f"parameter {self.name!r}: dtype {self.dtype!r} is not known; hold it as one of "
                f"{', '.join(BYTES_BY_DTYPE)}{parts if self.dtype.startswith('complex') else ''}"
            )

    def names(self, part: int = 0, parts: int = 1) -> tuple[str, ...]:
        """What part `part` of `parts` holds of it: the names of its pieces, or its own where it is not cut."""
        if self.pieces == 1:
            return (self.name,)
        indices = self.indices(part, parts)
        return tuple(piece_name(self.name, k, self.pieces, self.piece_dim, self.packs) for k in indices)

    def indices(self, part: int, parts: int) -> range:
        """The pieces of part `part` of `parts`."""
        share = self.pieces // parts
        return range(part * share, (part + 1) * share)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter in its own dtype."""
        if self.dtype in LOW_BIT_BYTES:
            return ceil(prod(self.shape) * LOW_BIT_BYTES[self.dtype])
        return prod(self.shape) * BYTES_BY_DTYPE[self.dtype]


def piece_name(name: str, index: int, count: int, dim: int, packs: int = 1) -> str:
    """Name of one of `count` equal pieces of a parameter, cut along `dim` or in each of `packs` parts of it.

    >>> piece_name("down.weight", 0, 2, 1), piece_name("gate_up", 1, 2, 1, packs=2)
    ('down.weight@0/2/1', 'gate_up@1/2/1x2')
    """
    return f"{name}@{index}/{count}/{dim}" + (f"x{packs}" if packs > 1 else "")


def range_name(name: str, low: int, high: int, shape: Sequence[int]) -> str:
    """Name of the numbers low..high-1 of a parameter of this shape, which stand one after the other.

    >>> range_name("down.weight", 4, 9, (3, 4))
    'down.weight@4-9/3x4'
    """
    return f"{name}@{low}-{high}/{'x'.join(map(str, shape))}"


@dataclass(frozen=True, slots=True)
class PiecePlace:
    """Which piece of which parameter a name tells. With a `span` it is those numbers of one of `shape`, in a row."""

    whole: str
    index: int = 0
    count: int = 1
    dim: int = 0
    packs: int = 1
    span: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()


def parse_piece(name: str) -> PiecePlace:
    """What `piece_name` or `range_name` wrote; a whole parameter is its own piece 0 of 1.

    >>> parse_piece("gate_up@1/2/1x2").packs, parse_piece("down.weight@4-9/3x4").span
    (2, (4, 9))
    """
    whole, _, place = name.partition("@")
    if not place:
        return PiecePlace(whole)
    if "-" in place:
        span, _, sizes = place.partition("/")
        low, high = map(int, span.split("-"))
        return PiecePlace(whole, span=(low, high), shape=tuple(map(int, sizes.split("x"))) if sizes else ())
    index, count, along = place.split("/")
    dim, _, packs = along.partition("x")
    return PiecePlace(whole, int(index), int(count), int(dim), int(packs or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One computation of one task.

    `kind` is the operator type: equal kinds do the same work on inputs of the same shape. FLOPs and bytes are those of
    the whole batch; a multiply-add counts as two. `activation_bytes` is what backward keeps. A `splittable` operator
    may run on parts of the batch (data parallel); one that is not mixes samples and runs whole on one device. `family`
    is equal for operators that do the same work on inputs of any sizes. `units` are the rows of the batch's samples;
    None: samples are alike. `statistics` are norm layers whose running statistics it changes, and does not read;
    `states` other buffers that some operator changes and that this one reads or changes.
    """

    name: str
    task: str
    component: str
    kind: str
    batch_size: int
    inputs: tuple[str, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    input_bytes: int = 0  # all it reads, batch fields included
    batch_fields: tuple[str, ...] = ()  # fields of the batch that it, or an aux value it reads, is computed from
    activation_bytes: int = 0
    splittable: bool = True
    family: str = ""
    units: Units | None = field(default=None, repr=False)
    statistics: tuple[str, ...] = ()
    states: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GraphError(f"operator {self.name!r}: batch size is {self.batch_size}; it must be at least one")
        for label in ("forward_flops", "backward_flops", "input_bytes", "activation_bytes"):
            if not 0 <= getattr(self, label) < inf:
                raise GraphError(f"operator {self.name!r}: {label} is {getattr(self, label)!r}; it must be 0 or more")

    @property
    def tensor_parallel(self) -> int:
        """Devices that one copy of it may be spread over: a divisor of this is a degree of tensor parallelism."""
        return max((parameter.pieces for parameter in self.parameters), default=1)

    @property
    def unit(self) -> str:
        """The unit whose rows it computes on."""
        return unit_of(self.outputs)

    @property
    def size(self) -> float:
        """How much work it is, to compare with operators of its family: FLOPs of forward, else bytes."""
        return self.forward_flops or float(self.input_bytes + self.output_bytes)

    @property
    def output_bytes(self) -> int:
        """Bytes of all it hands to others, whole batch."""
        return sum(tensor.num_bytes for tensor in self.outputs)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters, frozen ones included."""
        return sum(parameter.num_bytes for parameter in self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterWrite:
    """A task writes to parameter `target` what it computes from `sources` alone, outside of the optimizer.

    `after`: after all in the task that uses it, else before; None: the task does not use it. `repeatable`: to write
    twice is to write once. `unnoticed`: autograd does not see it (`.data`), so that the task's backward computes with
    what was written. `in_turn`: it must be done once a batch, at its place in the order of one process. `line`: where
    it stands.
    """

    task: str
    target: str
    sources: tuple[str, ...] = ()
    after: bool | None = False
    repeatable: bool = False
    unnoticed: bool = False
    in_turn: bool = False
    line: str = ""


@dataclass(frozen=True)
class TaskGraph:
    """All operators of a workload; flows follow from the tensors they read and write. `writes`: to parameters. `lines`:
    where buffers are changed, as "line 12 of model.py", as far as that is known.
    """

    operators: tuple[Operator, ...]
    writes: tuple[ParameterWrite, ...] = ()
    lines: Mapping[str, str] = field(default_factory=dict, compare=False)  # words for people

    def __post_init__(self) -> None:
        if not self.operators:
            raise GraphError("the task graph has no operators; add a task to the workload")
        self._check_names()
        self._check_acyclic()

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def named(self, buffer: str) -> str:
        """How to call a buffer in a sentence: with the line that changes it."""
        line = self.lines.get(buffer, "")
        return f"buffer {buffer!r}{f' (changed in {line})' if line else ''}"

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        """Operators by name."""
        return {operator.name: operator for operator in self.operators}

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Tensors by name."""
        return {tensor.name: tensor for operator in self.operators for tensor in operator.outputs}

    @cached_property
    def producers(self) -> dict[str, str]:
        """Name of the operator that writes each tensor."""
        return {tensor.name: operator.name for operator in self.operators for tensor in operator.outputs}

    @cached_property
    def partial(self) -> frozenset[str]:
        """Parameters whose gradients in a part of a copy are shares of it."""
        return frozenset(p.name for operator in self.operators for p in operator.parameters if p.partial)

    @cached_property
    def flows(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Tensors that pass from one operator straight to another, by (source, destination)."""
        tensors_by_pair: dict[tuple[str, str], list[str]] = {}
        for operator in self.operators:
            for name in operator.inputs:
                tensors_by_pair.setdefault((self.producers[name], operator.name), []).append(name)
        return {pair: tuple(names) for pair, names in tensors_by_pair.items()}

    @cached_property
    def digraph(self) -> "nx.DiGraph[str]":
        """The operators' names as a networkx graph, an edge for each flow."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(operator.name for operator in self.operators)
        graph.add_edges_from(self.flows)
        return graph

    def _check_names(self) -> None:
        if len(self.by_name) != len(self.operators):
            names = [operator.name for operator in self.operators]
            twice = next(name for name in names if names.count(name) > 1)
            raise GraphError(f"operator {twice!r} stands twice in the task graph, where names are unique; rename one")
        written: dict[str, str] = {}
        for operator in self.operators:
            for tensor in operator.outputs:
                if tensor.name in written:
                    raise GraphError(
                        f"tensor {tensor.name!r} is written by {written[tensor.name]!r} and by {operator.name!r}; "
                        "one operator writes a tensor, rename one of the two"
                    )
                written[tensor.name] = operator.name
        for operator in self.operators:
            for name in operator.inputs:
                if name not in written:
                    raise GraphError(
                        f"operator {operator.name!r} reads tensor {name!r}, which no operator writes; "
                        "add the one that makes it, or read it from the batch"
                    )

    def _check_acyclic(self) -> None:
        import networkx as nx

        if not nx.is_directed_acyclic_graph(self.digraph):
            cycle = " -> ".join(source for source, _ in nx.find_cycle(self.digraph))
            raise GraphError(f"operators {cycle} depend on each other in a circle; leave out one of these flows")
