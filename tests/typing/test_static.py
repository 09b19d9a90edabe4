"""Types, stubs and the package's arrows are part of what is tested, by the same commands as in tools/check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("step", ["types", "stubs", "arrows"])
def test_static_check(step: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "tools" / "check", step],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_check_is_refused() -> None:
    done = subprocess.run(["bash", ROOT / "tools" / "check", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no step named 'nonsense'" in done.stderr
