"""Records the random cases of the suite: each is run twice by real KVM, and what a host's whim changed is cut off.

    python -m tests.conformance.tools.random_cases            # all groups; about 40 minutes
    python -m tests.conformance.tools.random_cases PAE host   # these

Needs what `shadowkvm doctor` names. Do this after every change of the guest's code (harness/*.S): a guest that reads
its own code sees other bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shadowkvm.kvm import Qemu, save
from shadowkvm.kvm.generate import GROUPS
from shadowkvm.kvm.record import record_random

DATA = Path(__file__).parents[1] / "data"
CASES = {"64-bit": 216, "PAE": 120, "two-level": 120, "off": 120, "vcpus": 120, "host": 120}
OPS = 500
FIRST_SEED = 2_000_000


def file_of(group: str, folder: Path = DATA) -> Path:
    """Where the cases of a group stand."""
    return folder / f"random-{group.lower()}.json.xz"


def record_group(group: str, cases: int, seed: int, folder: Path) -> None:
    """Asks KVM, and writes the file."""
    backend = Qemu()
    kept = record_random(backend, cases, OPS, seed, group=group, log=lambda text: print(text, file=sys.stderr))
    path = file_of(group, folder)
    save(path, kept, meta=backend.about())
    print(f"{path}: {len(kept)} cases, {sum(len(c.ops) for c in kept)} operations, {path.stat().st_size} bytes")


def main() -> int:
    for group in sys.argv[1:] or GROUPS:
        record_group(group, CASES[group], FIRST_SEED, DATA)
    return 0


if __name__ == "__main__":
    sys.exit(main())
