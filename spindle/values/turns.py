"""Turns: tasks by turn, each of which runs forward and backward before the next one begins; their rules and words."""

from spindle.errors import PlanError
from spindle.values.metagraph import MetaGraph

Turns = tuple[tuple[str, ...], ...]
"""Tasks by turn; (): all tasks at once."""


def numbered(turns: Turns) -> dict[str, int]:
    """Number of the turn of each task, from 0 up; empty where all run at once.

    >>> numbered((("clip", "caption"), ("vqa",)))
    {'clip': 0, 'caption': 0, 'vqa': 1}
    """
    return {task: number for number, tasks in enumerate(turns) for task in tasks}


def check_turns(turns: Turns, metagraph: MetaGraph | None) -> None:
    """Raise PlanError unless each task is in one turn, and there are none or several, of which none is empty."""
    names = [task for tasks in turns for task in tasks]
    if len(turns) == 1 or not all(turns):
        raise PlanError(
            f"the plan has turns of {', '.join(str(len(tasks)) for tasks in turns)} tasks; give none, or several with "
            "at least one task each"
        )
    twice = next((task for task in names if names.count(task) > 1), None)
    if twice is not None:
        raise PlanError(f"task {twice!r} stands in the plan's turns more than once; name each task once")
    known = metagraph.tasks if turns and metagraph is not None else tuple(names)
    for task in (*names, *known):
        if task not in known or task not in names:
            where = "is no task of its MetaGraph" if task not in known else "is in none of them"
            raise PlanError(f"the plan runs in turns, and {task!r} {where}; name each task once, or give no turns")


def turns_in_words(turns: Turns) -> str:
    """What the turns of a plan are, in one sentence.

    >>> turns_in_words((("clip", "caption"), ("vqa",)))[:44]
    'The tasks run in 2 turns (clip, caption | vq'
    """
    listed = " | ".join(", ".join(tasks) for tasks in turns)
    return (
        f"The tasks run in {len(turns)} turns ({listed}): each turn runs forward and backward before the next begins, "
        "so that only one turn's activations are kept."
    )
