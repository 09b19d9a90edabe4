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
        if self.mmio_in_cache(gva) {
            return RetPf::Emulate;
        }
        let Some(root) = self.vcpu.root.table(gva) else { return RetPf::Retry };
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
        // A direct shadow's entry knows no guest address.
        let gva = if self.vcpu.role.mode.has_tables() { gva } else { Gva(0) };
        self.shadow.events.handle_mmio_page_fault(gva, gfn.0, access);
        self.cache_mmio(gva, gfn, access);
        RetPf::Emulate
    }

    /// Whether the vCPU's cache answers for an address (`mmio_info_in_cache`, 6.1): by the guest address, with paging off
    /// by the frame.
    pub(crate) fn mmio_in_cache(&self, gva: Gva) -> bool {
        let generation = self.shadow.memory.generation;
        if self.vcpu.role.mode.has_tables() {
            self.vcpu.mmio_matches(gva, generation)
        } else {
            self.vcpu.mmio_gfn_matches(Gfn(gva.0 >> 12), generation)
        }
    }

    /// Remembers an MMIO page (`vcpu_cache_mmio_info`, 6.1).
    pub(crate) fn cache_mmio(&mut self, gva: Gva, gfn: Gfn, access: Access) {
        let access = access.without(Access::X);
        let generation = self.shadow.memory.generation;
        self.vcpu.mmio = MmioCache { gva: gva.page().0, gfn, access, generation };
    }
}
