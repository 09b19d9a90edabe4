"""Cases as real KVM ran them: every operation's outcome, value, error code, CR2 and counters must be KVM's.

random-*: random guests, a file for each group (tools/random_cases.py). directed: the scenarios of the corpus in the
form of cases, and more of that kind (tools/scenario_cases.py, own_cases.py).
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tests.conformance.corpus import load as load_corpus

from shadowkvm.kvm import Case, compare, load
from shadowkvm.kvm.case import GUEST_OPS, HOST_OPS
from shadowkvm.kvm.generate import GROUPS, THEMES

DATA = Path(__file__).parent / "data"
FILES = {group: DATA / f"random-{group.lower()}.json.xz" for group in GROUPS}
DIRECTED = DATA / "directed.json.xz"
PARTS = 16  # of each file: small enough to tell where it broke, large enough to read each file seldom
cases = cache(load)


@pytest.mark.parametrize("group", GROUPS)
def test_there_are_enough(group: str) -> None:
    whole = cases(FILES[group])
    assert len(whole) >= (200 if group == "64-bit" else 100)
    assert sum(len(case.ops) for case in whole) >= 0.99 * 500 * len(whole)
    assert {case.theme for case in whole} == {name for name, theme in THEMES.items() if theme.group == group}


def test_the_recordings_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 4_000_000


def test_every_kind_of_operation_and_outcome_is_there() -> None:
    whole = [case for path in [*FILES.values(), DIRECTED] for case in cases(path)]
    kinds = Counter(op.op for case in whole for op in case.ops)
    counters = {name for case in whole for a in case.answers or [] for name in a.counters}
    assert set(kinds) == GUEST_OPS | HOST_OPS
    assert {"mmu_recycled", "mmu_flooded", "pages_2m", "pf_mmio_spte_created", "mmu_unsync", "pf_fast"} <= counters
    outcomes = {a.status for case in whole for a in case.answers or []}
    assert outcomes == {"done", "page_fault", "mmio", "general_protection", "double_fault", "shutdown"}
    assert any(case.vcpus == 3 for case in whole)
    assert any(slot.flags & 2 for case in whole for slot in case.slots)
    assert {case.manual_dirty for case in whole} == {0, 1, 3}


def test_directed_cases_say_what_they_show() -> None:
    directed = cases(DIRECTED)
    names = [case.name for case in directed]
    assert len(set(names)) == len(names)
    assert all(case.name and case.shows and case.ops for case in directed)
    assert any("nx_lpage_splits" in a.counters for case in directed for a in case.answers or [])
    # Every scenario is there, also those of which no run was published.
    corpus = load_corpus()
    assert {*corpus.scenarios, *corpus.not_in_corpus} <= {name.partition(" ")[0] for name in names}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("path", [*FILES.values(), DIRECTED], ids=lambda path: path.name.partition(".")[0])
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
