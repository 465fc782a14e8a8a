"""One GPU in under eight minutes: does what runs there agree with one process, and are steps and memory as predicted?

    python benchmarks/gpu.py [--device cpu] [--small] [--ranks 1 2 3] [-o FILE]

Each part runs in a process of its own, which is ended after its time. Each result is a line of JSON as soon as it is
there. Exit code 1 when something differs, fails or takes too long. On a CPU it shows that the script itself works.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = {"parity": 150.0, "predicted": 180.0, "overhead": 120.0}  # 450 s together


def results(part: str, device: str, ranks: list[int], *, small: bool) -> Iterator[dict[str, Any]]:
    """What a part finds, one after the other."""
    from on_gpu import parity, speed

    if part == "parity":
        return parity.checked(device, ranks, small=small)
    return (speed.predicted if part == "predicted" else speed.overhead)(device, small=small)


def run_part(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own; its lines, and one on how it ended."""
    command = [sys.executable, __file__, "--part", part, "--device", options.device]
    command += ["--small"] * options.small + ["--ranks", *map(str, options.ranks)]
    began_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as child:
        limit = threading.Timer(LIMIT_S[part], os.killpg, (child.pid, signal.SIGKILL))  # and what it started
        limit.start()
        assert child.stdout is not None
        yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
        code = child.wait()
        limit.cancel()
    took_s = time.monotonic() - began_s
    ended = "" if code == 0 else f"exit code {code}" if code != -signal.SIGKILL else f"not done in {LIMIT_S[part]:g} s"
    yield {"part": part, "ended": ended or "well", "ok": not ended, "seconds": round(took_s, 1)}


def hardware(device: str) -> dict[str, Any]:
    """What this runs on."""
    import torch

    import spindle

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"device": device, "name": name, "torch": torch.__version__, "spindle": spindle.__version__}


def main() -> None:
    """Print a line of JSON a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a few seconds of tiny models")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="of parity; several share the device")
    parser.add_argument("--parts", nargs="+", choices=list(LIMIT_S), default=list(LIMIT_S))
    parser.add_argument("--part", choices=list(LIMIT_S), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.part:
        for found in results(options.part, options.device, options.ranks, small=options.small):
            print(json.dumps({"part": options.part, **found}), flush=True)
        return
    lines = [hardware(options.device)]
    print(json.dumps(lines[0]), flush=True)
    for part in options.parts:
        for found in run_part(part, options):
            lines.append(found)
            print(json.dumps(found), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(line) + os.linesep for line in lines))
    sys.exit(0 if all(line.get("ok", True) for line in lines) else 1)


if __name__ == "__main__":
    main()
