"""Evaluation of a run: an Evaluation and a training program in; what each rank evaluates beside that out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spindle.capture import capture
from spindle.capture.codes import Captured
from spindle.errors import WorkloadError
from spindle.evaluation import Evaluation, evaluation_mode
from spindle.runtime.checkpoints.tensor_files import Source
from spindle.runtime.checkpoints.weights import own_sources
from spindle.runtime.controller import Prepared, prepare
from spindle.runtime.evaluation.evaluator import EvaluationSpec, Scoring
from spindle.runtime.laws import check_program
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.programs.forward import plan_beside, with_rows
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.parts import parts_of
from spindle.runtime.programs.program import Program
from spindle.runtime.rank_spec import RankSpec, as_needed
from spindle.values.contract import contract
from spindle.values.plan import Plan


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation lowered for the ranks of a run."""

    evaluation: Evaluation
    captured: Captured
    program: Program
    recipe: Recipe

    def added(self, specs: Sequence[RankSpec], weights: Mapping[str, Source] | None = None) -> list[RankSpec]:
        """The rank specs of the ranks, which evaluate too. `weights`: where parameters lie that are on the
        meta device.
        """
        found = []
        groups = dict.fromkeys((*specs[0].groups, *self.program.groups))
        links = dict.fromkeys((*specs[0].links, *self.program.links))
        scoring = Scoring(self.evaluation.measures)
        names = self.program.operators_by_rank
        for spec, own, part in zip(specs, names, parts_of(self.program), strict=True):
            codes = {name: self.captured.codes[name] for name in own}
            loads = self.program.loaded_by(spec.rank)
            evaluated = EvaluationSpec(
                program=part,
                codes=codes,
                recipe=self.recipe,
                tasks={n: as_needed(task, loads=n in loads) for n, task in self.evaluation.tasks.items()},
                scoring=scoring,
                precision=self.captured.precision,
                gathered_bytes=self.evaluation.gathered_bytes,
                ema=self.evaluation.ema,
            )
            read = {**spec.weights, **own_sources(weights or {}, codes.values())}
            found.append(replace(spec, evaluation=evaluated, groups=tuple(groups), links=tuple(links), weights=read))
        return found


def prepare_beside(evaluation: Evaluation, prepared: Prepared) -> PreparedEvaluation:
    """An evaluation on the ranks that hold what it computes with, while `prepared` is trained.

    Raises WorkloadError for tasks that change what training holds, PlanError where no device holds what a layer needs.
    """
    workload = evaluation.forward_workload()
    if workload.components != prepared.workload.components:
        raise WorkloadError(
            f"the evaluation is of workload {workload.name!r}, whose components are not those of the trained workload; "
            "make the Evaluation of the workload that you train"
        )
    changing = frozenset(prepared.captured.skeleton.stateful)
    with evaluation_mode(workload):
        captured = capture(workload, changing=changing)
        _refuse_changes(captured)
        needs = _held(captured, changing)
        metagraph = contract(captured.graph)
        training = prepared.program
        plan = plan_beside(training, _held(prepared.captured, changing), metagraph, captured.graph, needs)
        program = lower(
            plan,
            metagraph,
            captured.graph,
            losses=captured.losses,
            weights=captured.weights,
            varying={name for name, task in workload.tasks.items() if task.rows is not None},
        )
        program = with_rows(program, training, needs)
        check_program(program)
        recipe = Recipe.of(workload, captured).apart()
    return PreparedEvaluation(evaluation, captured, program, recipe)


def prepare_alone(evaluation: Evaluation, plan: Plan) -> tuple[Prepared, PreparedEvaluation]:
    """An evaluation that is all that a run does, under a plan of its forward-only tasks."""
    workload = evaluation.forward_workload()
    with evaluation_mode(workload):
        prepared = prepare(workload, plan)
        _refuse_changes(prepared.captured)
        recipe = Recipe.of(workload, prepared.captured).apart()
    return prepared, PreparedEvaluation(evaluation, prepared.captured, prepared.program, recipe)


def _held(captured: Captured, changing: frozenset[str]) -> dict[str, frozenset[str]]:
    """Parameters and changing buffers that each operator holds."""
    return {
        name: frozenset(
            (*(each for _, each in code.parameters), *(each for _, each in code.buffers if each in changing))
        )
        for name, code in captured.codes.items()
    }


def _refuse_changes(captured: Captured) -> None:
    """An evaluation writes to no parameter and counts no batch."""
    for write in captured.graph.writes:
        where = f", {write.line}," if write.line else ""
        raise WorkloadError(
            f"evaluation task {write.task!r}{where} writes to parameter {write.target!r}; an evaluation leaves "
            "parameters alone, so do that where the module trains (if self.training)"
        )
    users: dict[str, str] = {}
    for operator in captured.graph:
        for state in operator.states:
            if users.setdefault(state, operator.task) != operator.task:
                raise WorkloadError(
                    f"evaluation tasks {users[state]!r} and {operator.task!r} both change or read "
                    f"{captured.graph.named(state)}, though modules are in eval mode, so that the scores of one would "
                    "depend on the other's batches; leave the buffer alone there (if self.training), or evaluate them "
                    "in two evaluations"
                )
        for layer in operator.statistics:
            raise WorkloadError(
                f"evaluation task {operator.task!r} counts its batches into the running statistics of {layer!r}, "
                "though its modules are in eval mode; call it with training=False"
            )
