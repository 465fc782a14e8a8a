"""The page on workloads: runs each `spindle plan` command of docs/workloads.md and writes its result into the page.

python -m benchmarks.pages.workload_page             all of them, some minutes
python -m benchmarks.pages.workload_page qwen        those whose command has this word
python -m benchmarks.pages.workload_page --check     nothing is written; commands that fail are listed
"""

import re
import subprocess
import sys
from pathlib import Path

from spindle.files.formats import loads
from spindle.values.plan import Plan

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "workloads.md"
COMMAND = re.compile(r"^`(spindle plan benchmarks/[^`]+)`$")


def commands(text: str) -> list[str]:
    """Every command of the page, once, in order."""
    found = (COMMAND.match(cell) for line in text.splitlines() for cell in _cells(line))
    return list(dict.fromkeys(match[1] for match in found if match))


def with_results(text: str, results: dict[str, str]) -> str:
    """The page with the result of each command in the cell behind it."""
    lines = []
    for line in text.splitlines():
        cells = _cells(line)
        for index, cell in enumerate(cells[:-1]):
            match = COMMAND.match(cell)
            if match and match[1] in results:
                cells[index + 1] = results[match[1]]
                line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def result_of(plan: Plan, *, is_pinned: bool = False) -> str:
    """Step, gain over the best alternative (or how much quicker that is), expected step, peak memory and degrees, in a
    few words.
    """
    words = [f"{plan.step_s:.3g} s"]
    usual = min((seconds for name, seconds in plan.usual_ways if name != "paper"), default=0.0)
    if plan.task_sets:
        words.append(f"expected {sum(each.share * each.step_s for each in plan.task_sets):.3g} s")
    if not usual:
        words.append("baselines keep no pins" if is_pinned else "no baseline fits")
    elif plan.compared_s < 0.999 * usual:
        words.append(f"{100 * (1 - plan.compared_s / usual):.1f} % shorter")
    elif plan.compared_s > 1.01 * usual:
        words.append(f"the best alternative is {100 * (1 - usual / plan.compared_s):.0f} % shorter")
    else:
        words.append("as fast")
    peak = max(plan.memory.peak_bytes_per_device, default=0.0) / 2**30
    words.append(f"{peak:.0f} GiB" if plan.memory.fits else f"{peak:.0f} GiB, does not fit")
    degrees = {degree for metaop in plan.metagraph or () for _, degree in metaop.tensor_parallel}
    used = degrees & {
        dict(plan.metagraph[s.metaop].tensor_parallel).get(len(s.devices), 1) if plan.metagraph else 1
        for s in plan.slices
    }
    if used:
        words.append(f"tensor parallel {' and '.join(map(str, sorted(used)))}")
    return "; ".join(words)


def run(command: str) -> str:
    """The result of one command, or what it said when it failed."""
    arguments = [sys.executable, "-m", *command.split(), "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        return f"FAILED: {done.stderr.strip().splitlines()[-1]}"
    return result_of(loads(done.stdout, Plan), is_pinned="--pin" in command)


def main(arguments: list[str]) -> int:
    """Run the commands and write the page; 1 when one failed."""
    text = PAGE.read_text(encoding="utf-8")
    words = [word for word in arguments if not word.startswith("-")]
    results: dict[str, str] = {}
    for command in commands(text):
        if all(word in command for word in words):
            results[command] = run(command)
            print(f"{results[command]:60} {command}", flush=True)
    if "--check" not in arguments:
        PAGE.write_text(with_results(text, results), encoding="utf-8")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
