"""Cases on disk: JSON with ``"schema": "shadowkvm.case/1"``, in xz if the file's name ends so.

Numbers are JSON numbers or strings in hexadecimal ("0x400000"). Operations and answers stand either one by one, for
people, or by columns, which packs to 3 to 6 bytes an operation with its answer; readers take both.
docs/verify.md describes every field.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shadowkvm.errors import TraceError
from shadowkvm.kvm.case import STATUSES, Answer, Case, Op, Slot

__all__ = ["SCHEMA", "load", "save"]

SCHEMA: Final = "shadowkvm.case/1"
FILTERS: Final = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]
COLUMNS: Final = ("addr", "value", "size", "cpl", "vcpu", "expected", "flags", "slot", "length")
REGISTERS: Final = ("cr0", "cr3", "cr4", "efer", "vcpus", "memory", "manual_dirty")
PLAIN: Final = ("name", "shows", "theme", "seed", "kernel", "profile", "nx_huge_pages")


def number(value: Any) -> int:
    """A number as a file may hold it."""
    if isinstance(value, str):
        return int(value, 16)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is no number")


def join(values: Iterable[int]) -> str:
    """A column: hexadecimal, a blank between two, nothing for zero."""
    return " ".join("" if not v else format(v, "x") for v in values)


def split(text: str, n: int) -> list[int]:
    """A column of `n` numbers."""
    values = [int(x, 16) if x else 0 for x in text.split(" ")] if n else []
    if len(values) != n:
        raise ValueError(f"a column has {len(values)} numbers instead of {n}")
    return values


def pack_ops(ops: Sequence[Op]) -> dict[str, Any]:
    """Operations by columns."""
    names = sorted({o.op for o in ops})
    used = {f: [getattr(o, f) for o in ops] for f in COLUMNS}
    columns = {f: join(v) for f, v in used.items() if any(v)}
    return {"count": len(ops), "names": names, "op": join(names.index(o.op) for o in ops), **columns}


def unpack_ops(packed: Any) -> list[Op]:
    """Operations from either form."""
    if isinstance(packed, list):
        return [Op(o["op"], **{k: number(v) for k, v in o.items() if k != "op"}) for o in packed]
    n = packed["count"]
    columns = [split(packed[f], n) if f in packed else [0] * n for f in COLUMNS]
    names = [packed["names"][i] for i in split(packed["op"], n)]
    return [Op(name, *row) for name, *row in zip(names, *columns, strict=True)]


def expected_address(status: str, op: Op) -> int:
    """What the address of an answer mostly is; columns hold the difference (exclusive or)."""
    return {"page_fault": op.addr, "mmio": op.addr & 0xFFF}.get(status, 0)


def pack_answers(answers: Sequence[Answer], ops: Sequence[Op]) -> dict[str, Any]:
    """Answers by columns; those with the same status, error code and counters share a row of a table."""
    shapes = [json.dumps([STATUSES.index(a.status), a.error_code, a.counters], sort_keys=True) for a in answers]
    table = {shape: i for i, shape in enumerate(sorted(set(shapes)))}
    pairs = list(zip(answers, ops, strict=False))
    return {
        "count": len(answers),
        "shapes": [json.loads(shape) for shape in table],
        "shape": join(table[shape] for shape in shapes),
        "value": join(a.value for a in answers),
        "address": join(a.address ^ expected_address(a.status, op) for a, op in pairs),
        "mmio": {str(i): [[g ^ a.address, n, w] for g, n, w in a.mmio] for i, a in enumerate(answers) if a.mmio},
    }


def unpack_answers(packed: Any, ops: Sequence[Op]) -> list[Answer]:
    """Answers from either form."""
    if isinstance(packed, list):
        return [
            Answer(
                a.get("status", "done"),
                number(a.get("error_code", 0)),
                number(a.get("value", 0)),
                number(a.get("address", 0)),
                [(number(g), n, w) for g, n, w in a.get("mmio", [])],
                dict(a.get("counters", {})),
            )
            for a in packed
        ]
    n, shapes, mmio = packed["count"], packed["shapes"], packed["mmio"]
    out = []
    rows = zip(*(split(packed[k], n) for k in ("shape", "value", "address")), strict=True)
    for i, (s, value, address) in enumerate(rows):
        status, error_code, counters = STATUSES[shapes[s][0]], shapes[s][1], dict(shapes[s][2])
        at = address ^ expected_address(status, ops[i])
        exits = [(g ^ at, length, w) for g, length, w in mmio.get(str(i), [])]
        out.append(Answer(status, error_code, value, at, exits, counters))
    return out


def plain_answer(a: Answer) -> dict[str, Any]:
    """An answer for people: what is zero or empty is left out."""
    out: dict[str, Any] = {"status": a.status}
    out.update({k: hex(v) for k in ("error_code", "value", "address") if (v := getattr(a, k))})
    out.update({k: v for k in ("mmio", "counters") if (v := getattr(a, k))})
    return out


def plain_op(o: Op) -> dict[str, Any]:
    """An operation for people."""
    default = Op(o.op)
    return {"op": o.op, **{k: hex(v) for k in COLUMNS if (v := getattr(o, k)) != getattr(default, k)}}


def pack_case(case: Case, *, columns: bool) -> dict[str, Any]:
    """What stands in the file for this case."""
    out: dict[str, Any] = {k: v for k in PLAIN if (v := getattr(case, k)) not in ("", None) and v is not False}
    out.update({k: v if columns else hex(v) for k in REGISTERS if (v := getattr(case, k)) is not None})
    out["slots"] = [[s.slot, s.gpa, s.size, s.flags] for s in case.slots]
    if case.huge:
        out["huge"] = list(case.huge)
    if columns:
        out["pages"] = {format(g, "x"): [join(e), join(e.values()), len(e)] for g, e in sorted(case.pages.items())}
        out["ops"] = pack_ops(case.ops)
        if case.answers is not None:
            out["answers"] = pack_answers(case.answers, case.ops)
        return out
    out["pages"] = {hex(g): {str(i): hex(v) for i, v in e.items()} for g, e in sorted(case.pages.items())}
    out["ops"] = [plain_op(o) for o in case.ops]
    if case.answers is not None:
        out["answers"] = [plain_answer(a) for a in case.answers]
    return out


def unpack_page(packed: Any) -> dict[int, int]:
    """A page of the memory image from either form."""
    if isinstance(packed, Mapping):
        return {int(i): number(v) for i, v in packed.items()}
    indices, values, n = packed
    return dict(zip(split(indices, n), split(values, n), strict=True))


def unpack_case(raw: Mapping[str, Any], common: Mapping[str, Any]) -> Case:
    """A case from what stands in the file; `common` holds what all cases of the file share."""
    known = {*PLAIN, *REGISTERS, "slots", "huge", "pages", "ops", "answers"}
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"field {unknown[0]!r} is unknown")
    huge, ops = raw.get("huge"), unpack_ops(raw["ops"])
    return Case(
        slots=[Slot(*map(number, s)) for s in raw["slots"]],
        pages={int(g, 16): unpack_page(p) for g, p in raw["pages"].items()},
        ops=ops,
        answers=unpack_answers(raw["answers"], ops) if "answers" in raw else None,
        huge=(number(huge[0]), number(huge[1])) if huge else None,
        **{k: number(raw[k]) for k in REGISTERS if k in raw},  # type: ignore[arg-type]
        **{k: raw.get(k, common.get(k)) for k in PLAIN if k in raw or k in common},
    )


def save(
    path: Path | str, cases: Sequence[Case], *, columns: bool | None = None, meta: Mapping[str, str] | None = None
) -> None:
    """Write cases, whole or not at all.

    Args:
        path: the file; a name that ends in ".xz" is compressed and, unless told otherwise, written by columns.
        cases: one or many.
        columns: pack operations and answers by columns.
        meta: what is worth knowing about how they were made (kernel, qemu, cpu, module).
    """
    path = Path(path)
    packed = path.suffix == ".xz"
    columns = packed if columns is None else columns
    whole: dict[str, Any] = {"schema": SCHEMA, **(meta or {}), "cases": [pack_case(c, columns=columns) for c in cases]}
    for case in whole["cases"]:
        for k in ("kernel", "profile"):
            if case.get(k) == whole.get(k, "qemu-tcg" if k == "profile" else None):
                case.pop(k, None)
    text = json.dumps(whole, separators=(",", ":")) if columns else json.dumps(whole, indent=1)
    data = lzma.compress(text.encode(), filters=FILTERS) if packed else text.encode() + b"\n"
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def load(path: Path | str) -> list[Case]:
    """The cases of a file, checked.

    Raises:
        TraceError: the file is no case file of this schema, or a case in it cannot be run.
        OSError: it cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        whole = json.loads(lzma.decompress(data) if data[:6] == b"\xfd7zXZ\0" else data)
    except (lzma.LZMAError, ValueError) as error:
        raise TraceError(f"no JSON: {error}", place=str(path)) from error
    if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
        found = whole.get("schema") if isinstance(whole, dict) else None
        raise TraceError(f"schema {found!r}, wanted {SCHEMA!r}", place=str(path))
    cases = []
    common = {k: whole[k] for k in ("kernel", "profile") if k in whole}
    for i, raw in enumerate(whole.get("cases", [])):
        place = f"{path} case {i}"
        try:
            case = unpack_case(raw, common)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise TraceError(what, place=place) from error
        case.check(place)
        cases.append(case)
    return cases
