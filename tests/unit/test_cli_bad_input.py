"""The command line over what it cannot use: one line on stderr, the right exit status, no part of any output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.guest import reads

import shadowkvm as sk
from shadowkvm import cli

ROOT = Path(__file__).parents[2]
FORK = str(ROOT / "examples" / "recordings" / "fork20-demote64.npz")

Shell = Callable[..., tuple[int, str, str]]


def save(path: Path, rows: Any) -> Path:
    np.save(path, rows)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("rn", FORK),
        ("run",),
        ("run", FORK, "--plicy", "kvm"),
        ("run", FORK, "--policy", "no_unsnc"),
        ("run", FORK, "--profile", "intel"),
        ("run", FORK, "--format", "xml"),
        ("run", FORK, "--memory", "lots"),
        ("run", FORK, "--memory", "4M"),
        ("run", FORK, "--quota", "1"),
        ("run", FORK, "--quota", "many"),
        ("run", FORK, "-o", "/nowhere/at/all.json"),
        ("run", FORK, "--events", "/nowhere/at/all.txt"),
        ("run", FORK, "-o", str(ROOT)),
        ("run", FORK, "-o", "same.txt", "--events", "same.txt"),
        ("trace", "info", FORK, "--format", "csv"),
        ("trace", "import", "nothing", "-o", "a.npz"),
        ("trace", "import", FORK),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]).replace(FORK, "fork").replace(str(ROOT), "a folder"),
)
def test_usage_is_exit_status_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    status, out, err = shell(*arguments)
    if not arguments:
        assert (status, out[:6]) == (0, "Usage:")  # nothing asked for: help
        return
    assert (status, out) == (2, "")
    assert err.startswith("shadowkvm: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_name_that_is_not_known_gets_a_hint(shell: Shell) -> None:
    assert "did you mean 'no_unsync'" in shell("run", FORK, "--policy", "no_unsnc")[2]
    assert 'Did you mean "run"' in shell("rn", FORK)[2]


def damaged(path: Path) -> Path:
    data = bytearray(Path(FORK).read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    return path


def no_mode(path: Path) -> Path:
    rows = reads(1)
    sregs = {"cr0": 0x80010033, "cr3": 0, "cr4": 0, "efer": 0xD01}
    sk.Recording.from_arrays(rows, memory=1 << 20, sregs=sregs).save(path)
    return path


def bad_row(path: Path) -> Path:
    rows = reads(70_000)
    rows["size"][66_000] = 99
    return save(path, rows)


def cut(path: Path) -> Path:
    save(path, reads(100))
    path.write_bytes(path.read_bytes()[:-10])
    return path


def another_zip(path: Path) -> Path:
    np.savez(path, a=np.zeros(3))
    return path


def holding(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not there": (lambda p: p, "No such file or directory"),
    "a folder": (lambda p: p.parent, "Is a directory"),
    "empty": (holding(b""), "neither a recording"),
    "text": (holding(b"hello"), "neither a recording"),
    "zstd": (holding(b"\x28\xb5\x2f\xfd123456"), "trace import"),
    "another zip": (another_zip, "no member meta.json"),
    "another array": (lambda p: save(p.with_suffix(".npy"), np.zeros(3)), "dtype float64"),
    "pickled": (lambda p: save(p.with_suffix(".npy"), np.array([{}])), "damaged"),
    "cut": (lambda p: cut(p.with_suffix(".npy")), "damaged"),
    "damaged": (damaged, "chunk-00000.npy"),
    "bad row": (lambda p: bad_row(p.with_suffix(".npy")), "row 66000: size 99"),
    "no mode": (no_mode, "long mode needs PAE"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_exit_status_3_in_one_line(shell: Shell, tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = make(tmp_path / "a.npz")
    before = sorted(tmp_path.iterdir())
    status, out, err = shell("run", path, "--events", tmp_path / "e.txt", "-o", tmp_path / "o.json")
    assert (status, out) == (3, "")
    assert message in err
    assert err.startswith("shadowkvm: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before  # and no output, not even a part


def test_a_broken_invariant_is_exit_status_4(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sk.InvariantError("entry 7 of page 3", replay="shadowkvm audit --seed 5")

    monkeypatch.setattr(cli, "replay", broken)
    status, out, err = shell("run", FORK)
    assert (status, out) == (4, "")
    assert "entry 7 of page 3" in err
    assert "to see it again: shadowkvm audit --seed 5" in err


def test_an_interrupt_is_exit_status_130(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "replay", interrupted)
    assert shell("run", FORK, "--events", tmp_path / "e.txt") == (130, "", "shadowkvm: interrupted\n")
    assert not list(tmp_path.iterdir())
