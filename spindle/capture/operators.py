"""Operators of one task: its groups in, operators with code, shapes, costs and rows out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from spindle.capture import costs
from spindle.capture.codes import AuxCode, CodeInput, OperatorCode
from spindle.capture.costs import Cost, ValueSpec
from spindle.capture.extract import Extracted, Extractor, buffer_names, parameter_names
from spindle.capture.naming import Namer
from spindle.capture.parallel import Cut, cuts, refuse_bare_reads
from spindle.capture.partition import Group, Partition
from spindle.capture.probing import Fragile, Prober
from spindle.capture.randomness import undrawn
from spindle.capture.rows import Finding, Rows, one_thread
from spindle.capture.tracing import TracedTask
from spindle.errors import SpindleWarning, WorkloadError
from spindle.graph import Operator, Parameter, TensorSpec
from spindle.workload import Batch, Workload


@dataclass
class Memo:
    """What was found for an operator kind, so that equal layers are looked at once. Shared by all tasks."""

    costs: dict[str, Cost] = field(default_factory=dict)
    findings: dict[str, tuple[list[Finding], list[list[Any]]]] = field(default_factory=dict)


@dataclass
class _Draft:
    """An operator before it is known which of its outputs a gradient comes back for."""

    name: str
    component: str
    code: Extracted
    kind: str
    splittable: bool


@dataclass
class TaskOperators:
    """Everything that comes out of one task."""

    operators: list[Operator] = field(default_factory=list)
    codes: list[OperatorCode] = field(default_factory=list)
    aux: list[AuxCode] = field(default_factory=list)
    loss: str = ""


class DataDependentSize(WorkloadError):
    """Glue of a component hands on a tensor whose size only the data can tell."""

    def __init__(self, message: str, component: str) -> None:
        super().__init__(message)
        self.component = component


def build_operators(
    workload: Workload, traced: TracedTask, partition: Partition, batch: Batch, namer: Namer, memo: Memo
) -> TaskOperators:
    """Build the operators of one traced task. Raises WorkloadError when its loss needs no gradient."""
    names = namer.used.copy()
    try:
        return _Builder(workload, traced, partition, batch, namer, memo).run()
    except Fragile:
        namer.used = names
        return _Builder(workload, traced, partition, batch, namer, memo, fragile=True).run()


class _Builder:
    def __init__(
        self,
        workload: Workload,
        traced: TracedTask,
        partition: Partition,
        batch: Batch,
        namer: Namer,
        memo: Memo,
        *,
        fragile: bool = False,
    ) -> None:
        self.task = traced.task
        self.precision = workload.precision
        self.traced = traced
        self.partition = partition
        self.extractor = Extractor(workload, traced, partition)
        self.namer = namer
        self.memo = memo
        self.cuts = cuts(workload)
        self.parameter_by_id = {id(p): name for name, p in workload.named_parameters()}
        self.buffer_by_id = {id(b): name for name, b in workload.named_buffers()}
        self.prober = Prober(self.task, traced, self.extractor, batch, fragile=fragile)
        self.specs: dict[fx.Node, ValueSpec] = {}  # of tensors between operators, at the full batch
        self.drafts: list[_Draft] = []

    def run(self) -> TaskOperators:
        with one_thread():
            for group in self.partition.groups:
                if group.is_block:
                    self._add_block(group)
                else:
                    self._add_glue(group)
        loss = self.traced.loss
        if loss not in self.specs or not self.specs[loss].needs_grad:
            raise WorkloadError(
                f"task {self.task.name!r}: its loss needs no gradient; let it depend on a trained parameter"
            )
        costs_by_draft = self._backward_pass()
        self._warn_of_whole_operators(costs_by_draft)
        return TaskOperators(
            operators=[self._operator(draft, cost) for draft, cost in costs_by_draft],
            codes=[self._code(draft) for draft in self.drafts],
            aux=list(self.prober.aux.values()),
            loss=self._tensor_name(loss),
        )

    # -- groups ---------------------------------------------------------------------------------------------------

    def _add_block(self, group: Group) -> None:
        call = self.traced.calls[group.call or 0]
        component, name = self.namer.block(self.task.name, group.component, call.path)
        results = [node for node in group.outputs if isinstance(node.meta["val"], Tensor)]
        code = self.extractor.operator(results, self.specs.keys())
        kind = self._kind(type(call.module).__name__, code)
        key = f"{kind} fragile" if self.prober.fragile else kind
        if key not in self.memo.findings:
            self.memo.findings[key] = self.prober.run(code)
        findings, values = self.memo.findings[key]
        for index, node in enumerate(results):
            self.prober.probes[node] = [trial[index] for trial in values]
        splittable = all(finding.independent for finding in findings)
        self._add(name, component, code, kind, [finding.rows for finding in findings], splittable=splittable)

    def _add_glue(self, group: Group) -> None:
        """Split the group into the part that goes by samples and the part that mixes them, if there is one."""
        nodes = [n for n in self._ancestors(group) if isinstance(n.meta.get("val"), Tensor)]
        everything = self.extractor.operator(nodes, self.specs.keys())
        findings, values = self.prober.run(everything)
        found = dict(zip(nodes, findings, strict=True))
        for index, node in enumerate(nodes):
            self.prober.probes[node] = [trial[index] for trial in values]
        apart = [node for node in group.outputs if self._by_sample(found[node])]
        mixed = [node for node in group.outputs if node not in apart]
        late = [node for node in group.updates if not found[node].independent]
        cut = self._cut([*mixed, *late], found)
        by_sample = [node for node in nodes if node in apart or (node in cut and node not in self.specs)]
        component = self.namer.component(group, self._parameters(everything))
        whole = bool(mixed or late)
        if by_sample or not whole:
            role = "post" if group.frontier else "pre"
            updates = [] if whole else group.updates
            self._add_piece(by_sample, updates, component, role, found, splittable=True)
        if whole:
            is_loss = self.traced.loss in mixed
            component, role = ("loss", "") if is_loss else (component, "mix")
            self._add_piece(mixed, group.updates, component, role, found, splittable=False)

    def _add_piece(
        self,
        results: list[fx.Node],
        updates: list[fx.Node],
        component: str,
        role: str,
        found: dict[fx.Node, Finding],
        *,
        splittable: bool,
    ) -> None:
        code = self.extractor.operator(results, self.specs.keys(), updates)
        name = self.namer.glue(self.task.name, component, role)
        kind = self._kind(role or component, code)
        self._add(name, component, code, kind, [found[node].rows for node in results], splittable=splittable)

    def _ancestors(self, group: Group) -> list[fx.Node]:
        """Nodes of the group that its outputs and updates need, in the order of the trace."""
        members, needed, stack = set(group.nodes), set(), [*group.outputs, *group.updates]
        while stack:
            node = stack.pop()
            if node in members and node not in needed:
                needed.add(node)
                stack.extend(self.traced.effects.inputs(node))
        return [node for node in group.nodes if node in needed]

    @staticmethod
    def _by_sample(finding: Finding) -> bool:
        return finding.independent and finding.rows is not None

    def _cut(self, mixed: list[fx.Node], found: dict[fx.Node, Finding]) -> set[fx.Node]:
        """The last values made of rows on the way to `mixed`: what the mixing part must be given."""
        inputs = self.traced.effects.inputs
        cut, seen, stack = set(), set(mixed), [source for node in mixed for source in inputs(node)]
        while stack:
            node = stack.pop()
            if node in seen or node not in found:
                continue
            seen.add(node)
            rows = found[node].rows
            own = not self.traced.effects.is_written(node)  # what is written to is made where it is written
            if own and found[node].independent and rows is not None and rows.dim == 0:
                cut.add(node)
            else:
                stack.extend(inputs(node))
        return cut

    # -- one operator ---------------------------------------------------------------------------------------------

    def _add(
        self,
        name: str,
        component: str,
        code: Extracted,
        kind: str,
        rows: Sequence[Rows | None],
        *,
        splittable: bool,
    ) -> None:
        for node in code.results:
            if free_unbacked_symbols(node.meta["val"]):
                raise DataDependentSize(
                    f"task {self.task.name!r}: what {name!r} hands on has a size that depends on the data "
                    f"({node.name}); keep the size fixed, for instance by torch.where in place of indexing by a mask",
                    component,
                )
        cost = self._cost(kind, code, None, rows)
        if cost.undrawn:
            raise undrawn(f"task {self.task.name!r}: {name!r}", cost.undrawn)
        for node, spec, row in zip(code.results, cost.outputs, rows, strict=True):
            self.specs[node], self.prober.rows[node] = spec, row
        self.drafts.append(_Draft(name, component, code, kind, splittable))

    def _cost(self, kind: str, code: Extracted, live: tuple[bool, ...] | None, rows: Sequence[Rows | None]) -> Cost:
        """Cost of a piece of code whose results have `rows`, with a gradient for those that are `live` (None: all)."""
        key = f"{kind}{live or ''}"
        if key not in self.memo.costs:
            specs, size = self._input_specs(code), self.task.batch_size
            try:
                self.memo.costs[key] = costs.measure(code.module, size, specs, live, self.precision)
            except Exception as error:  # whatever fake tensors cannot do: sizes, branches, types that only data tell
                self.memo.costs[key] = self.prober.cost(code, specs, live, rows, self.precision, error)
        return self.memo.costs[key]

    def _kind(self, label: str, code: Extracted) -> str:
        return costs.kind_of(label, code.module, self.task.batch_size, self._input_specs(code), self.precision)

    def _backward_pass(self) -> list[tuple[_Draft, Cost]]:
        """Which tensors a gradient comes back for, from the loss up: what nothing trained depends on gets none."""
        wanted = {self.traced.loss}
        found: list[tuple[_Draft, Cost]] = []
        for draft in reversed(self.drafts):
            code = draft.code
            live = tuple(node in wanted for node in code.results)
            cost = self._cost(
                draft.kind, code, None if all(live) else live, [self.prober.rows[node] for node in code.results]
            )
            if not all(live):
                draft.kind += "-" + "".join("gn"[not alive] for alive in live)
            wanted |= {node for node, grad in zip(code.arguments, cost.input_grads, strict=True) if grad}
            found.append((draft, cost))
        for node in self.specs:
            self.specs[node] = replace(self.specs[node], needs_grad=node in wanted)
        return found[::-1]

    def _warn_of_whole_operators(self, costs_by_draft: list[tuple[_Draft, Cost]]) -> None:
        """Work beside the loss that one device must do for the whole batch."""
        loss = self.traced.loss
        whole = [
            draft.name
            for draft, cost in costs_by_draft
            if not draft.splittable and loss not in draft.code.results and (cost.forward_flops or cost.trained)
        ]
        if whole:
            more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
            warnings.warn(
                f"task {self.task.name!r}: on one device each, since they mix samples (batch norm) or hold the batch "
                f"size as a number: {', '.join(whole[:3])}{more}; let them go by samples (group norm), and take sizes "
                "from tensors as in x.shape[0]",
                SpindleWarning,
                stacklevel=6,
            )

    def _operator(self, draft: _Draft, cost: Cost) -> Operator:
        named = parameter_names(draft.code.module, self.parameter_by_id)
        trained = {outer for inner, outer in named if inner in cost.trained}
        return Operator(
            name=draft.name,
            task=self.task.name,
            component=draft.component,
            kind=draft.kind,
            batch_size=self.task.batch_size,
            inputs=tuple(self._tensor_name(node) for node, _ in self._tensor_inputs(draft.code)),
            outputs=tuple(self._tensor_spec(node) for node in draft.code.results),
            parameters=tuple(_parameters(draft.code.module, named, trained, self.cuts)),
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            batch_fields=self._fields(draft.code),
            input_bytes=sum(spec.num_bytes for spec in self._input_specs(draft.code)),
            activation_bytes=cost.activation_bytes,
            splittable=draft.splittable,
        )

    def _code(self, draft: _Draft) -> OperatorCode:
        return OperatorCode(
            name=draft.name,
            module=draft.code.module,
            inputs=tuple(self._code_inputs(draft.code)),
            outputs=tuple(self._tensor_name(node) for node in draft.code.results),
            parameters=parameter_names(draft.code.module, self.parameter_by_id),
            buffers=buffer_names(draft.code.module, self.buffer_by_id),
        )

    def _code_inputs(self, code: Extracted) -> Iterator[CodeInput]:
        yield code.inputs[0]
        for node, given in zip(code.arguments, code.inputs[1:], strict=True):
            yield CodeInput(
                given.kind, self._tensor_name(node) if given.kind == "tensor" else self.prober.aux_code(node).name
            )

    def _fields(self, code: Extracted) -> tuple[str, ...]:
        pairs = zip(code.arguments, code.inputs[1:], strict=True)
        read = {field for node, given in pairs if given.kind == "aux" for field in self.prober.aux_code(node).fields}
        return tuple(sorted(read))

    def _tensor_inputs(self, code: Extracted) -> Iterator[tuple[fx.Node, CodeInput]]:
        pairs = zip(code.arguments, code.inputs[1:], strict=True)
        return ((node, given) for node, given in pairs if given.kind == "tensor")

    def _tensor_name(self, node: fx.Node) -> str:
        return f"{self.task.name}/{node.name}"

    def _tensor_spec(self, node: fx.Node) -> TensorSpec:
        spec, rows = self.specs[node], self.prober.rows[node]
        return TensorSpec(
            name=self._tensor_name(node),
            shape=spec.shape,
            dtype=str(spec.dtype).removeprefix("torch."),
            rows=rows.count if rows else 0,
            row_dim=rows.dim if rows else 0,
            needs_grad=spec.needs_grad,
        )

    def _input_specs(self, code: Extracted) -> list[ValueSpec]:
        return [
            self.specs[node] if given.kind == "tensor" else self.prober.aux_spec(node)
            for node, given in zip(code.arguments, code.inputs[1:], strict=True)
        ]

    def _parameters(self, code: Extracted) -> dict[str, int]:
        """Sizes of the parameters inside, by the workload's name."""
        sizes = {name: parameter.numel() for name, parameter in code.module.named_parameters()}
        return {
            outer: sizes[inner] for inner, outer in parameter_names(code.module, self.parameter_by_id) if inner in sizes
        }


def _parameters(
    module: nn.Module, named: Sequence[tuple[str, str]], trained: set[str], cuts: Mapping[str, Cut]
) -> Iterator[Parameter]:
    values = dict(module.named_parameters(remove_duplicate=False))
    seen: set[str] = set()
    for inner, outer in named:
        if outer in cuts:
            refuse_bare_reads(module, inner, outer, cuts[outer])
        if outer not in seen:
            seen.add(outer)
            value, cut = values[inner], cuts.get(outer, Cut())
            yield Parameter(
                name=outer,
                shape=tuple(value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                trainable=outer in trained,
                pieces=cut.pieces,
                piece_dim=cut.dim,
                packs=cut.packs,
                joined=cut.joined,
                partial=cut.partial,
            )
