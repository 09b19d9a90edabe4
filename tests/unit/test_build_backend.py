"""The build backend tells in plain words that Rust is missing or too old."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "build_backend"

HOOKS = [
    "get_requires_for_build_wheel()",
    "get_requires_for_build_editable()",
    "get_requires_for_build_sdist()",
    "prepare_metadata_for_build_wheel('x')",
    "prepare_metadata_for_build_editable('x')",
    "build_wheel('x')",
    "build_editable('x')",
    "build_sdist('x')",
]


def tool(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def call(hook: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Call a hook in a process of its own, as pip does, with nothing but `path` on PATH."""
    return subprocess.run(
        [sys.executable, "-c", f"import shadowkvm_build as b; print(b.{hook})"],
        env={"PATH": str(path), "PYTHONPATH": str(BACKEND), "HOME": str(path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_without_rust_every_hook_says_how_to_get_it(hook: str, tmp_path: Path) -> None:
    done = call(hook, tmp_path)
    assert done.returncode == 1
    assert "`cargo` was not found on PATH" in done.stderr
    assert "rustup" in done.stderr
    assert "apt install cargo" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 8


def test_cargo_without_rustc(tmp_path: Path) -> None:
    tool(tmp_path, "cargo", "echo cargo 1.95.0")
    assert "`rustc` was not found on PATH" in call("get_requires_for_build_wheel()", tmp_path).stderr


@pytest.mark.parametrize("version", ["1.63.0", "1.87.0-nightly", "0.99.1"])
def test_old_rust(version: str, tmp_path: Path) -> None:
    tool(tmp_path, "cargo", "echo 'cargo 1.95.0'")
    tool(tmp_path, "rustc", f"echo 'rustc {version} (abc 2025-01-01)'")
    done = call("build_wheel('x')", tmp_path)
    assert done.returncode == 1
    assert f"version {version}, which is too old" in done.stderr
    assert "1.88 or newer" in done.stderr


def test_rustup_without_a_toolchain(tmp_path: Path) -> None:
    tool(tmp_path, "cargo", "echo 'error: no default toolchain is configured' >&2; exit 1")
    done = call("get_requires_for_build_wheel()", tmp_path)
    assert "--version` failed (error: no default toolchain is configured)" in done.stderr
    assert "Traceback" not in done.stderr


def test_rust_outside_of_path_is_pointed_at(tmp_path: Path) -> None:
    home = tmp_path / ".cargo" / "bin"
    home.mkdir(parents=True)
    tool(home, "cargo", "echo cargo 1.95.0")
    assert f'export PATH="{home}:$PATH"' in call("get_requires_for_build_wheel()", tmp_path).stderr


@pytest.mark.parametrize("version", ["1.88.0", "1.95.0", "2.0.0"])
def test_good_rust_asks_for_nothing_more(version: str, tmp_path: Path) -> None:
    for name in ("cargo", "rustc"):
        tool(tmp_path, name, f"echo '{name} {version} (abc 2026-01-01)'")
    done = call("get_requires_for_build_wheel()", tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_minimum_version_is_that_of_the_workspace() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())
    said = re.search(r"MINIMUM_RUST: Final = \((\d+), (\d+)\)", (BACKEND / "shadowkvm_build.py").read_text())
    assert said is not None
    assert cargo["workspace"]["package"]["rust-version"] == f"{said[1]}.{said[2]}"
