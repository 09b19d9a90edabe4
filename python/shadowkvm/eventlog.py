"""Events: recorded tracepoints to look at, to filter, and to hand to whatever reads Arrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm._core import event_text
from shadowkvm.checks import integer
from shadowkvm.errors import ConfigError
from shadowkvm.events import EVENT_DTYPE, EVENT_INFO, event_mask

__all__ = ["Events"]

_NAMES: Final = tuple(EVENT_INFO)
_COLUMNS: Final = ("op", "event", "vcpu", "level", "flag", "code", "a", "b", "c")
_OF_PAGES: Final = ("kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page", "kvm_mmu_prepare_zap_page")
# Rows that a notebook shows.
_SHOWN: Final = 20


class Events:
    """Events as one array, in the order in which they were raised. What a filter gives is another of these.

    ``len``, indexing by slices and iteration (over lines of text) work; ``array`` has the fields (`EVENT_DTYPE`). It
    has the Arrow PyCapsule interface, so polars, pandas, duckdb and pyarrow take it as a table: op, event (the
    tracepoint's name), vcpu, level, flag, code, a, b, c. That needs nanoarrow: ``pip install "shadowkvm[arrow]"``.

    Args:
        array: EVENT_DTYPE, shape (n,), such as `Vm.events`.

    Raises:
        ConfigError: an array of another dtype or shape.

    >>> import shadowkvm as sk
    >>> vm = sk.Vm(memory=16 << 20, events=True)
    >>> vm.vcpus[0].read(0x1000).status
    'page_fault'
    >>> events = sk.Events(vm.events)
    >>> events.counts()["kvm_exit"], events.where("kvm_inj_exception").text()
    (1, ['kvm_inj_exception: #PF (0x0)'])
    """

    __slots__ = ("array",)

    array: NDArray[np.void]
    """EVENT_DTYPE, shape (n,)."""

    def __init__(self, array: NDArray[np.void]) -> None:
        if not isinstance(array, np.ndarray) or array.dtype != EVENT_DTYPE or array.ndim != 1:
            raise ConfigError("events: a one-dimensional array of EVENT_DTYPE is expected")
        self.array = array

    def where(
        self,
        *names: str,
        vcpu: int | None = None,
        level: int | None = None,
        ops: tuple[int, int] | range | None = None,
        gfn: int | None = None,
    ) -> Events:
        """Those that are all of this.

        Args:
            names: tracepoints, any of them; none: every one.
            vcpu: raised on that vCPU.
            level: with that level (of a table, an entry, a page).
            ops: raised by operations from the first up to but without the second.
            gfn: about that guest frame: shadow pages of it, entries that map it.

        Raises:
            ConfigError: a name that is no event; the message has the nearest.
        """
        keep = np.ones(len(self.array), np.bool_)
        if names:
            mask = event_mask(names)
            keep &= (np.uint64(mask) >> self.array["kind"].astype(np.uint64) & np.uint64(1)).astype(np.bool_)
        if vcpu is not None:
            keep &= self.array["vcpu"] == integer("vcpu", vcpu, bits=8)
        if level is not None:
            keep &= self._levels() == integer("level", level, bits=8)
        if ops is not None:
            first, end = (ops.start, ops.stop) if isinstance(ops, range) else ops
            keep &= (self.array["op"] >= integer("ops", first)) & (self.array["op"] < integer("ops", end))
        if gfn is not None:
            keep &= self._about(integer("gfn", gfn))
        return Events(self.array[keep])

    def _kinds(self, *names: str) -> NDArray[np.bool_]:
        return np.isin(self.array["kind"], [EVENT_INFO[name].code for name in names])

    def _levels(self) -> NDArray[np.uint8]:
        """A shadow page's level is in its role."""
        of_page = self._kinds(
            "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page", "kvm_mmu_prepare_zap_page"
        )
        return np.where(of_page, (self.array["code"] & 15).astype(np.uint8), self.array["level"])

    def _about(self, gfn: int) -> NDArray[np.bool_]:
        in_a = self._kinds(*_OF_PAGES, "kvm_mmu_spte_requested", "kvm_mmu_set_spte")
        in_b = self._kinds("mark_mmio_spte", "handle_mmio_page_fault")
        found: NDArray[np.bool_] = in_a & (self.array["a"] == gfn) | in_b & (self.array["b"] == gfn)
        return found

    def counts(self) -> dict[str, int]:
        """How many there are of each tracepoint; those that do not occur are left out."""
        numbers = np.bincount(self.array["kind"], minlength=len(_NAMES)).tolist()
        return {name: number for name, number in zip(_NAMES, numbers, strict=True) if number}

    def text(self) -> list[str]:
        """As the kernel prints them."""
        return event_text(self.array.tobytes())

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, which: slice) -> Events:
        if not isinstance(which, slice):
            raise TypeError(f"events are indexed by slices; use events.array[{which!r}] for the fields of one")
        return Events(self.array[which])

    def __iter__(self) -> Iterator[str]:
        return iter(self.text())

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self.array, other.array) if isinstance(other, Events) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # the array may change

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The Arrow PyCapsule interface: one batch."""
        return _arrow(self.array).__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        most = sorted(self.counts().items(), key=lambda item: -item[1])[:4]
        return f"<Events: {len(self):,}: {', '.join(f'{number:,} {name}' for name, number in most) or 'none'}>"

    def _repr_html_(self) -> str:
        head = "<tr><th>op</th><th>vCPU</th><th style='text-align:left'>event</th></tr>"
        part = self.array[:_SHOWN]
        rows = "".join(
            f"<tr><td>{event['op']}</td><td>{event['vcpu']}</td><td style='text-align:left'>{line}</td></tr>"
            for event, line in zip(part, event_text(part.tobytes()), strict=True)
        )
        more = f"<p>... {len(self) - _SHOWN:,} more</p>" if len(self) > _SHOWN else ""
        return f"<table>{head}{rows}</table>{more}"


def _arrow(array: NDArray[np.void]) -> Any:
    """The array as a stream of one batch."""
    try:
        na: Any = importlib.import_module("nanoarrow")
    except ImportError as error:
        raise ImportError('events as Arrow need nanoarrow: pip install "shadowkvm[arrow]"', name="nanoarrow") from error
    kinds = {"op": na.uint64(), "vcpu": na.uint8(), "level": na.uint8(), "flag": na.uint8(), "code": na.uint32()}
    kinds |= {"a": na.uint64(), "b": na.uint64(), "c": na.uint64()}
    columns = {
        name: na.c_array_from_buffers(kind, len(array), [None, np.ascontiguousarray(array[name])])
        for name, kind in kinds.items()
    }
    columns["event"] = _strings(na, array["kind"])
    fields = {name: na.large_string() if name == "event" else kinds[name] for name in _COLUMNS}
    children = [columns[name] for name in _COLUMNS]
    return na.ArrayStream(na.c_array_from_buffers(na.struct(fields), len(array), [None], children=children))


def _strings(na: Any, codes: Iterable[int]) -> Any:
    """The names as UTF-8: offsets, and the bytes of all one after the other."""
    codes = np.asarray(codes)
    encoded = [name.encode() for name in _NAMES]
    offsets = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(np.array([len(name) for name in encoded])[codes], out=offsets[1:])
    data = b"".join([encoded[code] for code in codes.tolist()])
    return na.c_array_from_buffers(na.large_string(), len(codes), [None, offsets, data])
