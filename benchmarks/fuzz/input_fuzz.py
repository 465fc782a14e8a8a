"""Spoiled files for every command that reads one: python benchmarks/fuzz/input_fuzz.py [--count 100000] [--seed 1]

Valid files of every format are changed (tests/spoiled.py) and read by the commands in this process. atheris guides: a
case that reaches new branches of Spindle is kept, and changed further (pip install atheris; not a dependency). What
breaks a rule is printed; exit code 1 when there is any. `--corpus FILE` holds the cases to begin with, and gets those
that were kept.
"""

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
MEMORY_BYTES = 8 * 2**30
ROOMS = ("cli", "cost", "exchange", "pictures", "planner", "spec", "timeline", "runtime.checkpoints", "runtime.faults")
FLAGS = ("-timeout=0", "-rss_limit_mb=0", "-max_len=100000", "-len_control=0", "-use_counters=0", "-verbosity=0")


def instrumented() -> None:
    """Import what the commands use, with counters at its branches."""
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["spindle"]):
        for room in ("", *(f".{room}" for room in ROOMS)):
            package = importlib.import_module(f"spindle{room}")
            for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                if not found.name.endswith("__main__"):
                    importlib.import_module(found.name)


class Fuzz:
    """Runs cases, and counts their ends."""

    def __init__(self, count: int, minutes: float, corpus: Path, kept: Path) -> None:
        self.count, self.minutes, self.corpus, self.kept = count, minutes, corpus, kept
        self.codes, self.found, self.start_s = Counter[int](), Counter[str](), time.monotonic()

    def one(self, data: bytes) -> None:
        """Run a case; end the process after the last one."""
        from tests.spoiled import Case

        with contextlib.suppress(ValueError):
            case = Case.of(data)
            code, broken = case.verdict()
            self.codes[code] += 1
            if broken:
                self.found[broken] += 1
                if self.found[broken] == 1:
                    print(f"{broken!r}\n  {case.text[:2000]}", flush=True)
        done = self.codes.total()
        if done and done % 5000 == 0:
            print(f"{done} cases in {time.monotonic() - self.start_s:.0f} s", flush=True)
        if done >= self.count or time.monotonic() > self.start_s + 60 * self.minutes:
            self.end()

    def changed(self, data: bytes, most: int, seed: int) -> bytes:
        """A case with another change, or a new one."""
        from tests.spoiled import Case, case, quick, varied

        draw = random.Random(seed)
        try:
            found = quick(varied(Case.of(data), draw), draw) if draw.random() < 0.9 else case(draw)
        except ValueError:
            found = case(draw)
        text = found.text.encode()
        return text if len(text) <= most else case(draw).text.encode()

    def end(self) -> None:
        """Say how it went, and keep the corpus: the shortest cases first."""
        lines = sorted((file.read_text() for file in self.kept.iterdir()), key=len)
        self.corpus.write_text("".join(f"{line}\n" for line in lines if line.startswith("[")))
        ends = ", ".join(f"{code}: {number}" for code, number in sorted(self.codes.items()))
        print(f"{self.codes.total()} cases in {time.monotonic() - self.start_s:.0f} s; exit codes {ends}")
        print(f"{len(lines)} cases kept; {self.found.total()} broke a rule, in {len(self.found)} ways", flush=True)
        os._exit(bool(self.found))  # libFuzzer has no other end than its own


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after this time at the latest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests/printed/corpus.jsonl")
    given = parser.parse_args()
    instrumented()
    from tests.spoiled import Case, prepare
    from tests.spoiled_samples import COMMANDS, SLOW

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    corpus = given.corpus.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        kept = Path("kept")
        kept.mkdir()
        plain = [Case(name, command).text for every in (COMMANDS, SLOW) for name in every for command in every[name]]
        for number, line in enumerate([*plain, *(corpus.read_text().splitlines() if corpus.exists() else [])]):
            (kept / f"{number}").write_text(line)
        fuzz = Fuzz(given.count, given.minutes, corpus, kept)
        flags = [*FLAGS, f"-seed={given.seed}", f"-runs={10 * given.count}", str(kept)]
        atheris.Setup([sys.argv[0], *flags], fuzz.one, custom_mutator=fuzz.changed)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
