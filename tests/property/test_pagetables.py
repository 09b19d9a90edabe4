"""AddressSpace against a dict of pages, against a second walker, against the engine, and against its own log."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import Image, image_of

import shadowkvm as sk
from shadowkvm.pagetables import MODES, AddressSpace, GuestMemory

PAGE, MEMORY = 4096, 64 << 20
P, W, U, F = 1, 2, 4, 16


@dataclass(frozen=True)
class Page:
    """What the dict says of one small page."""

    frame: int
    write: bool
    user: bool
    nx: bool


Model = dict[int, Page]


@dataclass(frozen=True)
class Change:
    """One call: what, where (in small pages from a base), how many pages, with which rights."""

    what: str
    base: int
    first: int
    count: int
    large: int
    frame: int
    write: bool
    user: bool
    nx: bool


def changes(mode: str) -> st.SearchStrategy[list[Change]]:
    half = MODES[mode].user_half
    bases = [0, (1 << 30) - (4 << 20), half - (8 << 20)]
    change = st.builds(
        Change,
        what=st.sampled_from(["map", "map", "map", "unmap", "protect"]),
        base=st.sampled_from(bases),
        first=st.integers(0, 1600),
        count=st.integers(1, 600),
        large=st.integers(0, 1),
        frame=st.integers(0, 8000),
        write=st.booleans(),
        user=st.booleans(),
        nx=st.booleans() if MODES[mode].nx else st.just(value=False),
    )
    return st.lists(change, min_size=1, max_size=8)


def apply(space: AddressSpace, model: Model, change: Change) -> None:
    """The same change to the tables and to the dict."""
    sizes = list(space.mode.page_sizes)
    size = sizes[change.large] if change.what == "map" else PAGE
    unit = size // PAGE
    first, count = change.first // unit * unit, max(1, change.count // unit) * unit
    gva, length = change.base + first * PAGE, count * PAGE
    if gva + length > space.mode.user_half:
        return
    pages = range(gva // PAGE, (gva + length) // PAGE)
    rights = {"write": change.write, "user": change.user, "nx": change.nx}
    if change.what == "map":
        frame = change.frame // unit * unit
        space.map(gva, frame * PAGE, length, page_size=size, **rights)
        model.update({page: Page(frame + n, **rights) for n, page in enumerate(pages)})
    elif change.what == "unmap":
        space.unmap(gva, length)
        for page in pages:
            model.pop(page, None)
    else:
        if space.mode.nx:
            space.protect(gva, length, **rights)
        else:
            space.protect(gva, length, write=change.write, user=change.user)
        model.update({page: replace(model[page], **rights) for page in pages if page in model})


def probes(model: Model, changed: list[Change]) -> list[int]:
    """Pages worth a look: both ends of every change, their neighbours, and some of those that are mapped."""
    edges = {change.base // PAGE + change.first + step for change in changed for step in (-1, 0, 1, change.count)}
    return sorted({page for page in edges if page >= 0} | set(list(model)[:: max(1, len(model) // 40)]))


@pytest.mark.parametrize("mode", list(MODES))
@given(data=st.data())
def test_the_tables_say_what_a_dict_says(mode: str, data: st.DataObject) -> None:
    space, model = AddressSpace(GuestMemory(MEMORY, mode, first=MEMORY // 2)), Model()
    image = Image([])
    changed = data.draw(changes(mode))
    with space.memory.logging() as log:
        for change in changed:
            apply(space, model, change)
    image.replay(log.rows())
    assert image.content() == image_of(space.memory).content(), "the log leads to another memory"

    pages = probes(model, changed)
    found = space.walk([page * PAGE + 8 for page in pages])
    for at, page in enumerate(pages):
        second, truth = image.walk(mode, space.root, page * PAGE + 8), model.get(page)
        assert bool(found.present[at]) == (second is not None) == (truth is not None), hex(page)
        if second is None or truth is None:
            continue
        gpa, rights = truth.frame * PAGE + 8, (truth.write, truth.user, not truth.nx)
        assert (second.gpa, second.write, second.user, second.execute) == (gpa, *rights)
        walked = (bool(found.write[at]), bool(found.user[at]), bool(found.execute[at]))
        assert (int(found.gpa[at]), *walked) == (gpa, *rights)
    assert sum(run.size for run in space.mappings()) == len(model) * PAGE

    # What is not mapped costs nothing: with the last page gone, only the top table is left.
    for run in space.mappings():
        space.unmap(run.gva, run.size)
    assert space.tables() == [space.root]
    assert space.memory.frames.free == MEMORY // PAGE // 2 - 1


@pytest.mark.parametrize("mode", list(MODES))
@given(data=st.data())
def test_a_clone_is_the_same_but_for_its_rights_to_write(mode: str, data: st.DataObject) -> None:
    parent, model = AddressSpace(GuestMemory(MEMORY, mode, first=MEMORY // 2)), Model()
    for change in data.draw(changes(mode)):
        apply(parent, model, change)
    cow = data.draw(st.booleans())
    image = image_of(parent.memory)
    with parent.memory.logging() as log:
        child = parent.clone(cow=cow)
    image.replay(log.rows())
    assert image.content() == image_of(parent.memory).content()
    for space in (parent, child):
        runs = [run._replace(write=run.write and not cow) for run in parent.mappings()]
        assert space.mappings() == runs
        assert sum(run.size for run in runs) == len(model) * PAGE
    free = parent.memory.frames.free
    own = len(child.tables())
    child.destroy()
    assert parent.memory.frames.free == free + own


@pytest.mark.parametrize("mode", list(MODES))
@given(data=st.data())
def test_the_engine_sees_the_same(mode: str, data: st.DataObject) -> None:
    """Every kind of access to probed pages: it succeeds, with the right memory, or it takes the right fault."""
    space, model = AddressSpace(GuestMemory(MEMORY, mode, first=MEMORY // 2)), Model()
    changed = data.draw(changes(mode))
    for change in changed:
        apply(space, model, change)
    vm = sk.Vm(MEMORY)
    space.install(vm)
    cpu = vm.vcpus[0]
    for page in probes(model, changed)[:60]:
        gva, truth = page * PAGE + 8, model.get(page)
        for kind in data.draw(st.permutations(["read", "write", "fetch"])):
            for user in (False, True):
                want = expected(truth, kind, user=user, nx=space.mode.nx)
                if kind == "read":
                    mark = page * 2 + user
                    if truth is not None:
                        vm.write_memory(truth.frame * PAGE + 8, mark.to_bytes(8, "little"))
                    got = cpu.read(gva, user=user)
                    if want is None:
                        assert got.value == mark
                elif kind == "write":
                    got = cpu.write(gva, 1, user=user)
                else:
                    got = cpu.fetch(gva, user=user)
                if want is None:
                    assert got.status == "done", (hex(page), kind, user, got)
                else:
                    assert (got.status, got.error_code) == ("page_fault", want), (hex(page), kind, user, got)
    vm.audit()


def expected(page: Page | None, kind: str, *, user: bool, nx: bool) -> int | None:
    """The error code that the access takes (WP on, no SMEP, no SMAP; F is told with NX only), None if it succeeds."""
    code = (W if kind == "write" else 0) | (U if user else 0) | (F if kind == "fetch" and nx else 0)
    if page is None:
        return code
    refused = (kind == "write" and not page.write) or (kind == "fetch" and page.nx) or (user and not page.user)
    return code | P if refused else None
