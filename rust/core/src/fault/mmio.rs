//! Faults on MMIO entries.

use crate::config::MMIO_GEN_BITS;
use crate::cpu::MmioCache;
use crate::fault::Ctx;
use crate::outcome::RetPf;
use crate::types::{Access, Gfn, Gva};

impl Ctx<'_> {
    /// A fault with a reserved bit (`handle_mmio_page_fault`, 6.1): the vCPU's cache or the entry itself says where
    /// the device is. A stale entry is `Invalid`; no MMIO entry at all is `Retry`.
    pub(crate) fn handle_mmio_page_fault(&mut self, gva: Gva) -> RetPf {
        if self.vcpu.mmio_matches(gva, self.shadow.memory.generation) {
            return RetPf::Emulate;
        }
        let Some(root) = self.vcpu.root.page else { return RetPf::Retry };
        let spte = self.shadow.spte(self.shadow.walk_down(root, gva).0);
        if !spte.is_mmio() {
            return RetPf::Retry;
        }
        let generation = self.shadow.memory.generation & ((1 << MMIO_GEN_BITS) - 1);
        self.shadow.events.check_mmio_spte(spte.0, generation, spte.mmio_generation());
        if spte.mmio_generation() != generation {
            return RetPf::Invalid;
        }
        let (gfn, access) = (spte.mmio_gfn(), spte.mmio_access());
        self.shadow.events.handle_mmio_page_fault(gva, gfn.0, access);
        self.cache_mmio(gva, gfn, access);
        RetPf::Emulate
    }

    /// Remembers an MMIO page (`vcpu_cache_mmio_info`, 6.1).
    pub(crate) fn cache_mmio(&mut self, gva: Gva, gfn: Gfn, access: Access) {
        let access = access.without(Access::X);
        let generation = self.shadow.memory.generation;
        self.vcpu.mmio = MmioCache { gva: gva.page().0, gfn, access, generation };
    }
}
