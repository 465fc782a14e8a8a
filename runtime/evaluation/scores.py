"""Scores: the scores of a run by step in; when it evaluates next, its best checkpoint, and whether it stops, out.

All of it is a function of the scores, which checkpoints hold, so that a resumed run decides as one that never stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from spindle.errors import WorkloadError
from spindle.evaluation import EarlyStop, Evaluation, Goal, check_evaluation
from spindle.metrics import Scores
from spindle.words.whole_numbers import is_whole


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """A run evaluates after each `every` steps, keeps the `best` checkpoint, and stops by `stop`, with its goal."""

    every: int
    best: Goal | None = None
    stop: tuple[Goal, EarlyStop] | None = None

    @classmethod
    def asked(
        cls,
        evaluation: Evaluation | None,
        every: int | None,
        *,
        keep_best: str | None,
        early_stop: EarlyStop | None,
        saves: bool,
    ) -> "Evaluations | None":
        """What a user has asked for; None: no evaluation. Raises WorkloadError for settings that do not fit."""
        if evaluation is not None:
            check_evaluation(evaluation)
        if early_stop is not None and not isinstance(early_stop, EarlyStop):
            raise WorkloadError(
                f"early_stop is {early_stop!r}; give spindle.EarlyStop(metric='task:loss', patience=3) or the like"
            )
        if (evaluation is None) != (every is None):
            lacks = "evaluation=" if evaluation is None else "evaluate_every="
            raise WorkloadError(f"{lacks} is missing; give both evaluation= and evaluate_every=, or none")
        if evaluation is not None and evaluation.ema and evaluation.workload.ema is None:
            raise WorkloadError(
                "the evaluation is on running averages of the weights (ema=True), and the workload keeps none; make it "
                "with Workload(ema=0.999)"
            )
        best = Goal.parse("keep_best", keep_best, evaluation) if keep_best is not None else None
        if best is not None and not saves:
            raise WorkloadError(f"keep_best is {keep_best!r}, but no checkpoints are written; give checkpoints=DIR")
        stop = (Goal.parse("early_stop", early_stop.metric, evaluation), early_stop) if early_stop else None
        if every is None:
            return None
        if not is_whole(every, 1):
            raise WorkloadError(f"evaluate_every is {every!r}; give the steps between evaluations, at least 1")
        return cls(every=every, best=best, stop=stop)

    def is_due(self, step: int, scores: Mapping[int, Scores]) -> bool:
        """Whether a run evaluates now, after `step` steps."""
        return step > 0 and step % self.every == 0 and step not in scores

    def best_of(self, scores: Mapping[int, Scores]) -> int | None:
        """After how many steps the best checkpoint was written: of equal ones the first."""
        if self.best is None:
            return None
        found, best = None, None
        for step in sorted(scores):
            value = self.best.of(scores[step])
            if self.best.improves(value, best):
                found, best = step, value
        return found

    def stopped(self, scores: Mapping[int, Scores]) -> str:
        """Why training stops, in a sentence; "": it goes on."""
        if self.stop is None:
            return ""
        goal, limits = self.stop
        best, since = None, 0
        for step in sorted(scores):
            value = goal.of(scores[step])
            if goal.improves(value, best, limits.min_delta):
                best, since = value, 0
            else:
                since += 1
            if since >= limits.patience:
                so_far = "no finite number yet" if best is None else f"the best is {best:.6g}"
                return (
                    f"{goal.task}:{goal.metric} has not improved in {since} evaluations "
                    f"(after step {step} it is {value:.6g}, {so_far})"
                )
        return ""
