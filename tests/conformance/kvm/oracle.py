"""Asks the real KVM (kvm-amd npt=0 under QEMU TCG) what it does with a case.

A case is a dict: memory (bytes present from 0), perhaps huge [gpa, end] (host pages of 2 MiB there),
slots [[id, gpa, size, flags]], cr0 cr3 cr4 efer, vcpus,
pages {gpa: {index: qword}}, ops [{"op": name, "addr":, "value":, "size":, "cpl":, "vcpu":, ...}].
Needs the packages qemu-system-x86, linux-image-amd64, busybox-static, gcc, binutils, cpio.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from .layout import IMAGE, LABELS, stub_of
from .result import Result

HERE = Path(__file__).resolve().parent
MAGIC = 0x324B4853
KINDS = {
    "read": 2,
    "fetch": 1,
    "efer": 3,
    "hwrite": 16,
    "slot_add": 17,
    "slot_del": 17,
    "dirty": 17,
    "dirtylog": 18,
    "unmap": 19,
    "quota": 20,
}
KEPT = re.compile(r"pf_|mmu_|max_mmu_|invlpg|tlb_flush|remote_tlb_flush|pages_|nx_lpage|insn_emulation|mmio_exits")


def blob(case: dict) -> bytes:
    tops = [g + s for _, g, s, _ in case["slots"]] + [
        o["addr"] + o["value"] for o in case["ops"] if o["op"] == "slot_add"
    ]
    out = [
        struct.pack(
            "<16Q",
            MAGIC,
            case["memory"],
            max([case["memory"], *tops]),
            case["cr0"],
            case["cr3"],
            case["cr4"],
            case["efer"],
            case["vcpus"],
            len(case["slots"]),
            len(case["pages"]),
            len(case["ops"]),
            LABELS["pf_entry"],
            LABELS["gp_entry"],
            LABELS["k_user"],
            *case.get("huge", (0, 0)),
        )
    ]
    out += [struct.pack("<4Q", *s) for s in case["slots"]]
    for gpa, entries in sorted(case["pages"].items()):
        page = bytearray(4096)
        for i, v in entries.items():
            struct.pack_into("<Q", page, i * 8, v)
        out.append(struct.pack("<Q", gpa) + page)
    for o in case["ops"]:
        kind, arg, rip, end, size = KINDS.get(o["op"], 0), o.get("flags", 0), 0, 0, o.get("size", 8)
        if kind < 16:
            rip, end, arg = stub_of(o)
        elif kind in (17, 18):
            size = o.get("slot", 0)
        out.append(
            struct.pack(
                "<4B3I3Q",
                kind,
                size,
                o.get("cpl", 0),
                o.get("vcpu", 0),
                arg,
                rip,
                end,
                o.get("addr", 0),
                o.get("value", 0),
                o.get("expected", 0),
            )
        )
    return b"".join(out)


INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys
$B mount -t devtmpfs d /dev; $B mount -t tracefs t /sys/kernel/tracing
cd /mods; for m in irqbypass ccp kvm; do $B insmod $m.ko; done; $B insmod kvm-amd.ko npt=0
T=/sys/kernel/tracing/trace
for c in /cases/*; do
  echo "CASE $c"; /bin/replay $c {trace}
  if [ -n "{trace}" ]; then $B cat $T; echo > $T; fi
done > /dev/ttyS1 2>&1
$B poweroff -f
"""


def kernel() -> tuple[str, str]:
    """(image, version) of the newest installed kernel, or of the one unpacked under $ORACLE_ROOT."""
    base = os.environ.get("ORACLE_ROOT", "")
    image = max(Path(f"{base}/boot").glob("vmlinuz-*"))
    return str(image), image.name.removeprefix("vmlinuz-")


def _build(cases: list[dict], d: str, trace: bool) -> str:
    base, (_, version), root = os.environ.get("ORACLE_ROOT", ""), kernel(), f"{d}/root"
    for sub in ("bin", "dev", "proc", "sys", "mods", "cases"):
        Path(f"{root}/{sub}").mkdir(parents=True)
    shutil.copy("/bin/busybox", f"{root}/bin/")
    subprocess.run(["gcc", "-O1", "-static", "-o", f"{root}/bin/replay", HERE / "replay.c"], check=True)
    Path(f"{root}/stub.bin").write_bytes(IMAGE)
    for m in ("virt/lib/irqbypass", "drivers/crypto/ccp/ccp", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd"):
        src = Path(f"{base}/lib/modules/{version}/kernel/{m}.ko")
        data = src.read_bytes() if src.exists() else lzma.decompress(Path(f"{src}.xz").read_bytes())
        Path(f"{root}/mods/{src.name}").write_bytes(data)
    for i, c in enumerate(cases):
        Path(f"{root}/cases/{i:05d}").write_bytes(blob(c))
    init = Path(f"{root}/init")
    init.write_text(INIT.format(trace="t" if trace else ""))
    init.chmod(0o755)
    names = subprocess.run(["find", "."], cwd=root, check=True, capture_output=True).stdout
    cpio = ["cpio", "--quiet", "-o", "-H", "newc"]
    archive = subprocess.run(cpio, input=names, cwd=root, check=True, capture_output=True).stdout
    Path(f"{d}/initrd.gz").write_bytes(gzip.compress(archive, 1))
    return f"{d}/initrd.gz"


def boot(cases: list[dict], trace: bool = False, timeout: float = 900) -> str:
    """Runs the cases in one boot and returns what the harness printed."""
    with tempfile.TemporaryDirectory(prefix="oracle") as d:
        machine = "-accel tcg -cpu EPYC,+svm -m 2048 -display none -no-reboot"
        files = f"-serial file:{d}/console -serial file:{d}/out -kernel {kernel()[0]} -initrd {_build(cases, d, trace)}"
        line = "console=ttyS0 quiet panic=-1 mitigations=off"
        command = ["nice", "qemu-system-x86_64", *machine.split(), *files.split(), "-append", line]
        subprocess.run(command, timeout=timeout, check=True, stderr=subprocess.DEVNULL)
        return Path(f"{d}/out").read_text(errors="replace").replace("\r", "")


def parse(text: str) -> list[list[Result]]:
    """The results of each case, without the counters that depend on the host's timer (exits and the like)."""
    cases: list[list[Result]] = []
    for line in text.splitlines():
        if line.startswith("CASE "):
            cases.append([])
        elif line.startswith("R "):
            p = line.split()
            mmio = [
                tuple(int(x, 16 if i == 0 else 10) for i, x in enumerate(w.split(":")[1:]))
                for w in p[6:]
                if w.startswith("mmio:")
            ]
            stats = {
                m[1]: int(m[2]) for m in (re.match(r"(\w+)([+-]\d+)$", w) for w in p[6:]) if m and KEPT.match(m[1])
            }
            cases[-1].append(Result(int(p[2]), int(p[3], 16), int(p[4], 16), int(p[5], 16), mmio, stats))
    return cases


def run(cases: list[dict], **kw) -> list[list[Result]]:
    return parse(boot(cases, **kw))


def events(text: str) -> list[list[str]]:
    """Of the trace of one case (`boot` with trace=True): the events of each op, without time and task."""
    ops: list[list[str]] = []
    for line in text.replace("\0", "").splitlines():
        m = re.match(r"\s*\S+-\d+\s+\[\d+\]\s+\S+\s+[\d.]+: (.*)", line)
        if m and (mark := re.match(r"tracing_mark_write: op (\d+)", m[1])):
            ops.append([])
            assert int(mark[1]) == len(ops) - 1, line
        elif m and ops:
            ops[-1].append(m[1].rstrip())
    return ops
