"""docs/reference.md is what the engine's tables say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shadowkvm as sk
from shadowkvm.replay import replay
from shadowkvm.report import rates

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "doc_tables.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    page = ROOT / "docs" / "reference.md"
    assert page.read_text(encoding="utf-8") == done.stdout, "python tools/doc_tables.py > docs/reference.md"


@pytest.mark.parametrize("name", [*sk.COUNTER_INFO, *sk.EVENT_INFO, *(op.name for op in sk.Op)])
def test_every_name_is_there(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page_made_of_docstrings() -> None:
    """docs/api.md names the modules; Sphinx takes what is public in them."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = [importlib.import_module(name) for name in re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)]
    classes = re.findall(r"^\.\. autoclass:: shadowkvm\.(\w+)$", page, re.MULTILINE)
    there = {name for module in modules for name in module.__all__} | set(classes)
    assert set(sk.__all__) - there <= {"MODELS", "__version__", "model_version"}


def test_the_page_on_replay_explains_every_line_of_the_report() -> None:
    """Each line of the report's rate table has a line in docs/replay.md."""
    text = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
    with sk.Recording.open(ROOT / "examples" / "recordings" / "fork20-demote64.npz") as recording:
        done = replay(recording)
    for rate in rates(done):
        assert f"| {rate.label.strip()} |" in text, rate.label


def test_the_readme_shows_what_is_printed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition("<!-- output -->\n```text\n")[2].partition("\n```")[0].splitlines()
    command = [sys.executable, "-m", "shadowkvm", "run", "examples/recordings/fork20-demote64.npz"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert len(block) > 20
    assert block[-1] == "..."
    assert block[:-1] == printed[: len(block) - 1]
