"""Probing: pieces of a task in, what runs on a few samples show of them out: rows of values, codes of aux values, and
the costs of what fake tensors cannot run through.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointError

from spindle.capture import costs
from spindle.capture.blocks import BlockModule
from spindle.capture.codes import AuxCode, CodeInput
from spindle.capture.costs import Cost, ValueSpec
from spindle.capture.draws import Stream, drawing_from
from spindle.capture.extract import Extracted, Extractor
from spindle.capture.rewrite import unchecked_shares
from spindle.capture.rows import (
    FAILURES,
    PROBE_SAMPLES,
    Finding,
    Rows,
    Tolerant,
    agreed,
    compare,
    disturbed,
    jittered,
)
from spindle.capture.tracing import TracedTask
from spindle.errors import WorkloadError
from spindle.workload import Batch, Precision, Task


class Fragile(Exception):
    """A piece runs on real samples but not on shuffled ones: it demands an order of its integers."""


class Prober:
    """Runs pieces of one task on a few samples: real ones, and shuffled ones.

    `fragile`: shuffled samples stop some piece. Then there are gently disturbed ones too, which count where shuffled
    ones give nothing.

    `rows` are those of tensors between operators, `probes` their values, one a trial, None where they cannot be had;
    who runs a piece enters what it gives.
    """

    def __init__(
        self, task: Task, traced: TracedTask, extractor: Extractor, batch: Batch, *, fragile: bool = False
    ) -> None:
        self.task, self.traced, self.extractor, self.batch = task, traced, extractor, batch
        self.samples = min(PROBE_SAMPLES, task.batch_size)
        self.generator = torch.Generator().manual_seed(0)
        probe = {name: value[: self.samples].cpu() for name, value in batch.items()}
        self.fragile = fragile
        self.trials = [probe, disturbed(probe, self.generator)]
        if fragile:
            self.trials.append(disturbed(probe, self.generator, gently=True))
        self.rows: dict[fx.Node, Rows | None] = {}
        self.probes: dict[fx.Node, list[Any]] = {}
        self.aux: dict[fx.Node, AuxCode] = {}
        self.specs_of_aux: dict[fx.Node, ValueSpec] = {}

    def run(self, code: Extracted) -> tuple[list[Finding], list[list[Any]]]:
        """Findings for the results of `code`, and their values on the whole probe in each trial."""
        interpreter = Tolerant(jittered(code.module, self.generator))
        findings: list[list[Finding]] = []
        values: list[list[Any]] = []
        for trial, batch in enumerate(self.trials):

            def run(low: int, high: int, trial: int = trial, batch: Batch = batch) -> list[Any]:
                arguments = self._probe_inputs(code, trial, batch, low, high)
                with (
                    torch.no_grad(),
                    unchecked_shares(),
                    drawing_from(Stream(step=trial, task=self.task.name, low=low)),
                ):
                    return list(interpreter.run(high - low, *arguments))

            values.append(run(0, self.samples))
            findings.append(compare(values[-1], run, self.samples, known=len(code.results)))
        by_result = list(zip(*values, strict=True)) if code.results else []
        return [self._agreed(*pair) for pair in zip(zip(*findings, strict=True), by_result, strict=True)], values

    def _agreed(self, findings: Sequence[Finding], values: Sequence[Any]) -> Finding:
        """What all trials agree on that gave a value."""
        if values[0] is not None and values[1] is None:
            if not self.fragile:
                raise Fragile
            if values[2] is not None:
                findings = [findings[0], findings[2]]
        return agreed(findings)

    def _probe_inputs(self, code: Extracted, trial: int, batch: Batch, low: int, high: int) -> Iterator[Tensor | None]:
        for node, given in zip(code.arguments, code.inputs[1:], strict=True):
            if given.kind == "aux":
                yield self._aux_probe(self.aux_code(node), batch, low, high)
                continue
            value, rows = self.probes[node][trial], self.rows[node]
            if value is not None and rows is not None:
                value = value.narrow(rows.dim, low * rows.count, (high - low) * rows.count)
            yield value

    def _aux_probe(self, code: AuxCode, batch: Batch, low: int, high: int) -> Tensor | None:
        try:
            with unchecked_shares():
                return code.value(batch, low, high, self.samples)
        except FAILURES:
            return None

    def aux_code(self, node: fx.Node) -> AuxCode:
        """Code of the aux value that a node stands for."""
        if node not in self.aux:
            code = self.extractor.aux(node)
            fields = tuple(self.traced.fields[argument.name] for argument in code.arguments)
            name = f"batch.{fields[0]}" if node.op == "placeholder" else node.name
            self.aux[node] = self._classified(f"{self.task.name}/{name}", code.module, fields)
        return self.aux[node]

    def _classified(self, name: str, module: fx.GraphModule, fields: tuple[str, ...]) -> AuxCode:
        interpreter = Tolerant(module)

        def run_on(batch: Batch) -> Finding:
            def run(low: int, high: int) -> Sequence[Any]:
                found: Sequence[Any] = interpreter.run(high - low, *(batch[field][low:high] for field in fields))
                return found

            with torch.no_grad(), unchecked_shares():
                return compare(run(0, self.samples), run, self.samples, known=1)[0]

        finding = agreed([run_on(batch) for batch in self.trials])
        constant = finding.rows is None and finding.independent and not fields
        rows = finding.rows or Rows(0, 0)
        return AuxCode(
            name=name,
            task=self.task.name,
            module=module,
            fields=fields,
            whole=not (constant or (finding.independent and finding.rows is not None)),
            rows=rows.count,
            row_dim=rows.dim,
        )

    def aux_spec(self, node: fx.Node) -> ValueSpec:
        """Shape and type of an aux value at the full batch."""
        if node not in self.specs_of_aux:
            size = self.task.batch_size
            value = self.aux_code(node).value(self.batch, 0, size, size)
            self.specs_of_aux[node] = ValueSpec(tuple(value.shape), value.dtype)
        return self.specs_of_aux[node]

    def value(self, node: fx.Node, given: CodeInput) -> Tensor | None:
        """The first trial's value of an input; None where it cannot be had."""
        if given.kind == "aux":
            return self._aux_probe(self.aux_code(node), self.trials[0], 0, self.samples)
        value: Tensor | None = self.probes[node][0]
        return value

    # -- costs ----------------------------------------------------------------------------------------------------

    def cost(
        self,
        code: Extracted,
        specs: Sequence[ValueSpec],
        live: tuple[bool, ...] | None,
        rows: Sequence[Rows | None],
        precision: Precision,
        error: Exception,
    ) -> Cost:
        """What `code`, with inputs of `specs` and results of `rows`, costs by a run on the samples; `error` is what it
        raised on fake tensors. Raises WorkloadError where it does not run on the samples either.
        """
        arguments = zip(code.arguments, code.inputs[1:], strict=True)
        values = [value for node, given in arguments if (value := self.value(node, given)) is not None]
        if len(values) < len(specs):
            raise self._unmeasured(code, error) from error
        try:
            twin = jittered(code.module, self.generator)
            cost = costs.measure_on_samples(twin, self.samples, values, specs, live, precision)
        except FAILURES as second:
            raise self._unmeasured(code, second) from error
        grown = [(row.dim, row.count) if row else None for row in rows]
        return costs.at_full_batch(cost, self.samples, self.task.batch_size, grown)

    def _unmeasured(self, code: Extracted, error: Exception) -> WorkloadError:
        blocks = [module.module for module in code.module.modules() if isinstance(module, BlockModule)]
        what = f"a layer of class {type(blocks[0]).__name__}" if blocks else "its glue"
        if isinstance(error, CheckpointError):
            return WorkloadError(
                f"task {self.task.name!r}: {what} draws random numbers under a checkpoint of its own, which would draw "
                "others when it is computed again; switch that off (gradient_checkpointing_disable()) and name the "
                "component in the workload's recompute="
            )
        return WorkloadError(
            f"task {self.task.name!r}: {what} runs neither on fake tensors nor on {self.samples} samples: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; make it run on any number of samples"
        )
