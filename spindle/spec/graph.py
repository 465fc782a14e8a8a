"""Workload spec in, TaskGraph out: layers with parameters, FLOPs, bytes and gradients due; no model code is needed.

- Every layer is an operator `task.component.<index>`; `spindle.values.contract` merges a stack into the MetaOp
  `task.component`. Lookup tables and vocabulary projections are operators of their own (`.embed`, `.head`), since their
  parameters and traffic are unlike a layer's; linear stems and output projections ride with the first and last layer.
- Tasks that use a component share its parameters by name.
- A loss is an operator of its own only where it joins components: `contrastive` mixes samples, so it runs whole.
- Backward follows what learns: a frozen part with nothing trained before it has none; with something trained before it,
  the input gradient only; forward-only tasks have none at all.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import prod

from spindle.errors import WorkloadError
from spindle.spec.blocks import (
    Block,
    Component,
    Embedding,
    LmHead,
    Mlp,
    Other,
    Transformer,
    Weight,
    mlp_block,
    other_block,
    transformer_block,
)
from spindle.spec.parts import Cost, Part, part_of, rows_of, skipped_part, stem_of, sum_parts, tail_of, task_adapters
from spindle.spec.values import LOSS, Edge, Task, WorkloadSpec
from spindle.values.execution import norm_copies
from spindle.values.graph import BYTES_BY_DTYPE, Operator, TaskGraph, TensorSpec

MOST_LAYERS = 100_000  # of a task in a step; each is an operator of its own


def build_graph(spec: WorkloadSpec) -> TaskGraph:
    """The TaskGraph of a spec: every layer of every task as an operator, tasks in the order of the spec.

    A task that runs several times in a step has the operators of each run.
    """
    layers = {c.name: getattr(c, "layers", 1) for c in spec.components}
    for task in spec.tasks:
        if (count := task.rate * sum(layers[name] for name in task.components)) > MOST_LAYERS:
            raise WorkloadError(
                f"task {task.name!r} runs {count} layers a step; each is costed by itself, give at most {MOST_LAYERS}"
            )
    runs = [run for task in spec.tasks for run in task.runs]
    return TaskGraph(tuple(operator for run in runs for operator in task_operators(spec, run)))


def task_operators(spec: WorkloadSpec, task: Task) -> tuple[Operator, ...]:
    """All operators of one task, each after those it reads from."""
    builder = _Builder(spec, task)
    for name in _in_flow_order(task):
        builder.add(name)
    builder.add_loss()
    return tuple(builder.operators)


def _in_flow_order(task: Task) -> list[str]:
    """Components, each after all that feed it (Kahn 1962), ties as given; raises WorkloadError on a circle."""
    waiting = {name: {edge.source for edge in task.edges if edge.target == name} for name in task.components}
    order: list[str] = []
    while waiting:
        free = next((name for name, sources in waiting.items() if not sources), None)
        if free is None:
            raise WorkloadError(f"task {task.name!r}: {', '.join(waiting)} feed each other in a circle; remove an edge")
        order.append(free)
        del waiting[free]
        for sources in waiting.values():
            sources.discard(free)
    return order


class _Builder:
    def __init__(self, spec: WorkloadSpec, task: Task) -> None:
        self.spec, self.task = spec, task
        self.operators: list[Operator] = []
        self.tensors: dict[str, TensorSpec] = {}
        self.output_by_edge: dict[tuple[str, str], TensorSpec] = {}
        self.output_by_component: dict[str, TensorSpec] = {}
        self.tokens_by_component: dict[str, int] = {}

    # One component -----------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """Append the operators of component `name`; all that feed it were added before."""
        task = self.task
        component = self.spec.component_in(task, name)
        sources = [edge for edge in task.edges if edge.target == name]
        inputs = [self.output_by_edge[edge.source, name].name for edge in sources]
        if component.update == "zeroth_order":
            component = self._without_backward(component, inputs)
        handed = sum(self.tokens_by_component[edge.source] for edge in sources)
        context = dict(task.context_tokens).get(name, handed)
        self.tokens_by_component[name] = (component.output_tokens or component.tokens) * component.instances
        outputs = self._outputs(component)
        match component:
            case Transformer():
                self._add_transformer(component, inputs, outputs, context)
            case Mlp():
                part = part_of(mlp_block(component), component)
                self._append(component, "", mlp_block(component).kind, [part], inputs, outputs)
            case Other():
                self._add_other(component, inputs, outputs)
            case Embedding():
                self._add_embedding(component, inputs, outputs)
            case LmHead():
                self._check_last(component)
                weight = Weight("weight", (component.vocab, component.hidden), float(rows_of(component)))
                owner = component.tied_to or component.name
                self._add_head(component, "", weight, f"{owner}.embedding", inputs, used=name in task.sinks)

    def _without_backward(self, component: Component, inputs: list[str]) -> Component:
        """The component as it runs: forward twice, once with noise added to its weights and once with it taken off."""
        due = [name for name in inputs if self.tensors[name].needs_grad]
        if due:
            raise WorkloadError(
                f"task {self.task.name!r}: {component.name!r} has update: zeroth_order, so no gradient comes back from "
                f"it, but what makes {due[0].partition('.')[2]!r} learns by gradients; freeze that (trained: none) or "
                "give it update: zeroth_order too"
            )
        return replace(component, repeats=2 * component.repeats)

    def _check_last(self, component: Component) -> None:
        if component.name not in self.task.sinks:
            raise WorkloadError(
                f"task {self.task.name!r}: {component.name!r} is an lm_head, which ends in the loss, but it feeds "
                "another component; let its source feed that one"
            )

    def _outputs(self, component: Component) -> tuple[TensorSpec, ...]:
        """What the last operator of a component writes: its output, and a tensor for each edge of another payload."""
        shape = (component.output_tokens or component.tokens, _output_width(component))
        main = self._tensor(f"{self.task.name}.{component.name}", shape, component)
        self.output_by_component[component.name] = main
        outputs = [main]
        for edge in self.task.edges:
            if edge.source == component.name:
                tensor = main if edge.payload_bytes_per_sample is None else self._payload(edge, component)
                self.output_by_edge[edge.source, edge.target] = tensor
                outputs += [tensor] if tensor is not main else []
        return tuple(outputs)

    def _payload(self, edge: Edge, component: Component) -> TensorSpec:
        assert edge.payload_bytes_per_sample is not None, "only edges that state a payload come here"
        dtype = component.dtype or self.spec.dtype
        elements = max(round(edge.payload_bytes_per_sample / BYTES_BY_DTYPE[dtype]), 1)
        return TensorSpec(
            name=f"{self.task.name}.{component.name}:{edge.target}",
            shape=(self.task.batch_size, elements),
            dtype=dtype,
        )

    def _tensor(self, name: str, shape: tuple[int, ...], component: Component) -> TensorSpec:
        sequences = self.task.batch_size * component.instances
        dtype = component.dtype or self.spec.dtype
        return TensorSpec(name=name, shape=(sequences, *shape), dtype=dtype, rows=component.instances)

    # Kinds of components -----------------------------------------------------------------------------------------

    def _add_transformer(
        self, component: Transformer, inputs: list[str], outputs: tuple[TensorSpec, ...], context_tokens: int
    ) -> None:
        c, base = component, f"{self.task.name}.{component.name}"
        width = (c.tokens, c.hidden)
        reads = list(inputs)
        if c.vocab:
            self._add_table(c, self._tensor(f"{base}.embed", width, c))
            reads.append(f"{base}.embed")
        block = transformer_block(c, context_tokens=context_tokens, norm_copies=norm_copies(self.spec.execution))
        context = inputs if c.cross_attention != "none" else []
        rank = dict(self.task.lora_rank).get(c.name, 0)
        end = (self._tensor(f"{base}.shared", outputs[0].shape[1:], c),) if rank else outputs
        adapted: list[Part] = []
        for index in range(c.layers):
            last = index == c.layers - 1
            written = end if last else (self._tensor(f"{base}.{index}", width, c),)
            skipped = index in c.skipped_layers
            part = skipped_part(c, index) if skipped else self._layer(c, block, index, adapted=rank > 0)
            adapted += [] if skipped else [part]
            parts = [*([stem_of(c)] if index == 0 and c.input_features else []), part, *(tail_of(c) if last else [])]
            if skipped and not any(part.weights for part in parts) and not last:
                continue
            suffix = f".{index}" if c.layers > 1 else ""
            kind = f"skipped h{c.hidden} t{c.tokens}x{c.instances}" if skipped else block.kind
            self._append(c, suffix, kind, parts, reads, written)
            reads = [written[0].name, *context]
        if rank:
            part = task_adapters(adapted, rank, self.task.name.partition("#")[0])
            kind = f"adapters of {len(adapted)} {block.kind} rank{rank}"
            self._append(c, ".adapters", kind, [part], [end[0].name], outputs)
        if c.logits:
            used = c.name in self.task.sinks and self.task.loss == "cross_entropy"
            name = f"{c.name}.embedding" if c.tied else f"{c.name}.head"
            weight = Weight("head", (c.vocab, c.hidden), float(rows_of(c)))
            self._add_head(c, ".head", weight, name, [outputs[0].name], used=used)

    def _layer(self, c: Transformer, block: Block, index: int, *, adapted: bool) -> Part:
        part = part_of(block, c, trained=c.trained == "all", prefix=f"{index}.")
        return replace(part, adapted=adapted)

    def _add_other(self, component: Other, inputs: list[str], outputs: tuple[TensorSpec, ...]) -> None:
        c, base = component, f"{self.task.name}.{component.name}"
        block = other_block(c)
        reads = list(inputs)
        for index in range(c.layers):
            last = index == c.layers - 1
            written = outputs if last else (self._tensor(f"{base}.{index}", (c.tokens, c.hidden), c),)
            suffix = f".{index}" if c.layers > 1 else ""
            self._append(c, suffix, block.kind, [part_of(block, c, prefix=f"{index}.")], reads, written)
            reads = [written[0].name]

    def _add_embedding(self, component: Embedding, inputs: list[str], outputs: tuple[TensorSpec, ...]) -> None:
        c = component
        extra = [Weight("extra", (c.extra_parameters,))] if c.extra_parameters else []
        table = Weight("embedding", (c.vocab, c.hidden))
        kind = f"embedding {c.vocab}x{c.hidden} t{c.tokens}x{c.instances}"
        self._append(c, "", kind, [Part([table, *extra], c.trained == "all")], inputs, outputs)

    def _add_table(self, c: Transformer, output: TensorSpec) -> None:
        table = Weight(f"{c.name}.embedding", (c.vocab, c.hidden))
        kind = f"embedding {c.vocab}x{c.hidden} t{c.tokens}x{c.instances}"
        self._append(c, ".embed", kind, [Part([table], c.trained == "all")], [], (output,), own_names=True)

    def _add_head(
        self, c: Component, suffix: str, weight: Weight, parameter: str, inputs: list[str], *, used: bool
    ) -> None:
        """Projection to the vocabulary with the loss behind it; when no loss reads it, it only runs forward."""
        vocab, hidden = weight.shape
        part = Part(
            [replace(weight, name=parameter)],
            trained=c.trained in ("all", "ends"),
            kept_trained=weight.rows * (hidden + 3 * vocab),  # its input; logits in two bytes, their softmax in four
            kept_frozen=weight.rows * 3 * vocab,
        )
        kind = f"lm_head {vocab}x{hidden} t{c.tokens}x{c.instances}{'' if used else ' unused'}"
        self._append(c, suffix, kind, [part], inputs, (), own_names=True, forward_only=not used)

    # The loss ----------------------------------------------------------------------------------------------------

    def add_loss(self) -> None:
        """Append the loss where it joins components or mixes samples; others ride with what they read."""
        sinks = [self.output_by_component[name] for name in self.task.sinks if self._has_output(name)]
        if len(sinks) < 2:
            return
        batch = self.task.batch_size
        mixes = self.task.loss == "contrastive"
        read = sum(tensor.num_bytes for tensor in sinks)
        forward = 0.0
        if mixes:
            self._check_alike(sinks)
            width = prod(sinks[0].shape) // batch
            forward = sum(2.0 * batch * batch * width for _ in combinations(sinks, 2))
        learns = any(tensor.needs_grad for tensor in sinks) and not self.task.forward_only
        shapes = ",".join("x".join(map(str, tensor.shape)) for tensor in sinks)
        self.operators.append(
            Operator(
                name=f"{self.task.name}.{LOSS}",
                task=self.task.name,
                component=LOSS,
                kind=f"loss {self.task.loss} {shapes}",
                batch_size=batch,
                inputs=tuple(tensor.name for tensor in sinks),
                forward_flops=forward,
                backward_flops=2 * forward if learns else 0.0,
                input_bytes=read,
                activation_bytes=read + (4 * batch * batch if mixes else 0) if learns else 0,
                splittable=not mixes,
            )
        )

    def _has_output(self, name: str) -> bool:
        return self.output_by_component[name].name in self.tensors

    def _check_alike(self, sinks: list[TensorSpec]) -> None:
        widths = {tensor.name: prod(tensor.shape) // self.task.batch_size for tensor in sinks}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name.partition('.')[2]} {width}" for name, width in widths.items())
            raise WorkloadError(
                f"task {self.task.name!r}: its contrastive loss compares vectors of different width ({listed}); "
                "give the components equal output_features and output_tokens: 1"
            )

    # One operator ------------------------------------------------------------------------------------------------

    def _append(
        self,
        component: Component,
        suffix: str,
        kind: str,
        parts: Sequence[Part],
        inputs: Sequence[str],
        outputs: tuple[TensorSpec, ...],
        *,
        own_names: bool = False,
        forward_only: bool = False,
    ) -> None:
        c, task = component, self.task
        frozen = task.forward_only or forward_only or c.update == "zeroth_order"
        due = any(self.tensors[name].needs_grad for name in inputs)
        cost = sum_parts(parts, c, self.spec, due=due, frozen=frozen, own_names=own_names)
        if c.update == "zeroth_order":  # no gradients, so none to reduce, and no states
            cost.parameters = [replace(parameter, trainable=False) for parameter in cost.parameters]
        written = tuple(replace(tensor, needs_grad=cost.needs_grad and not frozen) for tensor in outputs)
        self.tensors.update({tensor.name: tensor for tensor in written})
        itemsize = BYTES_BY_DTYPE[c.dtype or self.spec.dtype]
        batch = task.batch_size * c.repeats
        read = sum(self.tensors[name].num_bytes for name in inputs if not self._is_own(name, c))
        self.operators.append(
            Operator(
                name=f"{task.name}.{c.name}{suffix}",
                task=task.name,
                component=c.name,
                kind=f"{kind} b{task.batch_size}{f' r{c.repeats}' if c.repeats > 1 else ''} {_mode(c, cost, itemsize)}",
                batch_size=task.batch_size,
                inputs=tuple(inputs),
                outputs=written,
                parameters=tuple(cost.parameters),
                forward_flops=batch * cost.forward_flops,
                backward_flops=batch * cost.backward_flops,
                input_bytes=_input_bytes(c, task.batch_size, itemsize, read),
                activation_bytes=round(batch * cost.kept_elements * itemsize),
            )
        )

    def _is_own(self, tensor: str, component: Component) -> bool:
        return tensor.startswith(f"{self.task.name}.{component.name}.")


def _input_bytes(c: Component, batch_size: int, itemsize: int, read: int) -> int:
    """Equal for all layers of a stack: the hidden state, and a context where every layer reads one."""
    if not isinstance(c, Transformer | Other):
        return max(read, batch_size * rows_of(c) * 8)  # token numbers are of eight bytes
    context = read if isinstance(c, Transformer) and c.cross_attention != "none" else 0
    return batch_size * rows_of(c) * c.hidden * itemsize + context


def _mode(c: Component, cost: Cost, itemsize: int) -> str:
    stored = f" {c.base_dtype}" if c.base_dtype else ""
    if not cost.backward_flops and not cost.needs_grad:
        return f"{8 * itemsize}bit forward{stored}"
    return f"{8 * itemsize}bit {c.trained}{c.lora_rank or ''}{stored}"


def _output_width(c: Component) -> int:
    match c:
        case Transformer():
            if c.payload == "per_layer_kv":
                return 2 * c.kv_heads * c.head_dim * c.layers
            if c.payload == "per_layer_hidden":
                return c.hidden * c.layers
            return c.output_features or c.hidden
        case Mlp():
            return c.widths[-1]
        case LmHead():
            return 1
        case Embedding() | Other():
            return c.hidden
    raise AssertionError(f"component {c.name!r} is of no kind that hands on a width")
