"""Operators of one task: its recording and what analysis found in; operators with code, shapes, costs and rows out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spindle.capture.changes.states import Buffers, Touch, touches
from spindle.capture.codes import Crossing, OnDevice, OperatorCode, OperatorModule, OperatorPart, TaskCode
from spindle.capture.crossing import leaves_of_operators, with_gradient
from spindle.capture.grouping import wire
from spindle.capture.look.trials import Seen, place_of
from spindle.capture.operators import costs
from spindle.capture.operators.assignment import Tied, assigned, no_gradient
from spindle.capture.operators.costs import Cost, ValueSpec
from spindle.capture.operators.naming import Namer
from spindle.capture.operators.parts import divide
from spindle.capture.parallel import Cut, cuts, refuse_bare_reads
from spindle.errors import SpindleWarning, WorkloadError
from spindle.inputs.compilation import Compilation
from spindle.record.functions import counts_batches
from spindle.record.substitutes.randomness import undrawn
from spindle.values.execution import COMPILED
from spindle.values.graph import Operator, Parameter, TensorSpec
from spindle.values.units import SAMPLES
from spindle.workload import Task, Workload

_CPU = OnDevice(torch.device("cpu"))
PACKED = " (attention over packed samples: give it a mask or lengths, see docs/packed.md)"


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
    family: str
    splittable: bool
    mixes: bool


@dataclass(frozen=True)
class TaskOperators:
    """Everything that comes out of one task."""

    operators: list[Operator]
    codes: list[OperatorCode]
    code: TaskCode
    touches: list[Touch]


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
            for path, module in component.module.named_modules(remove_duplicate=False)
        }
        self.specs: dict[str, ValueSpec] = {}  # of tensors between operators, at the full batch
        self.crossing: dict[str, Crossing] = {}  # what each tensor is
        self.drafts: list[_Draft] = []
        self.elsewhere: dict[str, set[str]] = {}  # parameters that operators read of other samples alone
        self.learned_elsewhere: set[str] = set()  # parameters that get a gradient there

    def run(self) -> TaskOperators:
        found = assigned(self.task.name, self.seen, self.wired, self.named, self.namer, self._tied())
        code = found.code
        parts = divide(code, self.seen.whole, (0, self._samples), self.seen.batch.units, _CPU, self._where).operators
        self.few = divide(code, self.seen.few, self.seen.few_bounds, self.seen.batch.units, _CPU, self._where).operators
        mixing = {operator for key, operator in code.glue.items() if key in self.seen.findings.mixing}
        self.elsewhere = self._parameters_elsewhere(code)
        for name in found.order:
            self._draft(name, found.components[name], parts[name], code, name in mixing)
        if not self.specs[code.loss].needs_grad and self.task.weight:
            raise no_gradient(self.task.name)
        costs_by_draft = self._backward_pass(code)
        self._warn_of_whole_operators(costs_by_draft)
        return TaskOperators(
            [self._operator(draft, cost, code) for draft, cost in costs_by_draft],
            [self._code(draft, code) for draft in self.drafts],
            replace(code, learning=frozenset(t for t, spec in self.specs.items() if spec.needs_grad)),
            self._touches(),
        )

    def _tied(self) -> Tied:
        """Each component's own names of parameters that have the name of another component."""
        return {
            name: {
                known: f"{name}.{path}"
                for path, parameter in component.module.named_parameters(remove_duplicate=False)
                if (known := self.name_by_id[id(parameter)]).partition(".")[0] != name
            }
            for name, component in self.workload.components.items()
        }

    def _parameters_elsewhere(self, code: TaskCode) -> dict[str, set[str]]:
        """Parameters that operators read in recordings of other samples, by operator; see `learned_elsewhere`."""
        found: dict[str, set[str]] = {}
        for wired in self.seen.others:
            leaves_by_number = wired.recording.leaves
            self.learned_elsewhere |= {leaves_by_number[n] for n in with_gradient(wired) & leaves_by_number.keys()}
            home = {number: code.glue.get(wired.key(number), "") for number in wired.glue()}
            for name, leaves in leaves_of_operators(wired, {n: name for n, name in home.items() if name}).items():
                own = {leaf for leaf in leaves if isinstance(self.named.get(leaf), nn.Parameter)}
                found.setdefault(name, set()).update(own)
        return found

    def _touches(self) -> list[Touch]:
        """What operators read and change of buffers."""
        buffers = Buffers(self.name_by_id, self.modules, self.named)
        numbers = {id(node): number for number, node in enumerate(self.nodes)}
        changes = self.seen.findings.changes
        return [t for draft in self.drafts for t in touches(draft.name, draft.part, changes, numbers, buffers)]

    @property
    def _samples(self) -> int:
        return self.seen.batch.units.num_samples

    @property
    def _where(self) -> str:
        return f"task {self.task.name!r}"

    # -- one operator ---------------------------------------------------------------------------------------------

    def _draft(self, name: str, component: str, part: OperatorPart, code: TaskCode, mixes: bool) -> None:
        leaves = self.recording.leaves
        own = dict.fromkeys(leaves[r] for n in part.nodes for r in n.refs() if r in leaves)
        if unknown := own.keys() - self.named.keys():
            raise WorkloadError(
                f"{self._where}: buffer {min(unknown)!r} changes, and its module stands in several components; "
                "register it in one, and keep it in a list in the others"
            )
        self.elsewhere[name] = self.elsewhere.get(name, set()) - own.keys()
        own |= dict.fromkeys(sorted(self.elsewhere[name]))
        block = self.modules[part.block.partition("@")[0]] if part.block else None
        module = OperatorModule(block, {leaf: self.named[leaf] for leaf in own})
        splittable = not mixes and part.block not in self.seen.findings.mixing_blocks
        label = type(block).__name__ if block is not None else name.rpartition(".")[2].partition("-")[0]
        inputs = self._input_specs(part, code, name)
        compilation = self._compilation(part)
        work = f"{COMPILED} {label}" if compilation else label
        kind = costs.kind_of(work, module, part, inputs, self.precision, compilation)
        family = costs.family_of(work, module, part, inputs, self.precision, compilation)
        draft = _Draft(name, component, module, part, kind, family, splittable, mixes)
        cost = self._cost(draft, code, None)
        if cost.undrawn:
            raise undrawn(f"{self._where}: {name!r}", cost.undrawn)
        if cost.hidden and any(self.name_by_id[id(p)] in self.cuts for p in module.parameters()):
            raise WorkloadError(
                f"{self._where}: a layer of class {label} is cut by tensor parallelism, but an autograd function of "
                f"its own computes the gradient of {cost.hidden!r} unseen, which cannot be done in parts; use "
                "torch.utils.checkpoint there, or leave out tensor_parallel="
            )
        for what, spec in zip(code.crossing.get(name, ()), cost.outputs, strict=True):
            self.specs[code.tensors[what]], self.crossing[code.tensors[what]] = spec, what
        self.drafts.append(draft)

    def _compilation(self, part: OperatorPart) -> Compilation | None:
        """How the layer of a part is compiled: as the component says that it stands in; code between layers never."""
        component = part.block.partition("@")[0].partition(".")[0]
        return self.workload.components[component].compilation if component else None

    def _cost(self, draft: _Draft, code: TaskCode, live: tuple[bool, ...] | None) -> Cost:
        """Cost of an operator, with a gradient for results that are `live` (None: all)."""
        key = f"{draft.kind}{live or ''}"
        if key not in self.memo.costs:
            specs = self._tensor_specs(draft.name, code)
            try:
                cost = costs.measure(draft.module, draft.part, specs, live, self.precision)
                if draft.part.block:
                    cost = costs.with_all_gradients(cost, draft.module, draft.part, specs, live)
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
        what = f"a layer of class {type(block).__name__}" if block is not None else "its glue"
        return WorkloadError(
            f"{self._where}: {what} runs neither on fake tensors nor on a few samples: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; make it run on any number of samples"
        )

    def _tensor_specs(self, name: str, code: TaskCode) -> list[ValueSpec]:
        return [self.specs[tensor] for tensor in code.reads[name]]

    def _input_specs(self, part: OperatorPart, code: TaskCode, name: str) -> list[ValueSpec]:
        """Tensors of other operators, and tensors computed from the batch."""
        aux = (part.recording.aux[number] for number in part.aux_read())
        return [*self._tensor_specs(name, code), *(ValueSpec(tuple(value.shape), value.dtype) for value in aux)]

    def _backward_pass(self, code: TaskCode) -> list[tuple[_Draft, Cost]]:
        """Which tensors a gradient comes back for, from the loss up: what nothing trained depends on gets none."""
        wanted = {code.loss} if self.specs[code.loss].needs_grad else set[str]()
        found: list[tuple[_Draft, Cost]] = []
        for draft in reversed(self.drafts):
            outputs = code.sent(draft.name)
            live = tuple(tensor in wanted for tensor in outputs)
            cost = self._cost(draft, code, None if all(live) else live)
            draft.kind += costs.live_suffix(live)
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
            assert draft.module.block is not None
            kind = type(draft.module.block).__name__
            number = next(n for n in self.wired.blocks() if nodes[n].block == draft.part.block)
            read = [s for s in self.wired.sources[number] if s in self.wired.frontier]
            mixing = (nodes[s].block in findings.mixing_blocks or self.wired.key(s) in findings.mixing for s in read)
            alone = not draft.mixes and not any(mixing)
            if alone and "." not in draft.part.block:
                return f"{kind} runs whole, as one operator, and mixes samples"
            return f"{kind} mixes samples{self._by_what(draft.module.block)}" if alone else ""
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
                    f"{line} gives values of shape ({' x '.join(map(str, sizes))}) by {name!r} that have no unit: it "
                    "mixes samples, or gives them rows that rows= must count under a name of its own, see "
                    "docs/packed.md"
                )
            if name in ("repeat", "tile"):
                return f"{line} gives the samples in turn by {name!r}; use repeat_interleave, which keeps each together"
            hint = " (batch norm: use GroupNorm)" if "norm" in name else PACKED if "attention" in name else ""
            return (
                f"{line} mixes samples by {name!r}{hint}, or holds the batch size as a number (take it from x.shape[0])"
            )
        return ""

    def _by_what(self, module: nn.Module) -> str:
        """A guess at what in a layer mixes samples, and what to do."""
        norm = next((type(part).__name__ for part in module.modules() if counts_batches(part)), "")
        if norm:
            return f" by its {norm} (use GroupNorm)"
        return PACKED if self.task.rows else ": what it gives for one depends on the others of the batch"

    def _operator(self, draft: _Draft, cost: Cost, code: TaskCode) -> Operator:
        named = self._parameter_names(draft)
        trained = {outer for inner, outer in named if inner in cost.trained}
        if trained or any(spec.needs_grad for spec in cost.outputs):
            trained |= self.elsewhere[draft.name] & self.learned_elsewhere
        return Operator(
            name=draft.name,
            task=self.task.name,
            component=draft.component,
            kind=draft.kind,
            batch_size=self._samples,
            inputs=code.reads[draft.name],
            outputs=tuple(map(self._tensor_spec, code.sent(draft.name))),
            parameters=tuple(_parameters(draft.module, named, trained, self.cuts)),
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            batch_fields=tuple(sorted(self.seen.batch.fields)),
            input_bytes=sum(spec.num_bytes for spec in self._input_specs(draft.part, code, draft.name)),
            activation_bytes=cost.activation_bytes,
            splittable=draft.splittable,
            family=draft.family,
        )

    def _code(self, draft: _Draft, code: TaskCode) -> OperatorCode:
        buffers = draft.module.named_buffers(remove_duplicate=False)
        return OperatorCode(
            name=draft.name,
            module=draft.module,
            inputs=code.reads[draft.name],
            outputs=tuple(code.sent(draft.name)),
            parameters=self._parameter_names(draft),
            buffers=tuple((inner, self.name_by_id[id(b)]) for inner, b in buffers if id(b) in self.name_by_id),
            mixes=draft.mixes or not draft.splittable,
            compilation=self._compilation(draft.part),
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
