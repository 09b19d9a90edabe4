"""Pages of docs/: generated parts, examples and their output, commands, links."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shadowkvm import cli
from shadowkvm.workloads import entries

ROOT = Path(__file__).parents[2]
PAGES = (
    "compare.md",
    "embedding.md",
    "explain.md",
    "guests.md",
    "nested.md",
    "policies.md",
    "results.md",
    "translate.md",
    "tutorial.md",
    "workloads.md",
)


def test_generated_parts_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "doc_workloads.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: python tools/doc_workloads.py"


@pytest.mark.parametrize("page", PAGES)
def test_examples_print_what_is_said(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one page run one after the other; the text block that follows one is what it prints."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def run_blocks(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for code, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), names)  # noqa: S102 -- our own documentation
        assert out.getvalue() == said, code


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    lines += [line for line in re.findall(r"`(shadowkvm [^`]*)`", text) if not line.endswith("list")]
    monkeypatch.chdir(tmp_path)
    if page in {"compare.md", "translate.md"}:
        run_blocks(page)  # they write the files
    for line in lines:
        words = line.split()
        assert words[0] == "shadowkvm"
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(words[1:]) == 0, line
    assert page in {"embedding.md", "guests.md", "nested.md", "results.md"} or lines


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text):
        other = ROOT / "docs" / target
        assert other.exists(), target
        heads = [head.lower().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)]
        assert not anchor or anchor in heads, anchor


def test_every_workload_has_its_section() -> None:
    text = (ROOT / "docs" / "workloads.md").read_text(encoding="utf-8")
    for entry in entries():
        if entry.origin == "shadowkvm":
            assert f"\n### {entry.name}\n" in text
