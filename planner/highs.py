"""HiGHS: LPs solved in this process, by one thread, without output."""

import highspy

from spindle.errors import PlanError

THREADS = 1
"""HiGHS takes the number of its first LP for all LPs of a process, so all of ours say the same."""


def make_highs(**options: object) -> highspy.Highs:
    """A solver with these options beside ours."""
    highs = highspy.Highs()
    for option, value in {"output_flag": False, "threads": THREADS, **options}.items():
        highs.setOptionValue(option, value)
    return highs


def is_solved(highs: highspy.Highs) -> bool:
    """Solve the LP that it holds; whether an optimum was found. Raises PlanError where it was not even tried, for
    instance since other code of this process uses HiGHS with other threads: plans would get worse without a word.
    """
    if highs.run() == highspy.HighsStatus.kError:
        raise PlanError(
            f"HiGHS {highs.version()} did not run, which plans need; if other code in this process uses it, let it set "
            f"threads={THREADS} too"
        )
    return bool(highs.getModelStatus() == highspy.HighsModelStatus.kOptimal)
