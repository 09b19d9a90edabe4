"""The batch walker against NumPy, against pure Python, and against volatility3 where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.bench.clock import best, rounds
from shadowkvm.bench.model import Row
from shadowkvm.image import translate

__all__ = ["DOC", "Image", "heavy", "numpy_walk", "ordinary", "python_walk", "rows"]

DOC: Final = """Millions of addresses a second through an image of 2 GiB that is generated: random mapped addresses, one
thread unless it is said. "Ordinary" has 1 MiB of tables, with large pages; "table-heavy" has 400 MiB. The walker in
NumPy does the same: 4 levels, large pages, presence, canonical addresses, tables outside the image. The ratios are of
one run, interleaved."""

_P, _PS, _ADDRESS = np.uint64(1), np.uint64(0x80), np.uint64(0x000F_FFFF_FFFF_F000)
_TABLE: Final = 0x67


class Image(NamedTuple):
    """Physical memory with page tables in it."""

    words: NDArray[np.uint64]
    cr3: int
    addresses: NDArray[np.uint64]
    """Random ones that are mapped."""


def _link(words: NDArray[np.uint64], table: int, index: int, child: int) -> None:
    words[table // 8 + index] = child | _TABLE


def _fill(words: NDArray[np.uint64], table: int, frames: NDArray[np.uint64], shift: int, flags: int) -> None:
    """Entries from the start of a table on, over as many tables as it takes."""
    words[table // 8 : table // 8 + len(frames)] = (frames << np.uint64(shift)) | np.uint64(flags)


def heavy(size: int, tables: int, count: int) -> Image:
    """``tables`` bytes of last-level tables: 4 KiB pages all over the image."""
    words = np.zeros(size // 8, np.uint64)
    random, number = np.random.default_rng(2), tables // 4096
    first = 0x10_0000
    directories = first + number * 4096
    words[first // 8 : first // 8 + number * 512] = random.integers(
        0, size >> 12, number * 512, np.uint64
    ) << np.uint64(12)
    words[first // 8 : first // 8 + number * 512] |= np.uint64(_TABLE)
    _link(words, 0x1000, 0, 0x2000)
    for directory in range(-(-number // 512)):
        _link(words, 0x2000, directory, directories + directory * 4096)
    words[directories // 8 : directories // 8 + number] = (
        first + np.arange(number, dtype=np.uint64) * 4096
    ) | np.uint64(_TABLE)
    pages = random.integers(0, number * 512, count, np.uint64)
    return Image(words, 0x1000, (pages << np.uint64(12)) + random.integers(0, 4096, count, np.uint64))


def ordinary(size: int, count: int) -> Image:
    """A process with a quarter of the image in 4 KiB pages, and a kernel that maps half of it by large ones."""
    words = np.zeros(size // 8, np.uint64)
    random = np.random.default_rng(3)
    pages, large = size >> 14, size >> 22
    first, number = 0x10_0000, pages // 512
    directory, kernel = first + number * 4096, first + number * 4096 + 0x1000
    words[first // 8 : first // 8 + pages] = (
        random.permutation(size >> 12)[:pages].astype(np.uint64) << np.uint64(12)
    ) | np.uint64(0x67)
    _link(words, 0x1000, 0, 0x2000)
    _link(words, 0x2000, 1, directory)
    words[directory // 8 : directory // 8 + number] = (first + np.arange(number, dtype=np.uint64) * 4096) | np.uint64(
        _TABLE
    )
    _link(words, 0x1000, 273, 0x3000)
    for part in range(-(-large // 512)):
        _link(words, 0x3000, part, kernel + part * 4096)
    _fill(words, kernel, np.arange(large, dtype=np.uint64), 21, 0x1E3)
    user = (1 << 30) + random.integers(0, pages << 12, count, np.uint64)
    direct = np.uint64(0xFFFF_8880_0000_0000) + random.integers(0, large << 21, count, np.uint64)
    return Image(words, 0x1000, np.where(random.random(count) < 0.6, user, direct))


def numpy_walk(
    words: NDArray[np.uint64], cr3: int, gvas: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Addresses and whether they lead somewhere, as one would write it in NumPy."""
    size = np.uint64(words.size * 8)
    high = gvas >> np.uint64(47)
    active = (high == 0) | (high == np.uint64(0x1FFFF))
    table = np.full(gvas.shape, cr3, np.uint64)
    gpa, found = np.zeros(gvas.shape, np.uint64), np.zeros(gvas.shape, np.bool_)
    for shift in (39, 30, 21, 12):
        at = table + ((gvas >> np.uint64(shift)) & np.uint64(511)) * np.uint64(8)
        active &= at < size
        entry = words.take((np.where(active, at, np.uint64(0)) >> np.uint64(3)).astype(np.int64))
        active &= entry & _P != 0
        leaf = active if shift == 12 else active & (entry & _PS != 0) if shift < 39 else np.zeros_like(active)
        inside = np.uint64((1 << shift) - 1)
        gpa = np.where(leaf, (entry & _ADDRESS & ~inside) | (gvas & inside), gpa)
        found |= leaf
        active &= ~leaf
        table = entry & _ADDRESS
    return gpa, found


def python_walk(memory: memoryview, cr3: int, gvas: list[int]) -> list[int | None]:
    """The same, one address after the other."""
    out: list[int | None] = []
    for gva in gvas:
        table, answer = cr3, None
        if gva >> 47 in {0, 0x1FFFF}:
            for shift in (39, 30, 21, 12):
                entry = int.from_bytes(memory[table + (gva >> shift & 511) * 8 :][:8], "little")
                if not entry & 1:
                    break
                if shift == 12 or (shift < 39 and entry & 0x80):
                    inside = (1 << shift) - 1
                    answer = entry & 0x000F_FFFF_FFFF_F000 & ~inside | gva & inside
                    break
                table = entry & 0x000F_FFFF_FFFF_F000
        out.append(answer)
    return out


def _volatility(image: Image, gvas: list[int], expected: NDArray[np.uint64]) -> float | None:
    """Seconds that volatility3's translate takes, if it is installed."""
    if importlib.util.find_spec("volatility3") is None:
        return None
    contexts: Any = importlib.import_module("volatility3.framework.contexts")
    intel: Any = importlib.import_module("volatility3.framework.layers.intel")
    physical: Any = importlib.import_module("volatility3.framework.layers.physical")
    context = contexts.Context()
    context.add_layer(physical.BufferDataLayer(context, "b", "memory", image.words.tobytes()))
    context.config["v.memory_layer"], context.config["v.page_map_offset"] = "memory", image.cr3
    layer = intel.Intel32e(context, "v", "v")
    start = time.thread_time()
    answers = [layer.translate(gva)[0] for gva in gvas]
    taken = time.thread_time() - start
    if answers != expected.tolist():
        raise AssertionError("volatility3 comes to other addresses")
    return taken


def _compare(what: str, image: Image, asked: float, quick: bool) -> Iterator[Row]:
    gvas, count = image.addresses, len(image.addresses)
    gpa, found = numpy_walk(image.words, image.cr3, gvas)
    ours = translate(image.words, image.cr3, gvas)
    if not (np.array_equal(ours.ok, found) and np.array_equal(ours.gpa, gpa)):
        raise AssertionError(f"{what}: the walkers differ")
    works = {
        "here": lambda: translate(image.words, image.cr3, gvas),
        "numpy": lambda: numpy_walk(image.words, image.cr3, gvas),
    }
    seconds = best(works, rounds(quick))
    rate = {name: count / least / 1e6 for name, least in seconds.items()}
    few = gvas[: 2_000 if quick else 20_000].tolist()
    view = memoryview(image.words).cast("B")  # type: ignore[arg-type]  # arrays are buffers
    python = len(few) / best({"": lambda: python_walk(view, image.cr3, few)}, 3)[""] / 1e6
    yield Row(f"{what}: translate", rate["here"], "M/s")
    yield Row(f"{what}: NumPy", rate["numpy"], "M/s")
    yield Row(f"{what}: pure Python", python, "M/s")
    taken = _volatility(image, few[:2_000], ours.gpa[:2_000])
    if taken is not None:
        yield Row(f"{what}: volatility3", min(len(few), 2_000) / taken / 1e6, "M/s")
    yield Row(f"{what}: translate over NumPy", rate["here"] / rate["numpy"], "x", asked=asked, at_least=True)
    start = time.perf_counter()
    translate(image.words, image.cr3, gvas, threads=2)
    yield Row(f"{what}: translate, 2 threads", count / (time.perf_counter() - start) / 1e6, "M/s")


def rows(quick: bool) -> Iterator[Row]:
    """An ordinary image, and one with many tables."""
    size, count = (256 << 20, 100_000) if quick else (2 << 30, 1_000_000)
    yield from _compare("ordinary", ordinary(size, count), 4, quick)
    yield from _compare("table-heavy", heavy(size, size // 5 >> 12 << 12, count), 2, quick)
