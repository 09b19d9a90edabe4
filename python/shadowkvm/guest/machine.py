"""Machine: a guest's memory and CPUs, its kernel's own page tables, and the trace that it leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shadowkvm.errors import ConfigError
from shadowkvm.guest.cpu import Cpu
from shadowkvm.guest.layout import LAYOUTS
from shadowkvm.guest.task import Mm
from shadowkvm.ops import PAGE_SIZE, TRACE_DTYPE, Flag, Op
from shadowkvm.pagetables import AddressSpace, GuestMemory, Reuse, make_rows

__all__ = ["MIB", "Machine", "Settings"]

MIB: Final = 1 << 20
_MAX_CPUS: Final = 64
_ENTRY_PAGES: Final = 4
_PCIDE, _SMEP, _SMAP = 1 << 17, 1 << 20, 1 << 21
_KERNEL_DATA: Final = {"user": False, "nx": True}
PAGE_FAULT: Final = 14


@dataclass(frozen=True, slots=True)
class Settings:
    """How the guest is built; every field is also an argument of `Linux`."""

    memory: int = 256 * MIB
    """Bytes of guest memory from gpa 0."""
    mode: str = "4-level"
    """Paging mode: a key of `shadowkvm.pagetables.MODES`."""
    cpus: int = 1
    """Number of CPUs."""
    kpti: bool = False
    """Two top tables for each process and a CR3 load at each way in and out of the kernel (64-bit guests)."""
    pcid: bool = False
    """CR4.PCIDE: six address spaces stay in the TLB (4-level guests; profile "zen")."""
    direct_page: int = 0
    """Page size of the kernel's direct map of memory, bytes; 0: the second smallest (2 MiB; 4 MiB in 32-bit mode)."""
    reuse: Reuse = "lifo"
    """In which order freed frames come back into use, see `shadowkvm.pagetables.FramePool`."""
    table_grace: int = 0
    """So many freed table frames wait before they can be used for anything else (freeing by RCU)."""
    flush_ceiling: int = 33
    """Flushes of more pages reload CR3, smaller ones use INVLPG (``tlb_single_page_flush_ceiling``)."""
    lazy_vfree: int = 512
    """Pages of vmalloc space that may be unmapped before they are flushed, all together."""
    seed: int = 1
    """Of `Machine.random`."""

    def check(self) -> None:
        """Refuse what cannot be; ConfigError names the field."""
        if self.mode not in LAYOUTS:
            raise ConfigError(f"mode {self.mode!r}: there are {', '.join(LAYOUTS)}")
        layout = LAYOUTS[self.mode]
        least = layout.struct_pages_gpa + 4 * MIB
        if not least <= self.memory <= layout.direct_size or self.memory % (4 * MIB):
            limits = f"{least >> 20} MiB to {layout.direct_size >> 20} MiB, a multiple of 4 MiB"
            raise ConfigError(f"memory {self.memory:#x}: a guest in mode {self.mode} has {limits}")
        if not 1 <= self.cpus <= _MAX_CPUS:
            raise ConfigError(f"cpus {self.cpus} is not from 1 to {_MAX_CPUS}")
        if self.pcid and self.mode in {"pae", "32-bit"}:
            raise ConfigError(f"pcid: {self.mode} paging has none, only 64-bit guests have")
        for name in ("table_grace", "flush_ceiling", "lazy_vfree", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} is below 0")


class Machine:
    """A guest up to the point where its kernel has mapped itself.

    What is built before `start` is the image that the guest begins with; what happens after it is traced: `take` hands
    the rows out.

    Attributes:
        settings: how it was built.
        memory: frames and tables.
        kernel: the kernel's own address space, whose upper half all others share.
        cpus: the CPUs.
        random: the one source of chance, seeded.
    """

    def __init__(self, settings: Settings) -> None:
        settings.check()
        self.settings = settings
        self.layout = LAYOUTS[settings.mode]
        struct_pages = self._struct_page_bytes(settings.memory)
        first = self.layout.struct_pages_gpa + struct_pages
        self.memory = GuestMemory(settings.memory, settings.mode, first=first, reuse=settings.reuse)
        self.random = np.random.default_rng(settings.seed)
        self.kernel = AddressSpace(self.memory)
        self.user_kernel = AddressSpace(self.memory) if settings.kpti else None
        self._map_kernel(struct_pages)
        self.init_mm = Mm(self.kernel, 1, 0)
        self._mms = 1
        word = self.memory.mode.word
        self.cpus = [
            Cpu(n, entry=self.layout.entry, text=self.layout.text, word=word, kpti=settings.kpti, pcid=settings.pcid)
            for n in range(settings.cpus)
        ]
        self.cpu = self.cpus[0]
        """The CPU whose rows are being made."""
        self._out: list[NDArray[np.void]] = []
        self._grace: list[int] = []
        self.started = False
        self.image: tuple[tuple[int, bytes], ...] = ()
        """Pages of tables (gpa, content) at the start."""
        self.start_sregs: tuple[dict[str, int], ...] = ()
        """Registers of each CPU at the start."""

    # -- the kernel's own map -------------------------------------------------------------------------------------

    @staticmethod
    def _struct_page_bytes(memory: int) -> int:
        return -(-(memory >> 12) * 64 // (4 * MIB)) * 4 * MIB

    def _map_kernel(self, struct_pages: int) -> None:
        layout, settings, kernel = self.layout, self.settings, self.kernel
        sizes = list(self.memory.mode.page_sizes)
        large = sizes[1]
        glob = not settings.kpti
        page = settings.direct_page or large
        if page not in sizes:
            raise ConfigError(f"direct_page {page:#x}: {settings.mode} paging has {', '.join(map(hex, sizes))}")
        nx = self.memory.mode.nx
        data = {"user": False, "nx": nx, "global_": glob}
        whole = settings.memory // page * page
        kernel.map(layout.direct, 0, whole, page_size=page, **data)
        kernel.map(layout.direct + whole, whole, settings.memory - whole, page_size=large, **data)
        if layout.vmemmap:
            kernel.map(layout.vmemmap, layout.struct_pages_gpa, struct_pages, page_size=large, **data)
            kernel.map(
                layout.text, layout.text_gpa, layout.image_size, page_size=large, write=False, user=False, global_=glob
            )
            kernel.map(layout.data, layout.data_gpa, layout.image_size, page_size=large, **data)
        else:
            # A 32-bit kernel lives inside its direct map: there its code must be executable.
            kernel.map(
                layout.text, layout.text_gpa, layout.image_size, page_size=large, write=False, user=False, global_=glob
            )
        self._map_entry()

    def _map_entry(self) -> None:
        """IDT, TSS and entry stacks; and, for KPTI, what of the kernel user code's tables have."""
        layout, memory = self.layout, self.memory
        pages = 1 + 3 * self.settings.cpus
        gpas = memory.frames.take(pages) << np.uint64(12)
        for space in (self.kernel, self.user_kernel):
            if space is None:
                continue
            glob = space is self.user_kernel or not self.settings.kpti
            rights = {"user": False, "nx": memory.mode.nx, "global_": glob}
            space.map(layout.entry, gpas[:1], PAGE_SIZE, write=False, **rights)
            space.map(layout.entry + PAGE_SIZE, gpas[1:], (pages - 1) * PAGE_SIZE, **rights)
        if self.user_kernel is not None:
            size = _ENTRY_PAGES * PAGE_SIZE
            self.user_kernel.map(layout.text, layout.text_gpa, size, write=False, user=False, global_=True)
        # The vmalloc area's upper tables are made at boot (preallocate_vmalloc_pages), so that all processes have them.
        self.kernel.ensure(layout.vmalloc, layout.vmalloc + 1, 1)

    # -- addresses of the kernel ------------------------------------------------------------------------------------

    def direct(self, gpas: ArrayLike) -> NDArray[np.uint64]:
        """Where the kernel reaches guest physical addresses."""
        return np.asarray(gpas, np.uint64) + np.uint64(self.layout.direct)

    def struct_pages(self, gfns: ArrayLike) -> NDArray[np.uint64]:
        """Where the kernel has its book-keeping of frames (``struct page``)."""
        base = self.layout.vmemmap or self.layout.direct + self.layout.struct_pages_gpa
        return np.uint64(base) + np.asarray(gfns, np.uint64) * np.uint64(64)

    @property
    def sregs(self) -> list[dict[str, int]]:
        """The control registers of each CPU now: cr0, cr3, cr4, efer."""
        return [{**self.memory.mode.sregs, "cr4": self.cr4, "cr3": self._cr3_of(cpu)} for cpu in self.cpus]

    @property
    def cr4(self) -> int:
        """CR4 of every CPU."""
        wide = self.memory.mode.address_bits > 32
        more = (_SMEP | _SMAP if wide else 0) | (_PCIDE if self.settings.pcid else 0)
        return self.memory.mode.sregs["cr4"] | more

    def _cr3_of(self, cpu: Cpu) -> int:
        if cpu.mm is None:
            return self.kernel.root
        return cpu.cr3(cpu.mm, user=cpu.kpti and cpu.task is not None)

    # -- the trace ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """What was built so far is the image; from here on the guest's doings are traced."""
        self._out.clear()
        self.image = tuple(self.memory.pages())
        self.start_sregs = tuple(self.sregs)
        self.started = True

    def emit(self, rows: NDArray[np.void], cpu: Cpu | None = None) -> None:
        """Add rows to the trace, as done by ``cpu`` (None: the one whose turn it is)."""
        if self.started and len(rows):
            rows["vcpu"] = (cpu or self.cpu).number
            self._out.append(rows)

    def add(self, rows: NDArray[np.void]) -> None:
        """Add rows of which each names its CPU already."""
        self._out.append(rows)

    def act(self, op: Op, addr: ArrayLike = 0, value: ArrayLike = 0, **fields: Any) -> None:
        """Add rows of one op, see `shadowkvm.pagetables.make_rows`."""
        if self.started:
            self.emit(make_rows(op, addr, value, **fields))

    def take(self) -> NDArray[np.void]:
        """The rows since the last call: TRACE_DTYPE, shape (n,)."""
        rows = np.concatenate(self._out) if self._out else np.zeros(0, TRACE_DTYPE)
        self._out.clear()
        return rows

    def through_direct_map(self, stores: NDArray[np.void]) -> NDArray[np.void]:
        """Stores with ``addr`` = gpa as the kernel makes them: through its direct map. Changes them in place."""
        stores["addr"] += np.uint64(self.layout.direct)
        return stores

    def note_pages(self, gfns: NDArray[np.uint64]) -> NDArray[np.void]:
        """A store to each frame's struct page: reference and mapping counts."""
        return make_rows(Op.WRITE, self.struct_pages(gfns), size=self.memory.mode.word, flags=Flag.KEEP)

    # -- frames -------------------------------------------------------------------------------------------------------

    def free_tables(self, gfns: list[int]) -> None:
        """Give frames of tables back; those that came last wait as long as `Settings.table_grace` says."""
        self._grace += gfns
        ready = len(self._grace) - self.settings.table_grace
        if ready > 0:
            self.memory.frames.give(self._grace[:ready])
            del self._grace[:ready]

    def new_mm(self) -> Mm:
        """An empty address space with the kernel's half (``mm_init``)."""
        self._mms += 1
        kpti, user_kernel = self.settings.kpti, self.user_kernel
        space = AddressSpace(self.memory, kernel=self.kernel, kpti=kpti, user_kernel=user_kernel)
        mode = self.memory.mode
        if mode.top.entries == 4:
            # PAE: the CPU reads the top entries only when CR3 is loaded, so Linux makes their tables beforehand.
            space.ensure(0, mode.user_half, 2)
        return Mm(space, self._mms, self.layout.mmap_top)

    def describe(self) -> dict[str, Any]:
        """The settings as a dict."""
        return asdict(self.settings)
