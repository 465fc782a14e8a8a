"""Processes: which of several failures is told. The pipes are real, the children are not."""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from tempfile import mkdtemp
from typing import Any

import cloudpickle
import pytest

from spindle.errors import LostPeerError, RunError, WorkloadError
from spindle.runtime.comms.pulse import Lookout
from spindle.runtime.launch.processes import ProcessWorkers

LOST = LostPeerError("rank 1, AWAIT s0>s1 raised RuntimeError: Connection closed by peer")


class FakeChild:
    """A process that has ended, or not."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        self.killed = False

    def join(self, timeout: float) -> None:
        """It has ended already."""

    def is_alive(self) -> bool:
        return self.exitcode is None and not self.killed

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        """It holds nothing."""


def workers(*answers: Any) -> tuple[ProcessWorkers, list[FakeChild], list[Connection]]:
    """A worker group whose ranks have answered so already: a result, an error, or None for a rank that died."""
    made = object.__new__(ProcessWorkers)
    made._pipes, theirs, children = [], [], []
    made._timeout_s, made._lookout = 5.0, Lookout(lambda: [], 5.0)
    made._sockets = mkdtemp()
    for answer in answers:
        ours, other = Pipe()
        made._pipes.append(ours)
        theirs.append(other)
        children.append(FakeChild(-9 if answer is None else None))
        if answer is None:
            other.close()
        else:
            other.send_bytes(cloudpickle.dumps((not isinstance(answer, Exception), answer)))
    made._children = children  # type: ignore[assignment]
    return made, children, theirs


def test_results_come_by_rank() -> None:
    made, children, theirs = workers("a", "b")
    assert made._results(5.0) == ["a", "b"]
    assert not any(child.killed for child in children)
    made.close()
    assert len(theirs) == 2


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ((None, "fine"), "rank 0 died (exit code -9)"),
        ((None, LOST), "rank 0 died (exit code -9)"),
        ((LOST, None), "rank 1 died (exit code -9)"),
        ((LOST, WorkloadError("the loader")), "the loader"),
        ((WorkloadError("the loader"), LOST), "the loader"),
        ((LOST, "fine"), "Connection closed by peer"),
    ],
)
def test_the_cause_is_told_not_what_follows_from_it_regression(answers: tuple[Any, ...], told: str) -> None:
    """A rank that lost its peer often reports before the death of that peer is seen; then nobody may wait on."""
    made, children, theirs = workers(*answers)
    with pytest.raises((RunError, WorkloadError)) as caught:
        made._results(5.0)
    assert told in str(caught.value)
    assert all(child.killed for child in children if child.exitcode is None)
    assert len(theirs) == len(answers)


def test_ranks_that_do_not_answer_are_named() -> None:
    """After the time for starting up; then all are ended."""
    made, children, theirs = workers("fine", "fine")
    assert made._results(5.0) == ["fine", "fine"]
    with pytest.raises(RunError, match=r"ranks \[0, 1\] did not answer within 0\.01 s; .* raise timeout_s"):
        made._results(0.01)
    assert all(child.killed for child in children)
    assert len(theirs) == 2
