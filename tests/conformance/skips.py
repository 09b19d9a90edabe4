"""What the suite does not check, and why. The only such list; keep it short."""

from __future__ import annotations

# Modes that the engine refuses with ConfigError for now; their scenarios are in the corpus and wait.
UNSUPPORTED_MODES = {
    "32-bit": "32-bit paging without PAE comes later",
    "PAE": "PAE paging comes later",
    "no paging": "CR0.PG=0 comes later",
}
# Published runs without a recording: only their counters and a sketch of their ops are known.
NOT_RECORDED = {
    "O3-8": "two vCPUs: no op list was recorded",
    "O3-9": "two vCPUs: no op list was recorded",
    "O4-0": "nx_huge_pages=force: no op list was recorded",
}
# Parts of one scenario: id -> {check: reason}. Checks: "run" (everything), "counters", "events", "tables".
SKIPPED: dict[str, dict[str, str]] = {
    "O5-1": {"run": "CMPXCHG16B: a 16-byte locked exchange is no operation of the API"},
    # The API knows an instruction's address, not its length: the emulator's second fetch walk is not raised.
    "O5-2": {"events": "an instruction across a page end"},
}
