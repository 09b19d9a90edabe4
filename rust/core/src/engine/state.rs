//! A number for the whole state of a VM: what two runs are compared by.

use crate::engine::Vm;
use crate::shadow::page::bits;
use std::fmt::Write as _;

/// FNV-1a over 64 bits, by bytes of text and by words.
struct Hash(u64);

impl Hash {
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    const fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(Self::PRIME);
        self.0 ^= self.0 >> 29;
    }
}

impl std::fmt::Write for Hash {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        text.bytes().for_each(|byte| self.word(u64::from(byte)));
        Ok(())
    }
}

impl Vm {
    /// A number that is another (but for one chance in 2^64) if anything is that the guest, the shadow or the counters
    /// show: guest memory, what the host has behind it, registers, shadow pages with their entries, statistics. What is
    /// remembered for speed alone, recorded events and the policy are left out. The same on every system; another
    /// version may give another number.
    #[must_use]
    pub fn state_hash(&self) -> u64 {
        let mut hash = Hash(0xcbf2_9ce4_8422_2325);
        self.shadow.memory.host.each_changed(|gfn, state, page| {
            hash.word(gfn.0 << 3 | state as u64);
            for word in page {
                hash.word(*word);
            }
        });
        let arena = self.shadow.arena();
        for id in arena.live() {
            let page = &arena[id];
            write!(hash, "{page:?}").expect("a hash takes any text");
            for index in bits(&page.used) {
                hash.word(arena.spte(id.entry(index)).0);
                hash.word(arena.mapped_gfn(id.entry(index)).0 << 3 | u64::from(arena.mapped_access(id.entry(index)).0));
            }
        }
        for vcpu in &self.vcpus {
            write!(hash, "{vcpu:?}").expect("a hash takes any text");
        }
        write!(hash, "{:?}", self.shadow.counters).expect("a hash takes any text");
        for slot in self.shadow.memory.slots() {
            write!(hash, "{} {} {} {} {}", slot.id, slot.base.0, slot.pages, slot.readonly, slot.logs_dirty())
                .expect("a hash takes any text");
        }
        let shadow = &self.shadow;
        let rest = (shadow.max_pages, shadow.memory.generation, shadow.manual_dirty, shadow.config.nx_huge_pages);
        write!(hash, "{rest:?} {:?}", self.sites).expect("a hash takes any text");
        hash.0
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use crate::engine::Vm;
    use crate::policy::Kvm;
    use crate::types::Gpa;

    #[test]
    fn what_shows_changes_the_number_and_nothing_else_does() {
        let new = || Vm::new(16 << 20, 1, Config::default(), Box::new(Kvm), 0).unwrap();
        let mut vm = new();
        assert_eq!(vm.state_hash(), new().state_hash());
        let before = vm.state_hash();
        vm.write_memory(Gpa(0x1000), &[0; 8]).unwrap();
        assert_eq!(vm.state_hash(), before, "zeros where zeros were");
        vm.write_memory(Gpa(0x1000), &[1]).unwrap();
        let written = vm.state_hash();
        for change in [
            (|vm| vm.set_page_quota(1000).unwrap()) as fn(&mut Vm),
            |vm| vm.set_dirty_log(0, true).unwrap(),
            |vm| vm.set_sites(vec![0, 5]),
            |vm| vm.set_nx_huge_pages(true),
        ] {
            let mut other = new();
            change(&mut other);
            assert_ne!(other.state_hash(), before);
        }
        assert_ne!(written, before);
        let copy = vm.clone();
        vm.write_memory(Gpa(0x1000), &[0]).unwrap();
        assert_eq!(vm.state_hash(), before);
        assert_eq!(copy.state_hash(), written, "a clone goes on by itself");
    }
}
