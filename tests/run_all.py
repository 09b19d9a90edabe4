"""Run every test: the engine's in Rust, then the package's in Python. The second command of README.md.

Both run even if the first fails; the exit status is 0 only if both passed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[list[str]]:
    """What to run, in this order. cargo-nextest is faster but leaves the examples in the documentation to cargo."""
    if shutil.which("cargo") is None:
        sys.exit("cargo was not found on PATH; the engine's tests need it (https://rustup.rs)")
    if shutil.which("cargo-nextest"):
        rust = [
            ["cargo", "nextest", "run", "--locked", "--status-level=fail"],
            ["cargo", "test", "--locked", "--quiet", "--doc"],
        ]
    else:
        rust = [["cargo", "test", "--locked", "--quiet"]]
    return [*rust, [sys.executable, "-m", "pytest", "-q", "-n", "auto"]]


def main() -> int:
    """Run the commands, sum up, and return the exit status."""
    lines, status = [], 0
    for command in commands():
        shown = " ".join(["python", *command[1:]] if command[0] == sys.executable else command)
        print(f"\n=== {shown}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        lines.append(f"  {'ok    ' if code == 0 else 'FAILED'}  {time.monotonic() - start:5.0f} s  {shown}")
        status = status or int(code != 0)
    print("\n=== all tests", *lines, sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
