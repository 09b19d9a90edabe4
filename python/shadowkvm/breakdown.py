"""Breakdown: where the faults of a run came from, kept in bounded memory while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shadowkvm.events import EVENT_INFO, event_mask
from shadowkvm.faults import NEEDED, Access, Faults, Kind, Result, Tables, read_faults
from shadowkvm.feed import Piece
from shadowkvm.ops import NO_PAGE, Flag, Op

__all__ = ["EVENTS_NEEDED", "Breakdown", "Checks", "Space"]

EVENTS_NEEDED: Final = (*NEEDED, "kvm_exit", "kvm_mmu_sync_page")
"""The events that a Vm has to record for a Breakdown."""

# Address spaces that are kept apart; a trace may load any number of CR3 values.
_SPACES: Final = 4096
_CODE: Final = {name: info.code for name, info in EVENT_INFO.items()}
_UNSYNC, _SYNC = _CODE["kvm_mmu_unsync_page"], _CODE["kvm_mmu_sync_page"]
_ZAP, _GET = _CODE["kvm_mmu_prepare_zap_page"], _CODE["kvm_mmu_get_page"]
_LEVEL, _TOP = 15, 4
_LAM_AND_PCID: Final = np.uint64(0x000F_FFFF_FFFF_F000)


@dataclass(slots=True)
class Space:
    """What was done under one value of CR3, that is, by one guest address space (or several after another)."""

    cr3: int
    """Physical address of the top table; -1: all that came after too many others."""
    loads: int = 0
    """CR3 loads that led here."""
    rows: int = 0
    instructions: int = 0
    faults: int = 0
    """#PF exits."""
    guest: int = 0
    """... of them reflected to the guest."""
    emulated: int = 0
    """... of them emulated."""
    unsync: int = 0
    """Tables that went unsync."""
    synced: int = 0
    """Tables that were brought back in step (not those that went with a zap)."""
    zapped: int = 0
    """Shadow pages zapped, as KVM counts them: a page that is still a root counts again when it is freed."""
    roots: int = 0
    """Top shadow pages made for it."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, CR3 in hexadecimal."""
        out = {name: getattr(self, name) for name in self.__slots__}
        return {**out, "cr3": hex(self.cr3) if self.cr3 >= 0 else "others"}


@dataclass(slots=True)
class Checks:
    """Translations of the replay, held against the frames that the recorder saw."""

    translations: int = 0
    """#PF exits of rows with a recorded frame whose walk found one."""
    wrong: int = 0
    """... of them another one than recorded."""
    first_wrong: int | None = None
    """Number of the first such row."""


class _Step(NamedTuple):
    """A piece, and what running it raised."""

    piece: Piece
    events: NDArray[np.void]
    row: NDArray[np.int64]
    """Of each event the row in the piece."""
    faults: Faults
    fault_row: NDArray[np.int64]
    """Of each #PF exit the row in the piece."""
    resync: NDArray[np.bool_]
    """Which events are tables brought back in step."""


def _resyncs(events: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which events are tables brought back in step.

    A zapped table stops being unsync, too: that event follows the zap's at once and names the same frame.
    """
    out: NDArray[np.bool_] = events["kind"] == _SYNC
    out[1:] &= (events["kind"][:-1] != _ZAP) | (events["a"][1:] != events["a"][:-1])
    return out


@dataclass(slots=True)
class Breakdown:
    """Sums over the #PF exits and the events of a run; feed it every piece with the events that it raised.

    Which address space: the CR3 of the vCPU at that row, a CR3 load belonging to the new one.
    """

    cr3: list[int]
    """The CR3 of each vCPU at the start."""
    faults: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, len(Access), len(Result)), np.int64))
    """#PF exits: user (0 supervisor, 1 user), `Access`, `Result`."""
    kinds: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(Kind), len(Result)), np.int64))
    """#PF exits: `Kind`, `Result`."""
    kind_unsync: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Kind), np.int64))
    """Tables that went unsync, by the kind of page that the exit touched."""
    events: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EVENT_INFO), np.int64))
    """Events by code."""
    sync_ops: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Op), np.int64))
    """Tables brought back in step, by the op of the row (CR3: a load); those that went with a zap not counted."""
    sync_zapped: int = 0
    """Unsync tables that were zapped."""
    zap_ops: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Op), np.int64))
    """Shadow pages zapped, by the op of the row; PAGE: the recording rewrote a table."""
    ops: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Op), np.int64))
    """Rows by op."""
    checks: Checks = field(default_factory=Checks)
    _spaces: dict[int, Space] = field(default_factory=dict)
    _tables: Tables = field(default_factory=Tables)

    @staticmethod
    def mask() -> int:
        """The engine's mask for the events that are needed."""
        return event_mask(EVENTS_NEEDED)

    @property
    def spaces(self) -> list[Space]:
        """The address spaces, those with most #PF exits first."""
        return sorted(self._spaces.values(), key=lambda space: (-space.faults, space.cr3))

    def add(self, piece: Piece, events: NDArray[np.void], first_op: int) -> None:
        """Take in what running ``piece`` did.

        Args:
            piece: the rows.
            events: EVENT_DTYPE, the events that they raised, of at least the kinds EVENTS_NEEDED.
            first_op: number of the operation that the piece's first row was.
        """
        faults = read_faults(events, self._tables)
        step = _Step(
            piece=piece,
            events=events,
            row=(events["op"] - np.uint64(first_op)).astype(np.int64),
            faults=faults,
            fault_row=(faults.op - np.uint64(first_op)).astype(np.int64),
            resync=_resyncs(events),
        )
        self.events += np.bincount(events["kind"], minlength=len(self.events))
        self.ops += np.bincount(piece.rows["op"], minlength=len(self.ops))
        np.add.at(self.faults, (faults.user.astype(np.int64), faults.access, faults.result), 1)
        np.add.at(self.kinds, (faults.kind, faults.result), 1)
        np.add.at(self.kind_unsync, faults.kind, faults.unsync)
        self._add_ops(step)
        self._add_spaces(step)
        self._check(step)

    def _add_ops(self, step: _Step) -> None:
        kind, op = step.events["kind"], step.piece.rows["op"]
        self.sync_zapped += int(np.count_nonzero((kind == _SYNC) & ~step.resync))
        self.sync_ops += np.bincount(op[step.row[step.resync]], minlength=len(self.sync_ops))
        self.zap_ops += np.bincount(op[step.row[kind == _ZAP]], minlength=len(self.zap_ops))

    def _add_spaces(self, step: _Step) -> None:
        piece, events, row, faults, fault_row, resync = step
        of_row, values = self._cr3_of_rows(piece.rows)
        count = len(values)
        kind, code = events["kind"], events["code"]

        def total(where: NDArray[np.int64], weights: NDArray[Any] | None = None) -> list[int]:
            sums: list[int] = np.bincount(of_row[where], weights, minlength=count).astype(np.int64).tolist()
            return sums

        everything = np.arange(len(piece.rows))
        top = (kind == _GET) & (events["flag"] & 2 != 0) & (code & _LEVEL == _TOP)
        columns = {
            "loads": total(np.flatnonzero(piece.rows["op"] == Op.CR3)),
            "rows": total(everything),
            "instructions": total(everything, piece.instructions) if piece.instructions is not None else [0] * count,
            "faults": total(fault_row),
            "guest": total(fault_row[faults.result == Result.GUEST]),
            "emulated": total(fault_row[faults.result == Result.EMULATED]),
            "unsync": total(row[kind == _UNSYNC]),
            "synced": total(row[resync]),
            "zapped": total(row[kind == _ZAP]),
            "roots": total(row[top]),
        }
        for index, value in enumerate(values):
            space = self._space(value)
            for name, sums in columns.items():
                setattr(space, name, getattr(space, name) + sums[index])

    def _space(self, cr3: int) -> Space:
        if cr3 not in self._spaces and len(self._spaces) >= _SPACES:
            cr3 = -1
        return self._spaces.setdefault(cr3, Space(cr3))

    def _cr3_of_rows(self, rows: NDArray[np.void]) -> tuple[NDArray[np.int64], list[int]]:
        """For each row an index into the list of CR3 values; carries the last value of each vCPU on."""
        current = np.zeros(len(rows), np.uint64)
        for vcpu in range(len(self.cr3)):
            mine = np.flatnonzero(rows["vcpu"] == vcpu)
            loads = mine[rows["op"][mine] == Op.CR3]
            loaded = np.concatenate((np.array([self.cr3[vcpu]], np.uint64), rows["value"][loads] & _LAM_AND_PCID))
            current[mine] = loaded[np.searchsorted(loads, mine, side="right")]
            self.cr3[vcpu] = int(loaded[-1])
        values, of_row = np.unique(current, return_inverse=True)
        return of_row.astype(np.int64), values.tolist()

    def _check(self, step: _Step) -> None:
        """Compare the frames that the engine's walks found with those of the recording."""
        piece, faults, fault_row = step.piece, step.faults, step.fault_row
        if piece.gfn is None:
            return
        recorded = piece.gfn[fault_row].astype(np.uint64)
        rows = piece.rows[fault_row]
        # A row with a fault has no frame; a row that crosses a page has that of its first byte.
        known = (faults.gfn != NO_PAGE) & (recorded != NO_PAGE) & (rows["flags"] & Flag.FAULTS == 0)
        wrong = known & (faults.gfn != recorded)
        self.checks.translations += int(np.count_nonzero(known))
        self.checks.wrong += int(np.count_nonzero(wrong))
        if self.checks.first_wrong is None and wrong.any():
            self.checks.first_wrong = piece.first + int(fault_row[int(np.argmax(wrong))])
