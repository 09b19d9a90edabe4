"""A small Linux forks: which stores it makes to its page tables, and what KVM makes of them."""

import shadowkvm as sk
from shadowkvm.guest import Linux, pages

guest = Linux(memory=64 << 20)
shell = guest.spawn()
guest.switch(shell)
area = guest.mmap(shell, 4 * 4096)
guest.touch(shell, pages(area.start, 4), write=True)
guest.start()  # the image ends here
vm = guest.vm(events=["kvm_mmu_unsync_page", "kvm_mmu_sync_page", "kvm_mmu_prepare_zap_page"])


def run(what: str) -> None:
    """Run what the guest did since the last time."""
    rows = guest.take()
    tables = rows[(rows["addr"] >> 46 == 0x3FFFE) & (rows["flags"] == 0)]  # stores through the direct map
    stores = [sk.Op(op).name for op in tables["op"].tolist() if op != sk.Op.READ]
    names = ", ".join(f"{stores.count(name)} {name}" for name in sorted(set(stores)))
    counters = vm.run(rows).counters
    shown = {
        name: counters[name] for name in ("exits", "pf_fixed", "pf_emulate", "pf_guest", "invlpg") if counters[name]
    }
    print(f"{what}: stores to tables: {names or 'none'}\n  {shown}")
    for line in vm.event_text():
        print(f"  {line}")
    vm.clear_events()


guest.touch(shell, pages(area.start, 4))
run("the shell reads its four pages")
child = guest.fork(shell)
run("it forks")
guest.touch(shell, pages(area.start, 2), write=True)
run("it writes to two of them, which are copied")
guest.switch(child)
guest.touch(child, pages(area.start, 4), write=True)
run("the child writes to all four: two are its own by now")
guest.exit(child, shell)
run("the child exits")
