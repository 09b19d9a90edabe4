"""The verb ``shadowkvm translate``: addresses through the page tables in a dump."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from cyclopts import App, Parameter
from rich.console import Group
from rich.text import Text

from shadowkvm import report
from shadowkvm.errors import TraceError
from shadowkvm.image import CpuState, PhysicalMemory, Translations, WalkFault, open_image, translate, walk
from shadowkvm.image.walks import describe, rights
from shadowkvm.pagetables import paging
from shadowkvm.terminal import FormatOption, OutputOption, UsageError, check_folder, choose_format, emit

__all__ = ["add_verbs"]

_SCHEMA: Final = "shadowkvm.translate/1"
_FIELDS: Final = ("gva", "gpa", "level", "size", "flags", "fault")
_ADDRESS: Final = re.compile(r"0x[0-9a-f_`]+|[0-9]+", re.IGNORECASE)

Mode = Literal["4-level", "5-level", "pae", "32-bit"]


def add_verbs(parent: App) -> None:
    """Hang the verb into the command line."""
    parent.command(
        translate_,
        name="translate",
        help_epilogue="""Examples:

    shadowkvm translate guest.elf 0xffffffff81000000
    shadowkvm translate guest.raw --cr3 0x2a1a000 0x401000 0x7ffd0000 --access write --user
    shadowkvm translate guest.raw --cr3 0x2a1a000 --steps 0xffff888000000000
    cat addresses.txt | shadowkvm translate guest.elf --from - --format csv""",
    )


def _number(text: str, where: str) -> int:
    if not _ADDRESS.fullmatch(text):
        raise UsageError(f"{where}: {text!r} is no address; write 0xffffffff81000000 or a decimal number")
    value = int(text.replace("`", "").replace("_", ""), 0) if text[:2].lower() == "0x" else int(text)
    if value >= 1 << 64:
        raise UsageError(f"{where}: {text} is not below 2**64")
    return value


def _all_addresses(words: Sequence[str], listed: Path | None) -> list[int]:
    """Those of the command line, then those of the file: one a line, or several; # begins a comment."""
    found = [_number(word, f"address {number}") for number, word in enumerate(words, 1)]
    if listed is not None:
        text = sys.stdin.read() if str(listed) == "-" else listed.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            found += [_number(word, f"{listed}, line {number}") for word in line.partition("#")[0].split()]
    if not found:
        raise UsageError("no address: name some, or a file with --from FILE (- is stdin)")
    return found


def _space(image: PhysicalMemory, cr3: str | None, cpu: int, mode: Mode | None, dump: Path) -> tuple[int, str]:
    """Root and paging mode: as given, else those of a CPU in the dump."""
    state: CpuState | None = None
    if cr3 is None:
        if not image.cpus:
            raise UsageError(f"{dump} says nothing of CPUs: name the page tables with --cr3")
        if not 0 <= cpu < len(image.cpus):
            raise UsageError(f"--cpu {cpu}: {dump} has CPUs 0 to {len(image.cpus) - 1}")
        state = image.cpus[cpu]
        if not state.mode and mode is None:
            raise UsageError(f"CPU {cpu} had paging off when {dump} was made: name --cr3 or --mode")
    chosen = mode or (state.mode if state else image.cpus[0].mode if image.cpus else "") or "4-level"
    return (state.cr3 if state else _number(cr3 or "", "--cr3")), chosen


def translate_(
    dump: Path,
    /,
    *addresses: str,
    cr3: Annotated[
        str | None, Parameter(help="Root of the page tables. [default: CR3 of --cpu, in an ELF dump]")
    ] = None,
    cpu: Annotated[int, Parameter(help="The CPU of an ELF dump whose tables are meant.")] = 0,
    mode: Annotated[Mode | None, Parameter(help="Paging mode. [default: the CPU's; 4-level for a raw dump]")] = None,
    access: Annotated[Literal["read", "write", "execute"], Parameter(help="What is to be allowed.")] = "read",
    user: Annotated[bool, Parameter(negative="", show_default=False, help="The access is made at CPL 3.")] = False,
    steps: Annotated[bool, Parameter(negative="", show_default=False, help="Tell each entry of each walk.")] = False,
    listed: Annotated[
        Path | None,
        Parameter(name="--from", allow_leading_hyphen=True, help="More addresses from this file; - is stdin."),
    ] = None,
    threads: Annotated[int, Parameter(help="How many work at a time.")] = 1,
    format_: FormatOption = None,
    output: OutputOption = None,
) -> int:
    """Translate guest virtual addresses through the page tables in a dump of physical memory.

    The dump is raw (the first byte is at physical address 0), or an ELF dump as QEMU's dump-guest-memory and
    `virsh dump --memory-only` write it. An address that leads nowhere is an answer, not an error: the last column
    says why. docs/translate.md has more.

    Parameters
    ----------
    dump
        The file. It is mapped, not read.
    addresses
        Guest virtual addresses.
    """
    chosen = choose_format(format_, output, ("table",) if steps else ("table", "json", "csv"))
    check_folder(output)
    gvas = _all_addresses(addresses, listed)
    image = open_image(dump)
    root, named = _space(image, cr3, cpu, mode, dump)
    if steps:
        walks = (walk(image, root, gva, mode=named, access=access, user=user) for gva in gvas)
        emit("\n\n".join(map(str, walks)) + "\n", output)
        return 0
    array = np.array(gvas, np.uint64)
    found = translate(image, root, array, mode=named, access=access, user=user, threads=threads)
    if found.fault.all() and (found.fault == WalkFault.NOT_IN_IMAGE).all() and (found.level == _top(named)).all():
        raise TraceError(f"{dump}: CR3 {root:#x} names a table that is not in the image ({image!r})")
    facts = {"dump": str(dump), "cr3": f"{root:#x}", "mode": named, "access": access, "user": user}
    if chosen == "json":
        rows = [dict(zip(_FIELDS, row, strict=True)) for row in _rows(array, found, named)]
        emit(json.dumps({"schema": _SCHEMA, **facts, "translations": rows}, indent=1) + "\n", output)
    elif chosen == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_FIELDS, *_rows(array, found, named)])
        emit(text.getvalue(), output)
    else:
        emit(_table(facts, array, found, named), output)
    return 0


def _top(mode: str) -> int:
    return paging(mode).top.number


def _rows(gvas: Iterable[Any], found: Translations, mode: str) -> Iterator[list[Any]]:
    sizes = {level.number: level.size for level in paging(mode).levels}
    for gva, gpa, level, flags, fault in zip(gvas, *(array.tolist() for array in found), strict=True):
        ok = fault == WalkFault.NONE
        name = "" if ok else WalkFault(fault).name.lower()
        yield [f"{gva:#x}", f"{gpa:#x}" if ok else None, level, sizes[level] if ok else None, rights(flags), name]


def _table(facts: dict[str, Any], gvas: Iterable[Any], found: Translations, mode: str) -> Group:
    sizes = {level.number: level.size for level in paging(mode).levels}
    units = {4096: "4K", 2 << 20: "2M", 4 << 20: "4M", 1 << 30: "1G"}
    rows = []
    for gva, gpa, level, flags, fault in zip(gvas, *(array.tolist() for array in found), strict=True):
        if fault == WalkFault.NONE:
            rows.append([f"{gva:#x}", f"{gpa:#x}", units[sizes[level]], rights(flags), ""])
        else:
            rows.append([f"{gva:#x}", "", "", "", describe(fault, level)])
    who = "user" if facts["user"] else "supervisor"
    title = f"CR3 {facts['cr3']}, {mode}, {facts['access']} by the {who}"
    lost = int(np.count_nonzero(found.fault))
    end = f"{len(rows):,} addresses, {lost:,} without a translation"
    return Group(report.table(title, ("gva", "gpa", "page", "rights", "why not"), rows, left=5), Text(end))
