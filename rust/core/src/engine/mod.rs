//! The door to the engine: a VM with its vCPUs, one operation at a time.

mod access;
mod control;
mod deliver;
mod dirty;
mod entry;

mod host;
mod notifier;
mod operand;
mod plain;
mod registers;
mod rows;
mod saved;
mod state;
mod trace;

pub use control::Control;
pub use deliver::Delivery;
pub(crate) use operand::touch as touch_operand;
pub use saved::SavedVm;
pub use trace::{Pages, RunOptions, RunTotals, writes_tables};
pub(crate) use trace::{action_of, insn_of};

use crate::config::{Config, MAX_MEMORY, MAX_VCPUS};
use crate::counters::{VcpuCounters, VmCounters};
use crate::cpu::{Registers, Requests, Vcpu};
use crate::error::{ConfigError, refuse};
use crate::events::EventLog;
use crate::fault::Ctx;
use crate::fault::ways::Ways;
use crate::memory::Memory;
use crate::policy::{Decisions, Policy};
use crate::shadow::{Flush, Shadow};
use crate::types::{Gpa, PAGE_SIZE};
use serde::Serialize;

/// A virtual machine under the shadow MMU. A clone goes on by itself from where this one is.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    pub(crate) shadow: Shadow,
    pub(crate) vcpus: Vec<Vcpu>,
    /// What each vCPU remembers; not part of the state, since it changes nothing but the time that a fault takes.
    #[serde(skip)]
    pub(crate) ways: Vec<Ways>,
    /// Addresses of instructions, by the `site` of a trace's rows; entry 0 stands for "none".
    sites: Vec<u64>,
}

impl Vm {
    /// A VM with memslot 0 of `memory` bytes at gpa 0 (host pages present, writable, 4 KiB).
    ///
    /// # Errors
    /// A size that is 0, not page-aligned or too large; no vCPU, or too many.
    pub fn new(
        memory: u64,
        vcpus: usize,
        config: Config,
        policy: Box<dyn Policy>,
        events: u32,
    ) -> Result<Self, ConfigError> {
        if memory == 0 || !memory.is_multiple_of(PAGE_SIZE) || memory > MAX_MEMORY {
            return refuse!("memory {memory:#x} must be a multiple of 4096 between 4096 and {MAX_MEMORY:#x} bytes");
        }
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return refuse!("vcpus {vcpus} must be 1 to {MAX_VCPUS}");
        }
        let host = Memory::new(memory / PAGE_SIZE);
        let shadow = Shadow::new(host, config, Decisions::new(policy, vcpus), EventLog::new(events));
        let ways = vec![Ways::default(); vcpus];
        let vcpus = (0..vcpus).map(|id| Vcpu::new(id as u8, &config.cpu)).collect();
        let mut vm = Self { shadow, vcpus, ways, sites: vec![0] };
        vm.add_slot(0, Gpa(0), memory, false, false)?;
        Ok(vm)
    }

    /// The VM-wide half of the shadow MMU, to look at.
    #[must_use]
    pub const fn shadow(&self) -> &Shadow {
        &self.shadow
    }

    /// The vCPUs, to look at.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// The recorded events; they stay.
    #[must_use]
    pub const fn events(&self) -> &EventLog {
        &self.shadow.events
    }

    /// Records the kinds of events in `mask` from now on; returns what was recorded before.
    pub const fn set_events(&mut self, mask: u32) -> u32 {
        let before = self.shadow.events.mask();
        self.shadow.events.set_mask(mask);
        before
    }

    /// Takes the recorded events away.
    pub fn take_events(&mut self) -> Vec<crate::events::Event> {
        self.shadow.events.take()
    }

    /// Statistics of the VM.
    #[must_use]
    pub const fn counters(&self) -> &VmCounters {
        &self.shadow.counters
    }

    /// The sum of the vCPUs' statistics.
    #[must_use]
    pub fn vcpu_counters(&self) -> VcpuCounters {
        let mut sum = VcpuCounters::default();
        for vcpu in &self.vcpus {
            sum.add(&vcpu.counters);
        }
        sum
    }

    /// Bytes that the VM takes, by what for: guest memory with the map of its frames, the bookkeeping of frames, shadow
    /// pages, reverse maps of more than one entry, what vCPUs remember, and events.
    #[must_use]
    pub fn memory_use(&self) -> [(&'static str, usize); 6] {
        let shadow = &self.shadow;
        [
            ("guest_memory", shadow.memory.host.bytes()),
            ("frames", shadow.memory.bookkeeping_bytes()),
            ("shadow_pages", shadow.arena.bytes()),
            ("rmaps", shadow.lists.bytes()),
            ("vcpus", self.vcpus.len() * (size_of::<Vcpu>() + Ways::BYTES)),
            ("events", size_of_val(shadow.events.records())),
        ]
    }

    /// Sets the table of instruction addresses that a trace's `site` indexes; entry 0 is "none" whatever it holds.
    pub fn set_sites(&mut self, sites: Vec<u64>) {
        self.sites = sites;
    }

    /// Refuses a vCPU number that the VM does not have.
    ///
    /// # Errors
    /// The number is out of range.
    pub fn check_vcpu(&self, vcpu: usize) -> Result<(), ConfigError> {
        if vcpu < self.vcpus.len() {
            return Ok(());
        }
        refuse!("vCPU {vcpu} does not exist: the VM has {}, numbered from 0", self.vcpus.len())
    }

    /// Sets control registers as user space does (`KVM_SET_SREGS`); a difference resets the context.
    ///
    /// # Errors
    /// An impossible or unsupported combination; nothing was changed.
    pub fn set_sregs(&mut self, vcpu: usize, regs: Registers) -> Result<(), ConfigError> {
        self.check_vcpu(vcpu)?;
        regs.check(&self.shadow.config.cpu)?;
        self.with(vcpu, |ctx| ctx.set_sregs(regs));
        Ok(())
    }

    /// Sets PKRU (the guest's WRPKRU does not exit).
    ///
    /// # Errors
    /// The vCPU does not exist, or the profile has no protection keys; nothing was changed.
    pub fn set_pkru(&mut self, vcpu: usize, value: u32) -> Result<(), ConfigError> {
        self.check_vcpu(vcpu)?;
        let cpu = &self.shadow.config.cpu;
        if !cpu.pku {
            return refuse!("pkru {value:#x}: profile {:?} has no protection keys", cpu.name);
        }
        self.vcpus[vcpu].pkru = value;
        Ok(())
    }

    /// Runs `work` with one vCPU and the shadow, then hands the requests that it raised to the other vCPUs.
    #[inline]
    pub(crate) fn with<T>(&mut self, vcpu: usize, work: impl FnOnce(&mut Ctx<'_>) -> T) -> T {
        let (shadow, ways) = (&mut self.shadow, &mut self.ways[vcpu]);
        let mut ctx = Ctx { shadow, vcpu: &mut self.vcpus[vcpu], ways, others: Requests::default() };
        let out = work(&mut ctx);
        let others = ctx.others;
        if others != Requests::default() {
            for other in self.vcpus.iter_mut().filter(|other| usize::from(other.id) != vcpu) {
                other.requests.raise(others);
            }
        }
        out
    }

    /// Pays what a change made by the host owes to all vCPUs.
    pub(crate) fn pay_all(&mut self, flush: Flush) {
        self.with(0, |ctx| ctx.pay(flush));
    }

    /// An operation of `vcpu` begins.
    #[inline]
    pub(crate) fn begin(&mut self, vcpu: usize) {
        self.shadow.events.vcpu = vcpu as u8;
        self.vcpus[vcpu].counters.x_ops += 1;
    }

    /// The operation is over.
    #[inline]
    pub(crate) fn end(&mut self) {
        self.shadow.events.op += 1;
    }
}
