"""What the suite does not check, and why. The only such list; keep it short."""

from __future__ import annotations

# Published runs without a recording: only their counters and a sketch of their ops are known.
NOT_RECORDED = {
    "O3-8": "two vCPUs: no op list was recorded; directed.json.xz has a case of its own",
    "O3-9": "two vCPUs: no op list was recorded; directed.json.xz has a case of its own",
    "O4-0": "nx_huge_pages=force: no op list was recorded; directed.json.xz has a case of its own",
}
# Parts of one scenario: id -> {check: reason}. Checks: "run" (everything), "counters", "events", "tables".
SKIPPED: dict[str, dict[str, str]] = {
    # The driver stands HLT exits in for the decodes that re-inject INT3 (13.4): same walks, another exit reason.
    "O2-12": {"events": "INT3 is no operation of the API"},
}
