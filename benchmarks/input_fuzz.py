"""Spoiled files for every command that reads one: python benchmarks/input_fuzz.py [--count 100000]

Valid files of every format are changed (tests/spoiled.py) and read by the commands in this process. What breaks a rule
is printed, and its file kept; exit code 1 when there is any.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.spoiled import case, prepare

MEMORY_BYTES = 6 * 2**30


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--keep", type=Path, default=Path("input-fuzz"), help="where files go that break a rule")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    keep, codes, found, start = arguments.keep.resolve(), Counter[int](), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        for seed in range(arguments.first, arguments.first + arguments.count):
            one = case(seed)
            code, broken = one.verdict()
            codes[code] += 1
            if not broken:
                continue
            found[broken] += 1
            if found[broken] == 1:
                keep.mkdir(exist_ok=True)
                (keep / f"{seed}-{one.name}").write_bytes(one.data)
                print(f"seed {seed}: spindle {' '.join(one.command)}: {broken!r}", flush=True)
    ends = ", ".join(f"{code}: {number}" for code, number in sorted(codes.items()))
    print(f"{arguments.count} cases in {time.monotonic() - start:.0f} s; exit codes {ends}")
    print(f"{sum(found.values())} broke a rule, in {len(found)} ways")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
