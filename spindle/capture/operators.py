"""Operators of one task: its recording and what analysis found in; operators with code, shapes, costs and rows out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from spindle.capture import costs
from spindle.capture.codes import Crossing, OperatorCode, OperatorModule, OperatorPart, TaskCode
from spindle.capture.costs import Cost, ValueSpec
from spindle.capture.grouping import Group, Key, Wired, group, wire
from spindle.capture.look.trials import Seen, place_of, spread_mixing
from spindle.capture.naming import Namer
from spindle.capture.parallel import Cut, cuts, refuse_bare_reads
from spindle.capture.parts import crossing_values, divide, reads_of_others
from spindle.errors import SpindleWarning, WorkloadError
from spindle.graph import SAMPLES, Operator, Parameter, TensorSpec
from spindle.record.randomness import undrawn
from spindle.units import Place
from spindle.workload import Task, Workload

_CPU = torch.device("cpu")


@dataclass
class Memo:
    """What was found for an operator kind, so that equal layers are looked at once. Shared by all tasks."""

    costs: dict[str, Cost] = field(default_factory=dict)


@dataclass
class _Draft:
    """An operator before it is known which of its outputs a gradient comes back for."""

    name: str
    component: str
    module: OperatorModule
    part: OperatorPart
    kind: str
    splittable: bool
    mixes: bool


@dataclass(frozen=True)
class TaskOperators:
    """Everything that comes out of one task."""

    operators: list[Operator]
    codes: list[OperatorCode]
    code: TaskCode
    loss: str


def build_operators(workload: Workload, task: Task, seen: Seen, namer: Namer, memo: Memo) -> TaskOperators:
    """Build the operators of one task. Raises WorkloadError when its loss needs no gradient."""
    return _Builder(workload, task, seen, namer, memo).run()


class _Builder:
    def __init__(self, workload: Workload, task: Task, seen: Seen, namer: Namer, memo: Memo) -> None:
        self.workload, self.task, self.seen, self.namer, self.memo = workload, task, seen, namer, memo
        self.precision = workload.precision
        self.wired = wire(seen.whole.recording, seen.stateful)
        self.recording, self.nodes = self.wired.recording, self.wired.recording.nodes
        self.cuts = cuts(workload)
        self.named: dict[str, Tensor] = {**dict(workload.named_parameters()), **dict(workload.named_buffers())}
        self.name_by_id = {id(value): name for name, value in self.named.items()}
        self.modules = {
            f"{name}.{path}" if path else name: module
            for name, component in workload.components.items()
            for path, module in component.module.named_modules()
        }
        self.specs: dict[str, ValueSpec] = {}  # of tensors between operators, at the full batch
        self.crossing: dict[str, Crossing] = {}  # what each tensor is
        self.drafts: list[_Draft] = []

    def run(self) -> TaskOperators:
        groups = self._groups()
        names, components = self._names(groups)
        code = self._task_code(names)
        parts = divide(code, self.seen.whole, (0, self._samples), self.seen.batch.units, _CPU, self._where).operators
        self.few = divide(code, self.seen.few, self.seen.few_bounds, self.seen.batch.units, _CPU, self._where).operators
        mixing = {operator for key, operator in code.glue.items() if key in self.seen.findings.mixing}
        for number in self._order(names):
            name = names[number]
            self._draft(name, components[name], parts[name], code, name in mixing)
        loss = code.tensors.get(self._loss(names), "")
        if not loss or not self.specs[loss].needs_grad:
            raise self._no_gradient()
        self.loss = loss
        costs_by_draft = self._backward_pass(code)
        self._warn_of_whole_operators(costs_by_draft)
        return TaskOperators(
            [self._operator(draft, cost, code) for draft, cost in costs_by_draft],
            [self._code(draft, code) for draft in self.drafts],
            code,
            loss,
        )

    @property
    def _samples(self) -> int:
        return self.seen.batch.units.num_samples

    @property
    def _where(self) -> str:
        return f"task {self.task.name!r}"

    def _no_gradient(self) -> WorkloadError:
        return WorkloadError(f"{self._where}: its loss needs no gradient; let it depend on a trained parameter")

    def _loss(self, names: Mapping[int, str]) -> Crossing:
        """What the loss is: which result of which call."""
        loss = self.recording.loss
        if loss not in self.wired.maker:
            raise self._no_gradient()
        return crossing_values(self.wired, names, loss)[names[self.wired.maker[loss]]][loss]

    # -- which node belongs to which operator ---------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """Groups of glue, in which every value that passes between operators can be cut, or mixes samples."""
        findings = self.seen.findings
        if self.recording.loss in self.wired.maker and self.wired.maker[self.recording.loss] in self.wired.repeated:
            raise WorkloadError(f"{self._where}: its loss does not depend on the batch; let it read a field of it")
        while True:
            for wired in (self.wired, *self.seen.others):
                spread_mixing(wired, findings)
            groups = group(self.wired, findings.mixing)
            home = {n: f"{index}" for index, found in enumerate(groups) for n in found.nodes}
            home |= {n: self.nodes[n].block for n in self.wired.blocks()}
            crossing = crossing_values(self.wired, home, self.recording.loss)
            late = {
                what
                for found in crossing.values()
                for what, _, index in found.values()
                if not isinstance(what, str)
                and what not in findings.mixing
                and what not in findings.constant
                and place_of(findings, what, index) is None
            }
            mixed = {key for found in groups if found.mixes for key in found.keys}
            if not late and mixed <= findings.mixing:
                return groups
            findings.mixing.update(late | mixed)  # type: ignore[arg-type]

    def _names(self, groups: list[Group]) -> tuple[dict[int, str], dict[str, str]]:
        """The operator of each node, and the component of each operator; in the order in which they are computed."""
        names: dict[int, str] = {}
        components: dict[str, str] = {}
        loss_maker = self.wired.maker.get(self.recording.loss, -1)
        order: list[tuple[int, Group | None]] = [(min(g.nodes), g) for g in groups if g.nodes]
        order += [(number, None) for number in self.wired.blocks()]
        for number, found in sorted(order, key=lambda pair: pair[0]):
            node = self.nodes[number]
            if found is None:
                component, name = self.namer.block(self.task.name, node.component, node.block.partition("@")[0])
                names[number] = name
            else:
                component = self.namer.component(found.component, self._sizes(found))
                role = "post" if found.has_frontier else "pre"
                if found.mixes:
                    component, role = ("loss", "") if loss_maker in found.nodes else (component, "mix")
                name = self.namer.glue(self.task.name, component, role)
                names |= dict.fromkeys(found.nodes, name)
            components[name] = component
        return names, components

    def _sizes(self, found: Group) -> dict[str, int]:
        """Numbers of the parameters that a group reads, by name."""
        leaves = self.recording.leaves
        names = {leaves[r] for n in found.nodes for r in self.wired.refs[n] if r in leaves}
        return {name: self.named[name].numel() for name in names if name in self.named}

    def _order(self, names: Mapping[int, str]) -> list[int]:
        """The first node of each operator; an operator comes after the operators whose values it reads."""
        done: set[str] = set()
        waits: dict[str, set[str]] = {name: set() for name in names.values()}
        for number, name in names.items():
            waits[name] |= {names[s] for s in self.wired.sources[number] if s in names and names[s] != name}
        first = {name: number for number, name in sorted(names.items(), reverse=True)}
        order: list[int] = []
        while len(done) < len(waits):
            ready = [name for name in waits if name not in done and waits[name] <= done]
            assert ready, "operators wait for each other in a circle"
            chosen = min(ready, key=first.__getitem__)
            done.add(chosen)
            order.append(first[chosen])
        return order

    def _task_code(self, names: Mapping[int, str]) -> TaskCode:
        crossing = crossing_values(self.wired, names, self.recording.loss)
        tensors: dict[Crossing, str] = {}
        for name, found in crossing.items():
            for index, what in enumerate(found.values()):
                tensors[what] = f"{self.task.name}/{name.partition('.')[2]}:{index}"
        number_of = {number: tensors[what] for found in crossing.values() for number, what in found.items()}
        reads: dict[str, dict[str, None]] = {name: {} for name in names.values()}
        for name, ref in reads_of_others(self.wired, names):
            reads[name][number_of[ref]] = None
        glue = {self.wired.key(n): name for n, name in names.items() if not self.nodes[n].block}
        blocks = {self.nodes[n].block: name for n, name in names.items() if self.nodes[n].block}
        for other in self.seen.others:
            self._take_other_way(other, glue, blocks, crossing, tensors)
        return TaskCode(
            task=self.task.name,
            glue=glue,
            blocks=blocks,
            crossing={name: tuple(found.values()) for name, found in crossing.items()},
            tensors=tensors,
            reads={name: tuple(found) for name, found in reads.items()},
            sites=self.seen.sites,
            stateful=self.seen.stateful,
            copies_batch=self.seen.copies_batch,
        )

    def _place(self, what: Crossing) -> Place | None:
        return place_of(self.seen.findings, what[0], what[2])

    def _take_other_way(
        self,
        wired: Wired,
        glue: dict[Key, str],
        blocks: Mapping[str, str],
        crossing: Mapping[str, Mapping[int, Crossing]],
        tensors: dict[Crossing, str],
    ) -> None:
        """Code that only some samples run counts to the operator that it is connected with, of the same frontier and
        component; what it sends in place of what the operator sends otherwise has the same name.
        """
        mixing, nodes = self.seen.findings.mixing, wired.recording.nodes
        changed = True
        while changed:
            changed = False
            for n in wired.glue():
                a = wired.key(n)
                for b in (wired.key(s) for s in wired.sources[n] if s in wired.frontier and not nodes[s].block):
                    alike = a[1:] == b[1:] and (a in mixing) == (b in mixing)
                    if alike and (a in glue) != (b in glue):
                        glue[a if b in glue else b] = glue[b if b in glue else a]
                        changed = True
        home = {n: blocks.get(nodes[n].block, "") for n in wired.blocks()}
        home |= {n: glue.get(wired.key(n), "") for n in wired.glue()}
        if not all(home.values()):
            return
        for name, sent in crossing_values(wired, home, wired.recording.loss).items():
            usual = list(crossing.get(name, {}).values())
            if len(sent) == len(usual):
                for what, expected in zip(sent.values(), usual, strict=True):
                    if self._place(what) == self._place(expected):
                        tensors.setdefault(what, tensors[expected])

    # -- one operator ---------------------------------------------------------------------------------------------

    def _draft(self, name: str, component: str, part: OperatorPart, code: TaskCode, mixes: bool) -> None:
        leaves = self.recording.leaves
        own = dict.fromkeys(leaves[r] for n in part.nodes for r in n.refs() if r in leaves)
        block = self.modules[part.block.partition("@")[0]] if part.block else None
        module = OperatorModule(block, {leaf: self.named[leaf] for leaf in own})
        splittable = not mixes and part.block not in self.seen.findings.mixing_blocks
        label = type(block).__name__ if block is not None else name.rpartition(".")[2].partition("-")[0]
        kind = costs.kind_of(label, module, part, self._input_specs(part, code, name), self.precision)
        draft = _Draft(name, component, module, part, kind, splittable, mixes)
        cost = self._cost(draft, code, None)
        if cost.undrawn:
            raise undrawn(f"{self._where}: {name!r}", cost.undrawn)
        for what, spec in zip(code.crossing.get(name, ()), cost.outputs, strict=True):
            self.specs[code.tensors[what]], self.crossing[code.tensors[what]] = spec, what
        self.drafts.append(draft)

    def _cost(self, draft: _Draft, code: TaskCode, live: tuple[bool, ...] | None) -> Cost:
        """Cost of an operator, with a gradient for those of its results that are `live` (None: all)."""
        key = f"{draft.kind}{live or ''}"
        if key not in self.memo.costs:
            specs = self._tensor_specs(draft.name, code)
            try:
                cost = costs.measure(draft.module, draft.part, specs, live, self.precision)
            except Exception as error:  # whatever fake tensors cannot do: sizes, branches, types that only data tell
                cost = self._cost_on_samples(draft, code, live, error)
            self.memo.costs[key] = cost
        return self.memo.costs[key]

    def _cost_on_samples(self, draft: _Draft, code: TaskCode, live: tuple[bool, ...] | None, error: Exception) -> Cost:
        part, units = self.few[draft.name], self.seen.batch.units
        shapes = [part.recording.shapes[number] for number in part.inputs]
        specs = [replace(s, shape=shape) for s, shape in zip(self._tensor_specs(draft.name, code), shapes, strict=True)]
        try:
            cost = costs.measure_on_samples(draft.module, part, specs, live, self.precision)
        except Exception as second:
            raise self._unmeasured(draft, second) from error
        few = units.rows(SAMPLES, *self.seen.few_bounds)
        full = [draft.part.recording.shapes[number] for number in draft.part.outputs]
        return costs.scaled(cost, self._samples / few, full)

    def _unmeasured(self, draft: _Draft, error: Exception) -> WorkloadError:
        block = draft.module.block
        if isinstance(error, CheckpointError):
            return WorkloadError(
                f"{self._where}: a layer of class {type(block).__name__} draws random numbers under a checkpoint of "
                "its own, which would draw others when it is computed again; switch that off "
                "(gradient_checkpointing_disable()) and name the component in the workload's recompute="
            )
        what = f"a layer of class {type(block).__name__}" if block is not None else "its glue"
        return WorkloadError(
            f"{self._where}: {what} runs neither on fake tensors nor on a few samples: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; make it run on any number of samples"
        )

    def _tensor_specs(self, name: str, code: TaskCode) -> list[ValueSpec]:
        return [self.specs[tensor] for tensor in code.reads[name]]

    def _input_specs(self, part: OperatorPart, code: TaskCode, name: str) -> list[ValueSpec]:
        """Tensors of other operators, and those computed from the batch."""
        aux = (part.recording.aux[number] for number in part.aux_read())
        return [*self._tensor_specs(name, code), *(ValueSpec(tuple(value.shape), value.dtype) for value in aux)]

    def _backward_pass(self, code: TaskCode) -> list[tuple[_Draft, Cost]]:
        """Which tensors a gradient comes back for, from the loss up: what nothing trained depends on gets none."""
        wanted = {self.loss}
        found: list[tuple[_Draft, Cost]] = []
        for draft in reversed(self.drafts):
            outputs = [code.tensors[what] for what in code.crossing.get(draft.name, ())]
            live = tuple(tensor in wanted for tensor in outputs)
            cost = self._cost(draft, code, None if all(live) else live)
            if not all(live):
                draft.kind += "-" + "".join("gn"[not alive] for alive in live)
            wanted |= {t for t, grad in zip(code.reads[draft.name], cost.input_grads, strict=True) if grad}
            found.append((draft, cost))
        for tensor in self.specs:
            self.specs[tensor] = replace(self.specs[tensor], needs_grad=tensor in wanted)
        return found[::-1]

    def _warn_of_whole_operators(self, costs_by_draft: list[tuple[_Draft, Cost]]) -> None:
        """Work beside the loss that one device must do for the whole batch."""
        mixing = [
            (draft, cost)
            for draft, cost in costs_by_draft
            if not draft.splittable and self.recording.loss not in draft.part.outputs
        ]
        whole = [draft for draft, cost in mixing if cost.forward_flops or cost.trained]
        if whole:
            names = [draft.name for draft in whole]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reasons = dict.fromkeys(filter(None, (self._reason(draft) for draft, _ in mixing)))
            warnings.warn(
                f"{self._where}: {', '.join(names[:3])}{more} cannot be sharded over the batch, so each runs on one "
                f"device: {'; '.join(list(reasons)[:3]) or 'it reads what mixes samples'}",
                SpindleWarning,
                stacklevel=6,
            )

    def _reason(self, draft: _Draft) -> str:
        """Why an operator runs on whole batches, with the line that is to blame; "" where another operator is."""
        findings, nodes = self.seen.findings, self.nodes
        if draft.part.block:
            kind = type(draft.module.block).__name__
            number = next(n for n in self.wired.blocks() if nodes[n].block == draft.part.block)
            read = [s for s in self.wired.sources[number] if s in self.wired.frontier]
            mixing = (nodes[s].block in findings.mixing_blocks or self.wired.key(s) in findings.mixing for s in read)
            alone = not draft.mixes and not any(mixing)
            if alone and "." not in draft.part.block:
                return f"{kind} runs whole, as one operator, and mixes samples"
            return f"{kind} mixes samples (batch norm: use GroupNorm)" if alone else ""
        own = set(map(id, draft.part.nodes))
        for n in self.wired.glue():
            if id(nodes[n]) not in own or self.wired.key(n) not in findings.mixing:
                continue
            before = [s for s in self.wired.sources[n] if s in self.wired.frontier and not nodes[s].block]
            if any(self.wired.key(s) in findings.mixing for s in before):
                continue
            name, line = getattr(nodes[n].function, "__name__", "code"), nodes[n].line or "code of torch"
            sizes = self.recording.shapes[nodes[n].outs[0]] if nodes[n].outs else ()
            if nodes[n].writes and not sizes:  # a counter
                continue
            if sizes and not any(findings.places.get(self.wired.key(n), [()])):
                return (
                    f"{line} gives values of shape ({' x '.join(map(str, sizes))}) by {name!r} that go by no unit: it "
                    "mixes samples, or gives them rows that rows= must count under a name of its own, see "
                    "docs/packed.md"
                )
            if name in ("repeat", "tile"):
                return f"{line} gives the samples in turn by {name!r}; use repeat_interleave, which keeps each together"
            return (
                f"{line} mixes samples by {name!r} (batch norm: use GroupNorm), or holds the batch size as a number "
                "(take it from x.shape[0])"
            )
        return ""

    def _operator(self, draft: _Draft, cost: Cost, code: TaskCode) -> Operator:
        named = self._parameter_names(draft)
        trained = {outer for inner, outer in named if inner in cost.trained}
        return Operator(
            name=draft.name,
            task=self.task.name,
            component=draft.component,
            kind=draft.kind,
            batch_size=self._samples,
            inputs=code.reads[draft.name],
            outputs=tuple(self._tensor_spec(code.tensors[what]) for what in code.crossing.get(draft.name, ())),
            parameters=tuple(_parameters(draft.module, named, trained, self.cuts)),
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            batch_fields=tuple(sorted(self.seen.batch.fields)),
            input_bytes=sum(spec.num_bytes for spec in self._input_specs(draft.part, code, draft.name)),
            activation_bytes=cost.activation_bytes,
            splittable=draft.splittable,
        )

    def _code(self, draft: _Draft, code: TaskCode) -> OperatorCode:
        buffers = draft.module.named_buffers(remove_duplicate=False)
        return OperatorCode(
            name=draft.name,
            module=draft.module,
            inputs=code.reads[draft.name],
            outputs=tuple(code.tensors[what] for what in code.crossing.get(draft.name, ())),
            parameters=self._parameter_names(draft),
            buffers=tuple((inner, self.name_by_id[id(b)]) for inner, b in buffers if id(b) in self.name_by_id),
            mixes=draft.mixes or not draft.splittable,
        )

    def _parameter_names(self, draft: _Draft) -> tuple[tuple[str, str], ...]:
        """Names of a module's parameters inside it, each with the workload's name for the same tensor."""
        parameters = draft.module.named_parameters(remove_duplicate=False)
        return tuple((name, self.name_by_id[id(parameter)]) for name, parameter in parameters)

    def _tensor_spec(self, tensor: str) -> TensorSpec:
        spec, (what, _, index) = self.specs[tensor], self.crossing[tensor]
        place = place_of(self.seen.findings, what, index)
        unit, dim = place or ("", 0)
        return TensorSpec(
            name=tensor,
            shape=spec.shape,
            dtype=str(spec.dtype).removeprefix("torch."),
            rows=max(1, round(spec.shape[dim] / self._samples)) if place else 0,
            row_dim=dim,
            unit=unit,
            needs_grad=spec.needs_grad,
        )


def _parameters(
    module: OperatorModule, named: Sequence[tuple[str, str]], trained: set[str], cuts: Mapping[str, Cut]
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
