"""Many random training scripts, each by plain PyTorch and planned: python benchmarks/script_fuzz.py [--cases 1000]

As in tests/parity/test_random_scripts.py. Prints each seed whose planned run is not what one process gives, with a case
made as small as it still fails; and at the end how often which sentence refused a script. Exit code 1 when any failed.
"""

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.random_scripts import Case, all_kinds, kinds_of, random_case, smaller
from tests.script_runs import verdict_of

FAILS = ("differs", "error", "crash", "invalid")


def kind_of(text: str) -> str:
    """The first line of a text, without names and numbers."""
    first = re.sub(r"'[^']*'|\d+(\.\d+)?(e-?\d+)?", "..", text.split("\n", 1)[0])
    return first[:400]


def least(case: Case, verdict: str, text: str, seconds: float) -> Case:
    """The smallest case found that fails in the same way."""
    ends = time.monotonic() + seconds
    shrinks = True
    while shrinks and time.monotonic() < ends:
        shrinks = False
        for other in smaller(case):
            if time.monotonic() > ends:
                break
            got, its = verdict_of(other)
            if got == verdict and (verdict == "differs" or kind_of(its) == kind_of(text)):
                case, shrinks = other, True
                break
    return case


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--without", default="", help="kinds to leave out, with commas; 'list' prints all")
    parser.add_argument("--shrink", type=float, default=40.0, help="seconds to make a failing case smaller")
    parser.add_argument("--lines", type=int, default=6, help="of each failure that are printed")
    arguments = parser.parse_args()
    if arguments.without == "list":
        print("\n".join(sorted(all_kinds())))
        return 0
    torch.set_num_threads(1)
    without = [kind for kind in arguments.without.split(",") if kind]
    verdicts: Counter[str] = Counter()
    refusals: dict[str, list[int]] = {}
    failed: dict[str, list[int]] = {}
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in sorted(all_kinds())}
    start = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        case = random_case(seed, without)
        verdict, text = verdict_of(case)
        verdicts[verdict] += 1
        for kind in kinds_of(case):
            kinds[kind][verdict] += 1
        if verdict == "refused":
            refusals.setdefault(kind_of(text), []).append(seed)
        if verdict in FAILS:
            small = least(case, verdict, text, arguments.shrink) if arguments.shrink else case
            failed.setdefault(f"{verdict}: {kind_of(text)}" if verdict != "differs" else verdict, []).append(seed)
            shown = "\n".join(f"  {line}" for line in text.split("\n")[: arguments.lines])
            print(f"seed {seed}: {verdict}\n{shown}\n least:\n{small}\n", flush=True)
    total = sum(verdicts.values())
    print(
        f"{total} cases in {time.monotonic() - start:.0f} s: "
        + ", ".join(f"{n} {v}" for v, n in verdicts.most_common())
    )
    for title, found in (("failed", failed), ("refused", refusals)):
        for text, seeds in sorted(found.items(), key=lambda each: -len(each[1])):
            print(f"{title} {len(seeds)} times (seeds {', '.join(map(str, seeds[:6]))}): {text}")
    print("kinds (exact, refused, failed):")
    for kind, seen in kinds.items():
        if seen:
            print(f"  {kind}: {seen['ok']}, {seen['refused']}, {sum(seen[each] for each in FAILS)}")
    return int(any(verdicts[each] for each in FAILS))


if __name__ == "__main__":
    sys.exit(main())
