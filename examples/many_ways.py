"""One guest, warmed up once, goes on in several processes: a fork, by how many pages the child then writes."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

import shadowkvm as sk
from shadowkvm.guest import Linux, pages

PAGES = 512


def model(written: int) -> tuple[sk.Vm, NDArray[np.void], NDArray[np.void]]:
    """A guest at its start, what a shell does first, and what follows: a fork whose child writes so many pages."""
    guest = Linux(memory=64 << 20)
    shell = guest.spawn()
    guest.switch(shell)
    area = guest.mmap(shell, PAGES * 4096)
    guest.start()
    guest.touch(shell, pages(area.start, PAGES), write=True)
    first = guest.take()
    child = guest.fork(shell)
    guest.switch(child)
    guest.touch(child, pages(area.start, written), write=True)
    return guest.vm(), first, guest.take()


def go_on(vm: sk.Vm, written: int) -> str:
    """One way on, in a process of its own: the VM has come there in a pickle."""
    _, _, rows = model(written)
    counters = vm.run(rows).counters
    return f"{written:3} pages written: {counters['exits']} exits, {counters['pf_guest']} faults of the guest's own"


if __name__ == "__main__":
    vm, first, _ = model(0)
    vm.run(first)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for line in pool.map(go_on, [vm] * 4, (0, 8, 64, 512)):
            print(line)
