"""Random tasks on batches of changing shapes, planned at random: python benchmarks/fuzz/ragged_fuzz.py [--count 500]

Each is run on threads beside one process, as in tests/ragged/test_ragged.py. Prints what is not exact, made as small as
it still fails, and a summary; exit code 1 when anything is not exact, or more than 2 % are refused.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.ragged.ragged_tasks import Case, random_case, smaller, verdict_of

MOST_REFUSED = 0.02


def least(case: Case, verdict: str, seconds: float = 60.0) -> Case:
    """The smallest case found that has the same verdict."""
    ends = time.monotonic() + seconds
    shrinks = True
    while shrinks and time.monotonic() < ends:
        shrinks = False
        for other in smaller(case):
            if time.monotonic() < ends and verdict_of(other)[0] == verdict:
                case, shrinks = other, True
                break
    return case


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    verdicts: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.count):
        case = random_case(seed)
        verdict, text = verdict_of(case)
        verdicts[verdict] += 1
        if verdict == "ok":
            pieces.update(name for task in case.tasks for name in (*task.pieces, task.loss))
            continue
        small = least(case, verdict)
        print(f"seed {seed}: {verdict}: {text}\n  least: {small}\n  {verdict_of(small)[1]}", flush=True)
    total = sum(verdicts.values())
    told = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common())
    print(f"{total} cases in {time.monotonic() - start:.0f} s: {told}")
    print(f"exact: {sum(pieces.values())} pieces of {len(pieces)} kinds, the rarest {pieces.most_common()[-3:]}")
    return int(verdicts["ok"] + verdicts["refused"] < total or verdicts["refused"] > MOST_REFUSED * total)


if __name__ == "__main__":
    sys.exit(main())
