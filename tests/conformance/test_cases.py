"""Cases as real KVM ran them: every operation's outcome, value, error code, CR2 and counters must be KVM's.

random-*: 215 random guests. directed: the scenarios of the corpus in the form of cases (tools/scenario_cases.py).
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from shadowkvm.kvm import Case, compare, load
from shadowkvm.kvm.generate import THEMES

FILES = sorted((Path(__file__).parent / "data").glob("random-*.json.xz"))
DIRECTED = FILES[0].parent / "directed.json.xz"
PARTS = 16  # of each file: small enough to tell where it broke, large enough to read each file seldom
cases = cache(load)


def test_there_are_enough() -> None:
    whole = [case for path in FILES for case in cases(path)]
    assert len(whole) >= 200
    assert sum(len(case.ops) for case in whole) >= 100_000
    assert {case.theme for case in whole} == set(THEMES)
    assert sum(path.stat().st_size for path in FILES[0].parent.iterdir()) < 1_000_000


def test_every_kind_of_operation_and_outcome_is_there() -> None:
    whole = [case for path in FILES for case in cases(path)]
    kinds = Counter(op.op for case in whole for op in case.ops)
    counters = {name for case in whole for a in case.answers or [] for name in a.counters}
    assert {"rep", "cmpxchg", "slot_del", "unmap", "quota", "dirtylog", "efer", "push", "fetch"} <= set(kinds)
    assert {"mmu_recycled", "mmu_flooded", "pages_2m", "pf_mmio_spte_created", "mmu_unsync"} <= counters
    assert any(case.vcpus == 2 for case in whole)
    assert any(slot.flags & 2 for case in whole for slot in case.slots)


def test_directed_cases_say_what_they_show() -> None:
    directed = cases(DIRECTED)
    assert len(directed) >= 80
    assert len({case.name for case in directed}) == len(directed)
    assert all(case.name and case.shows for case in directed)
    assert any("nx_lpage_splits" in a.counters for case in directed for a in case.answers or [])


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("path", [*FILES, DIRECTED], ids=lambda path: path.name.partition(".")[0])
def test_engine_does_what_kvm_did(path: Path, part: int) -> None:
    bad = [text for case in cases(path)[part::PARTS] if (text := difference(case))]
    if bad:
        pytest.fail("\n".join([*bad, f"to see more: shadowkvm verify {path}"]), pytrace=False)


def difference(case: Case) -> str:
    assert case.answers is not None
    assert case.kernel.startswith("6.1.")
    agreement = compare(case, case.answers)
    assert agreement.ops == len(case.ops)
    if agreement.whole:
        return ""
    first = agreement.first
    return f"{case.title}: {len(agreement.disagreed)} of {agreement.ops} operations differ; the first: {first}"
