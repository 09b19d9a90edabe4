"""Examples print what they are said to print, and README.md shows the example that is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_its_golden_output(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", example], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    golden = example.with_suffix(".out")
    assert done.stdout == golden.read_text(encoding="utf-8"), (
        f"if the new output is right: python {example.relative_to(ROOT)} > {golden.relative_to(ROOT)}"
    )


def test_readme_shows_the_example_that_is_run() -> None:
    shown = re.findall(r"^<!-- example: (\S+) -->\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown
    for path, code in shown:
        docstring, _, body = (ROOT / path).read_text(encoding="utf-8").partition("\n\n")
        assert docstring.startswith('"""')
        assert body == code, f"README.md and {path} differ"


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["run", "test"])
def test_readme_commands_are_found_by_ci(name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_command.py", name], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("python3 -m venv .venv && ")
    assert done.stdout.count("\n") == 1


def test_a_missing_command_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_command.py", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "0 one-line commands named 'nonsense'" in done.stderr
