"""What the random cases are about."""

from __future__ import annotations

# How often each kind of step is taken, by the case's theme; each case then moves every weight at random.
STEPS = dict(
    access=30,
    edit=25,
    flood=2,
    alias_edit=6,
    invlpg=5,
    cr3=6,
    crs=1.5,
    mmio=3,
    scan=1.5,
    switch=2,
    cow=2,
    cross=1.5,
    reuse=1,
    host=1.5,
    tour=0.1,
    dirty=0,
    unmap=0,
    slots=0,
    quota=0.2,
)
THEMES = {
    "everything": dict(dirty=1, unmap=1, slots=0.6, quota=0.6, host=2),
    "unsync": dict(edit=60, alias_edit=15, cr3=12, invlpg=10, switch=5),
    "flood": dict(flood=20, reuse=4, edit=30),
    "mmio": dict(mmio=25, edit=15, slots=0.5),
    "user": dict(access=60, cow=6),
    "roots": dict(cr3=25, switch=10, crs=2),
    "control": dict(crs=12, access=45),
    "dirty": dict(dirty=6, host=3, access=50),
    "slots": dict(slots=4, mmio=8),
    "unmap": dict(unmap=8, host=4, edit=30),
    "quota": dict(quota=2, scan=4, switch=8, alias_edit=10, tour=12, crs=4),
    "instructions": dict(edit=40, flood=4, alias_edit=12),
    "self": dict(alias_edit=30, edit=10),
    "huge": dict(access=45, dirty=2, slots=0.3, reuse=2, quota=0.3),
}
