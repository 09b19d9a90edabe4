"""Recorded cases on disk: JSON in xz, by columns, since that packs well (about 3 to 6 bytes for an op and its result).

cases = load(path)          # dicts as the generator makes them; case["results"] is a list of kvm.oracle.Result
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from ..kvm.result import Result

SCHEMA = "shadowkvm-random/1"
FIELDS = ("addr", "value", "size", "cpl", "vcpu", "expected", "flags", "slot")


def _join(values) -> str:
    return " ".join("" if not v else format(v, "x") for v in values)


def _split(text: str) -> list[int]:
    return [int(x, 16) if x else 0 for x in text.split(" ")]


def _pack_ops(ops: list[dict]) -> dict:
    names = sorted({o["op"] for o in ops})
    columns = {f: _join(o.get(f, 0) for o in ops) for f in FIELDS if any(o.get(f) for o in ops)}
    return {"names": names, "op": _join(names.index(o["op"]) for o in ops), **columns}


def _unpack_ops(packed: dict) -> list[dict]:
    ops = [{"op": packed["names"][i]} for i in _split(packed["op"])]
    for f in FIELDS:
        for op, v in zip(ops, _split(packed[f]) if f in packed else [0] * len(ops), strict=True):
            if v or f in ("addr", "value"):
                op[f] = v
    return ops


def _pack_results(results: list[Result]) -> dict:
    shapes = [[r.status, r.err, r.stats] for r in results]
    table = sorted({json.dumps(s, sort_keys=True) for s in shapes})
    return {
        "shapes": [json.loads(t) for t in table],
        "shape": _join(table.index(json.dumps(s, sort_keys=True)) for s in shapes),
        "value": _join(r.value for r in results),
        "addr": _join(r.addr for r in results),
        "mmio": {str(i): r.mmio for i, r in enumerate(results) if r.mmio},
    }


def _unpack_results(packed: dict) -> list[Result]:
    rows = zip(_split(packed["shape"]), _split(packed["value"]), _split(packed["addr"]), strict=True)
    return [
        Result(
            packed["shapes"][s][0],
            packed["shapes"][s][1],
            v,
            a,
            [tuple(m) for m in packed["mmio"].get(str(i), [])],
            dict(packed["shapes"][s][2]),
        )
        for i, (s, v, a) in enumerate(rows)
    ]


def save(path: Path | str, cases: list[dict], **meta) -> None:
    packed = [
        {
            **c,
            "pages": {format(g, "x"): [_join(e), _join(e.values())] for g, e in sorted(c["pages"].items())},
            "ops": _pack_ops(c["ops"]),
            "results": _pack_results(c["results"]),
        }
        for c in cases
    ]
    text = json.dumps({"schema": SCHEMA, **meta, "cases": packed}, separators=(",", ":"))
    Path(path).write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def load(path: Path | str) -> list[dict]:
    whole = json.loads(lzma.decompress(Path(path).read_bytes()))
    if whole["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema {whole['schema']!r}, wanted {SCHEMA!r}")
    for c in whole["cases"]:
        c["pages"] = {int(g, 16): dict(zip(_split(i), _split(v), strict=True)) for g, (i, v) in c["pages"].items()}
        c["ops"], c["results"] = _unpack_ops(c["ops"]), _unpack_results(c["results"])
    return whole["cases"]
