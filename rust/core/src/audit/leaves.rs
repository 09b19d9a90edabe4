//! Leaves: reverse maps, the host page behind each, the bits in each, and write protection.

use super::Audit;
use crate::bits::{PT_P, PT_PS};
use crate::memory::{Host, HostState, Slot};
use crate::shadow::spte::{HOST_WRITABLE, MMU_WRITABLE, Spte};
use crate::types::{Access, Gfn, Level, PageId, SptePos};
use rustc_hash::{FxHashMap, FxHashSet};

impl Audit<'_> {
    /// Every leaf is in one reverse map, that of its frame and level, once; and nothing else is in any.
    pub(super) fn check_rmaps(&mut self) {
        let mut listed: FxHashMap<SptePos, u32> = FxHashMap::default();
        let shadow = self.shadow;
        for slot in shadow.memory.slots() {
            for (gfn, level, head) in shadow.memory.rmaps(slot) {
                for pos in shadow.lists.iter(head).take(self.entries()) {
                    *listed.entry(pos).or_default() += 1;
                    let right = self.is_live(pos.page()) && {
                        let (spte, at) = (shadow.spte(pos), shadow.arena[pos.page()].level());
                        let mapped = shadow.arena.mapped_gfn(pos);
                        spte.present() && !spte.is_table(at.0) && at == level && mapped == gfn && slot.holds(gfn)
                    };
                    self.expect(right, |a| {
                        format!(
                            "the rmap of gfn {gfn:#x} level {} holds what does not map it: {}",
                            level.0,
                            a.entry_name(pos)
                        )
                    });
                }
            }
        }
        for (pos, _) in self.leaves.clone() {
            let times = listed.get(&pos).copied().unwrap_or(0);
            self.expect(times == 1, |a| {
                let gfn = a.shadow.arena.mapped_gfn(pos);
                format!("{} maps gfn {gfn:#x} and is in rmaps {times} times", a.entry_name(pos))
            });
        }
    }

    /// Each leaf by itself, then what no leaf may allow the guest to write.
    pub(super) fn check_leaves(&mut self) {
        let logs: Vec<_> = self.shadow.memory.slots().iter().map(logged_frames).collect();
        for (pos, spte) in self.leaves.clone() {
            self.check_bits(pos, spte);
            let gfn = self.shadow.arena.mapped_gfn(pos);
            let level = self.shadow.arena[pos.page()].level();
            let last = Gfn(gfn.0 + level.pages() - 1);
            let slots = self.shadow.memory.slots();
            match slots.iter().position(|slot| slot.holds(gfn) && slot.holds(last)) {
                None => self.report(format!("{} maps gfn {gfn:#x} outside the memslots", self.entry_name(pos))),
                Some(at) => self.check_slot_rules(pos, spte, &slots[at], logs[at].as_ref()),
            }
            self.check_host_page(pos, spte, gfn, level);
        }
        self.check_write_protection();
    }

    /// The bits that stand in any leaf (5.1), and rights that were noted with it.
    fn check_bits(&mut self, pos: SptePos, spte: Spte) {
        let arena = &self.shadow.arena;
        let (level, noted, gfn) = (arena[pos.page()].level(), arena.mapped_access(pos), arena.mapped_gfn(pos));
        let shape = spte.0 & PT_P != 0 && spte.large() == (level > Level::PT) && level <= Level::PDPT;
        self.expect(shape, |a| format!("{} is no leaf of level {}", a.entry_name(pos), level.0));
        let small = spte.0 & PT_PS == 0 || gfn == gfn.round(level);
        self.expect(small, |a| {
            format!("{} maps gfn {gfn:#x}, which is not aligned to level {}", a.entry_name(pos), level.0)
        });
        // W without these marks would be taken away by nobody, or given back by the fast path to whom it is not due.
        let marks = HOST_WRITABLE | MMU_WRITABLE;
        let marked = !spte.writable() || spte.0 & marks == marks;
        self.expect(marked, |a| format!("{} has W without host- and MMU-writable", a.entry_name(pos)));
        let have = spte.access();
        let noted_well = noted.has(have) && have.has(Access::U) == noted.has(Access::U);
        self.expect(noted_well, |a| {
            format!("{} has the rights {} but was made from {}", a.entry_name(pos), have.text(), noted.text())
        });
    }

    fn check_slot_rules(&mut self, pos: SptePos, spte: Spte, slot: &Slot, log: Option<&FxHashSet<Gfn>>) {
        let allowed = !slot.readonly || spte.0 & (HOST_WRITABLE | MMU_WRITABLE) == 0 && !spte.writable();
        self.expect(allowed, |a| format!("{} may be written, in read-only slot {}", a.entry_name(pos), slot.id));
        let gfn = self.shadow.arena.mapped_gfn(pos);
        let logged = log.is_none_or(|log| !spte.writable() || !spte.large() && log.contains(&gfn));
        self.expect(logged, |a| {
            format!(
                "{} may be written, but gfn {gfn:#x} is not in the dirty log of slot {}",
                a.entry_name(pos),
                slot.id
            )
        });
    }

    /// The frame's own host page, there and as large as the leaf; or a page that others have, too (the zero page, one
    /// that is shared), read-only. A host page that goes or shrinks takes its leaves with it (`kvm_unmap_gfn_range`, 6.1).
    fn check_host_page(&mut self, pos: SptePos, spte: Spte, gfn: Gfn, level: Level) {
        let host = &self.shadow.memory.host;
        let state = host.state(gfn);
        let common = matches!(state, HostState::Zero | HostState::Shared);
        if common || spte.pfn() == Host::ZERO_PFN {
            let fits = common && spte.pfn() == host.frame(gfn);
            self.expect(fits && level == Level::PT && spte.0 & HOST_WRITABLE == 0, |a| {
                format!("{} maps pfn {:#x} for gfn {gfn:#x}, which is {state:?}", a.entry_name(pos), spte.pfn())
            });
            return;
        }
        self.expect(spte.pfn() == Host::pfn(gfn), |a| {
            format!("{} maps pfn {:#x} for gfn {gfn:#x}", a.entry_name(pos), spte.pfn())
        });
        let frames = (gfn.0..gfn.0 + level.pages()).map(Gfn);
        let misfit =
            frames.map(|gfn| (gfn, host.state(gfn))).find(|(_, state)| !state.writable() || state.level() < level);
        if let Some((gfn, state)) = misfit {
            self.report(format!(
                "{} of level {} covers gfn {gfn:#x}, which is {state:?}",
                self.entry_name(pos),
                level.0
            ));
        }
    }

    /// See [`crate::engine::Vm::audit`] for the leaves that are let through.
    fn check_write_protection(&mut self) {
        let guarded = self.guarded_frames();
        let mut broken = Vec::new();
        for (pos, spte) in self.leaves.clone() {
            if spte.0 & MMU_WRITABLE == 0 && !spte.writable() {
                continue;
            }
            let (first, level) = (self.shadow.arena.mapped_gfn(pos), self.shadow.arena[pos.page()].level());
            let at = guarded.partition_point(|(gfn, _)| *gfn < first);
            let Some((gfn, by)) = guarded.get(at).filter(|(gfn, _)| gfn.0 < first.0 + level.pages()) else { continue };
            let text = format!(
                "{} may be written and maps gfn {gfn:#x}, shadowed by {}",
                self.entry_name(pos),
                self.name(*by)
            );
            if level == Level::PT {
                broken.push(text);
            } else {
                self.report(text);
            }
        }
        let created: u64 = self.vcpus.iter().map(|vcpu| vcpu.counters.pf_mmio_spte_created).sum();
        if broken.len() as u64 > created {
            for text in broken {
                self.report(text);
            }
        }
    }

    /// Frames that nobody may write directly, ascending, with a page that says so: every table above level 1, and the
    /// last-level ones that are in step.
    fn guarded_frames(&self) -> Vec<(Gfn, PageId)> {
        let arena = &self.shadow.arena;
        let guards = |id: &PageId| {
            let page = &arena[*id];
            self.is_valid(*id) && page.has_gptes() && (page.level() > Level::PT || !page.unsync)
        };
        let mut frames: Vec<_> = self.live.iter().filter(|id| guards(id)).map(|id| (arena[*id].gfn, *id)).collect();
        frames.sort_unstable();
        frames
    }
}

/// The frames in a slot's dirty log, `None` without one. Reading the log empties it, so a copy is read.
fn logged_frames(slot: &Slot) -> Option<FxHashSet<Gfn>> {
    if !slot.logs_dirty() {
        return None;
    }
    slot.dirty_frames().map(|frames| frames.into_iter().collect())
}
