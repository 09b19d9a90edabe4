"""The guest of the recorded runs: one scenario's ops as calls to a vCPU, one call for each guest instruction.

Which page is touched first, and how, decides prefetch groups, accessed bits and counters, so nothing is left out: the
reads of the op list, the jump table, the stack, the CPU's own accesses to IDT, GDT, TSS and stack when it delivers a
#PF or INT n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.corpus import Corpus, Op

from tests.conformance.corpus import OPS_AT, Insn

# Op letter -> blocks of the guest program. HOST is "outp"; the op that ends every run is HLT.
BLOCKS = {
    "HLT": ["done"],
    "R": ["rd"],
    "W": ["wr"],
    "INV": ["inv"],
    "CR3": ["cr3"],
    "CALL": ["exec"],
    "CR0": ["cr0"],
    "CR4": ["cr4"],
    "HOST": ["outp"],
    "W32": ["wr32"],
    "UR": ["ur", "toring3"],
    "UW": ["uw", "toring3"],
    "W8": ["wr8"],
    "W16": ["wr16"],
    "XCHG": ["xch"],
    "LCMPXCHG": ["cmpx"],
    "LOR": ["orl"],
    "REPSTOS": ["stos"],
    "PUSH": ["push"],
    "ADDM": ["addm"],
    "MOVAPS": ["movaps"],
    "UEXEC": ["ux", "toring3"],
    "EFER": ["efer"],
    "LCMPXCHG8B": ["cmpx8"],
    "RAC": ["rdac"],
    "INT3": ["ud"],
    "W64": ["wr64"],
}
# The 32-bit program stores 32 bits under its plain label.
BLOCKS32 = {"W32": ["wr"]}  # fmt: skip
# Code that a scenario puts into guest memory and calls, by its first bytes.
CALLED = {
    b"\xc3": [(1, "ret", "ret")],
    b"\xf0\x48\x0f\xc7\x0a": [(5, "lock cmpxchg16b (%rdx)", "cmpxchg16b"), (1, "ret", "ret")],
    b"\x48\x89\x0a": [(3, "mov %rcx,(%rdx)", "store 8 rdx mov"), (1, "ret", "ret")],
    b"\x00\x00": [(2, "add %al,(%rax)", "rmw 1 rax add")],
}
STACK = 0x206000
GDT, TSS_RSP0 = 0x202000, 0x203004
AC = 0x40000


class GuestPageFaultError(Exception):
    """The guest's instruction took a #PF; the program delivers it and goes on in its handler."""

    def __init__(self, error_code: int) -> None:
        super().__init__(f"#PF {error_code:#x}")
        self.error_code = error_code


class ShutdownError(Exception):
    """The vCPU shut down: the run ends here."""


class Guest:
    def __init__(self, cpu: Any, corpus: Corpus, code_at: Callable[[int, int], bytes], *, idt: int, long: bool) -> None:
        self.cpu = cpu
        self.long = long
        self.blocks = (corpus.long if long else corpus.short).blocks
        self.labels = BLOCKS if long else {**BLOCKS, **BLOCKS32}
        self.table = self.blocks["next_op"][-1]
        self.code_at = code_at
        self.idt = idt
        self.int3_decodes: list[int] = []
        self.regs = {"rsp": STACK, "rsi": OPS_AT}
        self.user = False
        self.ac = False
        self.rip, self.length = 0, 1
        self.faults: list[int] = []  # error codes of the guest #PFs delivered

    # -- ops ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.block("start")

    def run_op(self, op: Op, number: int, on_host: Callable[[int], None]) -> None:
        """One turn of the guest's loop. `number` is the op's slot in the jump table."""
        self.regs.update(rbx=op.address, rdx=op.value, rcx=op.extra, rax=number, table=self.slot_at(number))
        try:
            self.block("next_op")
            for label in self.labels[op.letter]:
                for insn in self.blocks[label]:
                    if self.step(insn):
                        return self.finish()
                    if insn.access == "io":
                        on_host(op.address)
                    if insn.access == "hlt":
                        return None
        except GuestPageFaultError as fault:
            self.faults.append(fault.error_code)
            self.deliver(14, fault.error_code)
            self.block("pf_handler")
        return self.finish()

    def slot_at(self, number: int) -> int:
        """Where the jump table holds the label of that op."""
        if self.long:
            return 0x200020 + 8 * number
        return int(self.table.text.split("*")[1].split("(")[0], 16) + 4 * number

    def finish(self) -> None:
        self.block("adv")
        self.regs["rsi"] += 32

    def block(self, label: str) -> None:
        for insn in self.blocks[label]:
            self.step(insn)

    # -- instructions ------------------------------------------------------------------------------------------------

    def step(self, insn: Insn) -> bool:
        """One instruction. True: control went to a handler that jumps back to the loop by itself."""
        self.rip = insn.rip
        self.length = insn.length
        verb, *words = insn.access.split()
        if verb in self.regs or verb in ("r9", "r10", "r11"):
            source = words[0]
            self.ok(self.cpu.fetch(insn.rip, self.user))
            self.regs[verb] = self.regs[source] if source in self.regs else int(source, 16)
            return False
        return bool(getattr(self, f"do_{verb}")(*words))

    def ok(self, outcome: Any) -> Any:
        if outcome.status == "shutdown":
            raise ShutdownError
        if outcome.status == "page_fault":
            raise GuestPageFaultError(outcome.error_code)
        assert outcome.status in ("done", "mmio"), f"rip {self.rip:x}: {outcome.status}"
        return outcome

    def how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"rip": self.rip, "user": self.user}
        if self.ac:
            how["ac"] = True
        if self.rip >> 12 != (self.rip + self.length - 1) >> 12:  # the CPU fetches both pages
            how["length"] = self.length
        return how

    def do_plain(self) -> None:
        self.ok(self.cpu.fetch(self.rip, self.user))

    def do_load(self, size: str, base: str, offset: str) -> None:
        self.ok(self.cpu.read(self.regs[base] + int(offset), int(size), **self.how()))

    def do_store(self, size: str, base: str, kind: str) -> None:
        at = self.regs[base]
        value = {"rbx": self.regs["rdx"], "rdx": self.regs["rcx"]}[base] if kind in ("mov", "high") else 0
        if kind == "high":  # the upper half of a 64-bit value
            at, value, kind = at + 4, value >> 32, "mov"
        value &= (1 << 8 * int(size)) - 1
        self.ok(self.cpu.write(at, value, int(size), kind=kind, **self.how()))

    def do_rep_stos(self) -> None:
        self.ok(
            self.cpu.rep_stos(self.regs["rbx"], self.regs["rdx"], self.regs["rcx"], 8, user=self.user, rip=self.rip)
        )

    def do_rmw(self, size: str, kind: str, how: str) -> None:
        if kind == "rax":  # the zero bytes that UEXEC runs over: ADD [RAX],AL
            value = self.regs["rax"] & 0xFF
            self.ok(self.cpu.rmw(self.regs["rax"], value, kind=how, size=int(size), locked=False, **self.how()))
            return
        expected = self.regs["rcx"] if kind == "cmpxchg" else None
        self.ok(
            self.cpu.rmw(self.regs["rbx"], self.regs["rdx"], kind=kind, size=int(size), expected=expected,
                         locked=how == "locked", **self.how())
        )  # fmt: skip

    def do_cmpxchg8b(self) -> None:
        """EDX:EAX is the low half of rdx over the low half of rcx (the program's MOV), ECX:EBX rcx over rbx."""
        low = 0xFFFFFFFF
        expected = (self.regs["rdx"] & low) << 32 | self.regs["rcx"] & low
        new = (self.regs["rcx"] & low) << 32 | self.regs["rbx"] & low
        self.ok(
            self.cpu.rmw(self.regs["rbx"], new, kind="cmpxchg", size=8, expected=expected, locked=True, **self.how())
        )

    def do_cmpxchg16b(self) -> None:
        self.ok(self.cpu.rmw(self.regs["rdx"], 0, kind="cmpxchg", size=16, expected=1, locked=True, **self.how()))

    def do_push(self, what: str) -> None:
        value = self.regs.get(what, 2) if not what.isdigit() else int(what)
        size = 8 if self.long else 4
        self.regs["rsp"] -= size
        self.ok(self.cpu.write(self.regs["rsp"], value, size, kind="push", **self.how()))

    def do_flags(self, kind: str, operand: str) -> None:
        self.ok(self.cpu.rmw(self.regs["rsp"], int(operand, 16), kind=kind, size=4, locked=False, **self.how()))
        self.regs["rflags"] = AC if kind == "or" else 0

    def do_popf(self) -> None:
        self.ok(self.cpu.read(self.regs["rsp"], 8, **self.how()))
        self.regs["rsp"] += 8
        self.ac = bool(self.regs.pop("rflags") & AC)

    def do_invlpg(self) -> None:
        self.ok(self.cpu.invlpg(self.regs["rbx"], rip=self.rip))

    def do_cr0(self) -> None:
        self.ok(self.cpu.load_cr0(self.regs["rbx"], rip=self.rip))

    def do_cr3(self) -> None:
        self.ok(self.cpu.load_cr3(self.regs["rbx"], rip=self.rip))

    def do_cr4(self) -> None:
        self.ok(self.cpu.load_cr4(self.regs["rbx"], rip=self.rip))

    def do_efer(self) -> None:
        self.ok(self.cpu.wrmsr_efer(self.regs["rbx"], rip=self.rip))

    def do_io(self) -> None:
        self.ok(self.cpu.io(rip=self.rip))

    def do_hlt(self) -> None:
        self.ok(self.cpu.hlt(rip=self.rip))

    # -- control transfers -------------------------------------------------------------------------------------------

    def do_call(self) -> bool:
        self.do_push("return")
        return self.run_code(self.regs["rbx"])

    def do_ret(self) -> None:
        size = 8 if self.long else 4
        self.ok(self.cpu.read(self.regs["rsp"], size, **self.how()))
        self.regs["rsp"] += size

    def do_iret(self) -> bool:
        """To CPL3: five words off the stack, both descriptors from the GDT, then the user's code."""
        for word in range(5):
            self.ok(self.cpu.read(self.regs["rsp"] + 8 * word, 8, **self.how()))
        for selector in (0x20, 0x18):
            self.ok(self.cpu.read(GDT + selector, 8, implicit=True))
        self.user = True
        return self.run_code(self.regs["r10"])

    def run_code(self, target: int) -> bool:
        """Run what stands at `target`; True if it did not come back by RET."""
        known = {block[0].rip: block for block in self.blocks.values()}.get(target)
        if known is None:
            self.rip = target
            self.ok(self.cpu.fetch(target, self.user))  # may fault before anybody asks what the bytes are
            known = self.called_code(target)
        for insn in known:
            if self.step(insn):
                return True
        return known[-1].access != "ret"

    def called_code(self, target: int) -> list[Insn]:
        for first, insns in CALLED.items():
            if self.code_at(target, len(first)) == first:
                out = []
                for length, text, access in insns:
                    out.append(Insn(target, length, text, access))
                    target += length
                return out
        message = f"the guest ran into unknown code at {target:x}"
        raise AssertionError(message)

    def do_int(self, vector: str) -> bool:
        self.ok(self.cpu.fetch(self.rip, self.user))
        self.deliver(int(vector, 16), None)
        self.block("ret0")
        return True

    def do_int3(self) -> bool:
        """INT3.

        On a host without NRIPS KVM re-injects it by decoding the instruction again after a fault in its delivery. The
        decode-only skip of HLT is the same walk and the same event, so it stands in. How often: recorded.
        """
        self.ok(self.cpu.fetch(self.rip, self.user))
        rip, before = self.rip, self.cpu.counters["pf_taken"]
        self.deliver(3, None)
        if self.cpu.counters["pf_taken"] != before:
            for _ in range(self.int3_decodes.pop(0)):
                self.ok(self.cpu.hlt(rip=rip))
        self.block("ret0")
        return True

    def deliver(self, vector: int, error_code: int | None) -> None:
        """What the CPU itself touches: the gate, the code segment, RSP0 when it comes from CPL3, then the frame."""
        how: dict[str, Any] = {"user": self.user, "delivery": True}
        size = 8 if self.long else 4
        gate = self.idt + 2 * size * vector
        for address in (gate, gate + size, GDT + 8):
            self.ok(self.cpu.read(address, size, **how))
        old = self.regs["rsp"]
        if self.user:
            self.ok(self.cpu.read(TSS_RSP0, 8, **how))
            self.regs["rsp"] = STACK
        if self.long:
            self.regs["rsp"] &= ~0xF
        frame = [0x1B if self.user else 0x10, old, 2, 0x23 if self.user else 8, self.rip]
        if not self.long:  # no stack switch, hence no SS and ESP
            frame = frame[2:]
        for word in frame if error_code is None else [*frame, error_code]:
            self.regs["rsp"] -= size
            self.ok(self.cpu.write(self.regs["rsp"], word, size, kind="push", **how))
        self.user = self.ac = False
