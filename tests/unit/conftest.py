"""What the unit tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shadowkvm import cli


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call
