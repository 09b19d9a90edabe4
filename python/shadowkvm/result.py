"""RunResult: what a run of rows came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shadowkvm._core import STATUSES
from shadowkvm.counters import Counters

__all__ = ["OUTCOME_DTYPE", "STATUS_NAMES", "RunResult"]

OUTCOME_DTYPE: Final = np.dtype(
    {
        "names": ["value", "address", "error_code", "status"],
        "formats": ["<u8", "<u8", "<u4", "<u1"],
        "offsets": [0, 8, 16, 20],
        "itemsize": 24,
    }
)
"""What one row came to: 24 bytes, little-endian.

value u8 (what a load or a read-modify-write loaded, else 0), address u8 (CR2 of a page fault, gpa of an MMIO access,
else 0), error_code u4 (of a page fault), status u1 (index into `STATUS_NAMES`), three bytes of padding.
"""

STATUS_NAMES: Final = tuple(STATUSES)
"""The names of the statuses, in the order of their codes: "done", "page_fault", "mmio", ..."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `Vm.run` came to."""

    rows: int
    """Rows that were run."""
    seconds: float
    """Wall-clock seconds inside the engine. Reading and unpacking a recording is not in it."""
    status: Mapping[str, int]
    """Rows for each status, by its name."""
    counters: Counters
    """What the run added to the counters: ``vm.counters`` after it, less those before it."""
    faults_matched: int
    """Rows with Flag.FAULTS that took the guest #PF, with the error code, that the recorded guest took."""
    faults_missed: int
    """Rows with Flag.FAULTS that took none, or one with another error code."""
    faults_unexpected: int
    """Accesses without Flag.FAULTS that took a guest #PF. In a trace that records no faults these are all of them."""
    first_mismatch: int | None = None
    """Number of the first row that was missed or unexpected."""
    instructions: int = 0
    """Guest instructions that the rows stand for, as the recording counts them; 0 for a plain trace."""
    outcomes: NDArray[np.void] | None = None
    """OUTCOME_DTYPE, shape (rows,), read-only, one for each row; None unless asked for."""

    @property
    def ops_per_second(self) -> float:
        """Rows for each second in the engine."""
        return self.rows / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the outcomes, in the types of JSON."""
        return {
            "rows": self.rows,
            "instructions": self.instructions,
            "status": dict(self.status),
            "faults": {
                "matched": self.faults_matched,
                "missed": self.faults_missed,
                "unexpected": self.faults_unexpected,
                "first_mismatch": self.first_mismatch,
            },
            "counters": dict(self.counters),
            "seconds": self.seconds,
            "rows_per_second": self.ops_per_second,
        }

    def __repr__(self) -> str:
        status = ", ".join(f"{count:,} {name}" for name, count in self.status.items() if count)
        return f"<RunResult: {self.rows:,} rows in {self.seconds:.3g} s ({status or 'none'}), {self.counters!r}>"

    def _repr_html_(self) -> str:
        head = f"<p>{self.rows:,} rows in {self.seconds:.3g} s ({self.ops_per_second:,.0f} rows/s)</p>"
        status = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{count:,}</td></tr>"
            for name, count in self.status.items()
            if count
        )
        return f"{head}<table><tr><th>outcome</th><th>rows</th></tr>{status}</table>{self.counters._repr_html_()}"
