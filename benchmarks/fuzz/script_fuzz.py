"""Many random training scripts, each by plain PyTorch and planned: python benchmarks/fuzz/script_fuzz.py [--cases 1000]

As in tests/scripts/test_random_scripts.py. Prints each seed whose planned run is not what one process gives, and a case
made as small as it still fails; and at the end, or when interrupted, how often which sentence refused a script. Exit
code 1 when any failed.
"""

import argparse
import contextlib
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.scripts.random_scripts import Case, all_kinds, kinds_of, random_case, smaller
from tests.scripts.script_runs import verdict_of

FAILS = ("differs", "error", "crash", "invalid")
TOO_LATE, PATIENCE_S = "not done after", 600.0  # a busy machine is slow; a hang is found all the same


@dataclass
class Tally:
    """Verdicts, in all and by kind; and the seeds of each sentence that refused or failed a script."""

    verdicts: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    sentences: dict[str, list[int]] = field(default_factory=dict)

    def add(self, seed: int, case: Case, verdict: str, text: str) -> None:
        """Count a case."""
        self.verdicts[verdict] += 1
        for kind in kinds_of(case):
            self.kinds.setdefault(kind, Counter())[verdict] += 1
        if verdict != "ok":
            sentence = verdict if verdict == "differs" else f"{verdict}: {without_names(text)}"
            self.sentences.setdefault(sentence, []).append(seed)

    def __str__(self) -> str:
        total = ", ".join(f"{number} {verdict}" for verdict, number in self.verdicts.most_common())
        lines = [f"{self.verdicts.total()} cases: {total}"]
        for text, seeds in sorted(self.sentences.items(), key=lambda each: -len(each[1])):
            lines.append(f"{len(seeds)} times (seeds {', '.join(map(str, seeds[:6]))}) {text}")
        lines.append("kinds: exact, refused, failed")
        for kind, seen in sorted(self.kinds.items()):
            lines.append(f"  {kind}: {seen['ok']}, {seen['refused']}, {sum(seen[each] for each in FAILS)}")
        return "\n".join(lines)


def without_names(text: str) -> str:
    """The first line of a text, without names and numbers."""
    return re.sub(r"'[^']*'|\d+(\.\d+)?(e-?\d+)?", "..", text.split("\n", 1)[0])[:400]


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
            if got == verdict and (verdict == "differs" or without_names(its) == without_names(text)):
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
    parser.add_argument("--show", action="store_true", help="print the first case, and run none")
    arguments = parser.parse_args()
    if arguments.without == "list":
        print("\n".join(sorted(all_kinds())))
        return 0
    torch.set_num_threads(1)
    without = frozenset(kind for kind in arguments.without.split(",") if kind)
    if arguments.show:
        print(random_case(arguments.seed, without))
        return 0
    tally, start = Tally(), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            case = random_case(seed, without)
            verdict, text = verdict_of(case)
            if verdict == "crash" and TOO_LATE in text:
                verdict, text = verdict_of(case, PATIENCE_S)
                print(f"seed {seed}: took more than a minute; with {PATIENCE_S:.0f} s it is {verdict}", flush=True)
            tally.add(seed, case, verdict, text)
            if verdict in FAILS:
                small = least(case, verdict, text, arguments.shrink) if arguments.shrink else case
                shown = "\n".join(f"  {line}" for line in text.split("\n")[: arguments.lines])
                print(f"seed {seed}: {verdict}\n{shown}\n least:\n{small}\n", flush=True)
    print(f"{time.monotonic() - start:.0f} s; {tally}")
    return int(any(tally.verdicts[each] for each in FAILS))


if __name__ == "__main__":
    sys.exit(main())
