"""What the unit tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import shadowkvm as sk
from shadowkvm import cli


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def one_frame_guest() -> Callable[[], sk.Vm]:
    """Make VMs whose pages of the first 2 MiB all map the same frame."""

    def make() -> sk.Vm:
        vm = sk.Vm(memory=32 << 20)
        for table, entry in {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007}.items():
            vm.write_memory(table, entry.to_bytes(8, "little"))
        vm.write_memory(0x4000, np.full(512, 0x10067, "<u8"))
        vm.vcpus[0].set_sregs(cr3=0x1000)
        return vm

    return make
