"""Flight records of real runs: a rank fails in some way, and what is left says which one, where, and who waited."""

import re
from pathlib import Path

import pytest

from spindle.errors import RunError
from spindle.runtime.comms.flight import FLIGHT, EventKind
from spindle.runtime.faults.flight_report import first_stopped, read_flight, rows, sentences
from tests.faults.injected import RELEASE, Fault, trained
from tests.faults.recovering import PATIENCE_S

STEP_4 = r"step 4, wave 0, FORWARD s0 \(t\.first\.0\)"


def told_of(folder: Path) -> list[str]:
    """What the record says; its numbers are those of a run that trains."""
    record = read_flight(folder)
    losses = [e for e in record.events() if e.kind is EventKind.LOSS]
    assert {e.step for e in losses} == {1, 2, 3}
    assert all(0 < e.number < 100 for e in losses)
    assert rows(record.events()[-20:], record.last_s)[-1].lstrip().startswith(("-", "0"))
    return sentences(record)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["killed", "stopped", "exits", "raises", "hangs"])
def test_the_rank_that_failed_stopped_first(kind: str, tmp_path: Path) -> None:
    """Rank 1 in its fourth step, also where it was killed with -9 and nobody could ask it; rank 0 waited for it, or was
    on its way to where it would have waited when a failure that is seen at once ended the run.
    """
    fault = Fault(kind, "forward", tmp_path / "faults").armed()
    with pytest.raises(RunError) as caught:
        trained(fault, launcher="processes", timeout_s=PATIENCE_S.get(kind, 30.0), checkpoints=tmp_path / "c")
    assert caught.value.flight == tmp_path / "c"
    told = told_of(tmp_path / "c")
    assert re.search(r"^The run ended at 20.*: rank 1.*", told[0])
    assert re.search(rf"^Rank 1 \(.*\) stopped first: .*\. It was in {STEP_4}, for \d", told[1]), told
    waited = "waiting for other ranks " if kind in ("stopped", "hangs") else "(waiting for other ranks )?"
    assert re.search(rf"^Rank 0 was {waited}in step 4, ", told[2]), told


def test_a_rank_that_raises_in_a_thread(tmp_path: Path) -> None:
    fault = Fault("raises", "optimizer", tmp_path / "faults").armed()
    with pytest.raises(RunError):
        trained(fault, launcher="threads", checkpoints=tmp_path / "c")
    rank, why = first_stopped(read_flight(tmp_path / "c"))
    assert (rank.rank, why) == (1, "it failed: rank 1, STEP raised ValueError: too hot")


def test_a_run_that_ends_well_leaves_no_record(tmp_path: Path) -> None:
    trained(Fault("raises", "forward", tmp_path / "none"), launcher="threads", checkpoints=tmp_path / "c")
    assert not (tmp_path / "c" / FLIGHT).exists()


def test_a_rank_that_hangs_in_a_thread(tmp_path: Path) -> None:
    fault = Fault("hangs", "forward", tmp_path / "faults").armed()
    RELEASE.clear()
    try:
        with pytest.raises(RunError, match="rank 1 hangs"):
            trained(fault, launcher="threads", timeout_s=1.0, checkpoints=tmp_path / "c")
    finally:
        RELEASE.set()
    rank, why = first_stopped(read_flight(tmp_path / "c"))
    assert (rank.rank, why) == (1, "so the driver found")
