"""compare: one trace under several settings, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.guest import CR0, CR4, EFER, PD, PDPT, PML4, PT, entry, rows

import shadowkvm as sk
from shadowkvm.compare import Variant, as_csv, as_json, compare

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A guest that edits its own page table, twice between two flushes."""
    host = [(sk.Op.HOST_WRITE, {"addr": at, "value": int.from_bytes(entry(to), "little")})
            for at, to in ((PML4, PDPT), (PDPT, PD), (PD, PT))]  # fmt: skip
    host += [(sk.Op.HOST_WRITE, {"addr": PT + 8 * page, "value": page << 12 | 0x67}) for page in range(512)]
    edits = [(sk.Op.WRITE, {"addr": PT + 8 * page, "value": page << 12 | 0x67}) for page in (300, 301, 302)]
    guest = [(sk.Op.READ, {"addr": 300 << 12}), *edits, (sk.Op.CR3, {"value": PML4})]
    sregs = {"cr0": CR0, "cr3": PML4, "cr4": CR4, "efer": EFER}
    recording = sk.Recording.from_arrays(rows(*host, *guest, *guest), memory=4 << 20, sregs=sregs, name="edits")
    path = tmp_path / "edits.npz"
    recording.save(path)
    return path


def test_each_variant_is_a_run_of_its_own(trace: Path) -> None:
    seen: list[int] = []
    done = compare(
        trace, [Variant(), Variant(policy="no_unsync")], progress=lambda part: seen.append(round(part * 100))
    )
    table = done.counters()
    assert table["x_ops"] == [525, 525]
    # Out of step once, then free; without unsync each of the six stores is emulated.
    assert table["pf_emulate"] == [0, 6]
    assert table["mmu_pte_write"] == [0, 6]
    assert done.names() == ["kvm", "no_unsync"]
    assert seen[-1] == 100
    assert seen == sorted(seen)


def test_the_newer_kernel_flushes_less(trace: Path) -> None:
    older, newer = compare(trace, [Variant(), Variant("linux-6.12")]).counters()["remote_tlb_flush_requests"]
    assert newer < older


def test_forms(trace: Path) -> None:
    done = compare(trace, [Variant(), Variant("linux-6.12"), Variant(policy="no_prefetch")])
    told = json.loads(as_json(done))
    assert told["schema"] == "shadowkvm.compare/2"
    assert [v["model_version"] for v in told["variants"]] == ["linux-6.1", "linux-6.12", "linux-6.1"]
    assert told["variants"][0]["counters"]["x_ops"] == told["rows"] == 525
    lines = as_csv(done).splitlines()
    assert lines[0] == 'kind,name,"linux-6.1, kvm, zen","linux-6.12, kvm, zen","linux-6.1, no_prefetch, zen"'
    assert sum(line.startswith("counter,") for line in lines) == len(done.counters())
    assert lines[1].split(",") == ["total", "exits", *(str(run.exits) for run in done.runs)]
    cycles = [list(map(int, line.split(",")[2:])) for line in lines if line.startswith("cycles,")]
    for number, run in enumerate(done.runs):
        assert abs(sum(row[number] for row in cycles) - run.account.cycles) <= len(cycles)


def test_the_verb_shows_every_combination(trace: Path, shell: Shell, tmp_path: Path) -> None:
    status, out, err = shell("compare", trace, "--policy", "kvm,no_unsync", "--model-version", "linux-6.1,linux-6.12")
    assert (status, err) == (0, "")
    assert "the same everywhere: profile zen" in out
    assert out.count("vs 1st") == 4
    (line,) = [line for line in out.splitlines() if line.startswith("pf_emulate")]
    assert line.split() == ["pf_emulate", "0", "6", "new", "0", "=", "6", "new"]
    status, out, _ = shell("compare", trace, "-o", tmp_path / "one.json")
    assert (status, out) == (0, "")
    assert len(json.loads((tmp_path / "one.json").read_text())["variants"]) == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--policy", "kvm,kvm"], 2, "is there twice"),
        (["--policy", "kvm,,no_unsync"], 2, "a comma between two"),
        (["--policy", "none"], 2, "'none' is not known"),
        (["--model-version", "linux-5.4"], 2, "linux-6.12"),
        (["--format", "xml"], 2, "xml"),
        (["--mmu", "shadow,nestde"], 2, "did you mean 'nested'"),
        (["--mmu", "nested,nested:cold"], 2, "is there twice"),
        (["--mmu", "nested", "--policy", "none"], 2, "'none' is not known"),
        (["--mmu", "nested", "--policy", "no_unsync"], 2, "no --mmu is that"),
        (["--costs", "zen4"], 2, "did you mean 'zen3'"),
        (["--costs", "none.toml"], 3, "none.toml"),
        (["--scale", "2"], 2, "are for workloads"),
        (["--set", "x=1"], 2, "are for workloads"),
    ],
    ids=str,
)
def test_bad_words(trace: Path, shell: Shell, words: list[str], status: int, message: str) -> None:
    got, out, err = shell("compare", trace, *words)
    assert (got, out) == (status, "")
    assert message in err


def test_a_policy_of_ones_own(trace: Path) -> None:
    class Never(sk.Policy):
        def may_unsync(self, page: sk.PageView) -> bool:
            return False

    done = compare(trace, [Variant(policy=Never()), Variant(policy="no_unsync")])
    assert done.names() == ["Never", "no_unsync"]
    assert done.counters()["pf_emulate"] == [6, 6]
    assert json.loads(as_json(done))["variants"][0]["policy"] == "Never"


def test_a_trace_under_other_mmus(trace: Path, shell: Shell) -> None:
    status, out, err = shell(
        "compare", trace, "--mmu", "shadow,nested,agile", "--policy", "kvm,no_unsync", "--format", "json"
    )
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert [v["mmu"] for v in told["variants"]] == ["shadow", "shadow", "nested", "agile"], "other MMUs know no policy"
    assert told["costs"]["name"] == "zen3"
    for variant in told["variants"]:
        assert variant["mismatches"] == 0
        assert (variant["nested"] is None) == (variant["mmu"] == "shadow")
        cycles = variant["account"]["causes"].values()
        assert sum(c["exit_cycles"] + c["work_cycles"] for c in cycles) == pytest.approx(variant["account"]["cycles"])


def test_a_workload_of_a_size(shell: Shell) -> None:
    words = ("compare", "mmap_cycle", "--scale", "0.05", "--set", "chunk=64K", "--mmu", "nested,nested:warm")
    status, out, err = shell(*words)
    assert (status, err) == (0, "")
    assert "x chunk" in out
    assert "KVM's counters" not in out
    assert "change places" not in out, "a cold second stage is dearer at any cost"
    assert shell(*words, "--format", "csv")[1] == shell(*words, "--format", "csv")[1]
    assert shell("compare", "mmap_cyle")[0] == 2


def test_bad_files_and_nothing_to_compare(tmp_path: Path, shell: Shell) -> None:
    path = tmp_path / "zeros.npy"
    np.save(path, np.zeros(3))
    assert shell("compare", path)[0] == 3
    with pytest.raises(sk.ConfigError, match="nothing to compare"):
        compare(path, [])
