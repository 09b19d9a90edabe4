//! The VM: host requests, traces, and views of its state.

use crate::buffer::slice;
use crate::errors;
use crate::hardware::{Hardware, Sizes, Stage};
use crate::policy::{Decider, Failure, Source, raise};
use crate::snapshot::Snapshot;
use crate::vcpu::Vcpu;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use shadowkvm_core::config::{Config, CpuFeatures};
use shadowkvm_core::cpu::{Root, Top};
use shadowkvm_core::engine::{Pages, RunOptions, RunTotals, Vm as Engine};
use shadowkvm_core::kernel::Kernel;
use shadowkvm_core::memory::{HostState, ManualDirty};
use shadowkvm_core::ops::ROW_BYTES;
use shadowkvm_core::outcome::Outcome;
use shadowkvm_core::paging::HostAct;
use shadowkvm_core::types::{Gpa, PageId};
use std::collections::HashMap;
use std::sync::Arc;

/// What a run came to, as a tuple: see `_core.pyi`.
type RunTuple<'py> = (Vec<u64>, u64, u64, u64, Option<u64>, Option<Bound<'py, pyo3::types::PyBytes>>);

/// A virtual machine.
#[pyclass(subclass, module = "shadowkvm._core")]
pub(crate) struct Vm {
    pub(crate) engine: Engine,
    /// The rows under way, copied so that another thread may change the array meanwhile; kept for the next.
    rows: Vec<u8>,
    /// Where a policy in Python leaves its exception.
    pub(crate) failure: Option<Failure>,
    /// What the policy was made of.
    source: Arc<Source>,
    /// What runs beside the engine.
    pub(crate) hardware: Hardware,
}

fn host_state(name: &str) -> PyResult<HostState> {
    Ok(match name {
        "absent" => HostState::Absent,
        "zero" => HostState::Zero,
        "shared" => HostState::Shared,
        "writable" => HostState::Writable,
        "huge-2m" => HostState::Huge2m,
        "huge-1g" => HostState::Huge1g,
        _ => {
            return Err(errors::refused(format!(
                "host page state {name:?} is not known; choose absent, zero, shared, writable, huge-2m or huge-1g"
            )));
        }
    })
}

/// Rows that are copied at a time: few enough to stay in the nearest cache until they are run.
const BLOCK: usize = 512;
/// A request for bytes of guest memory in one call; more would be an accident.
const MAX_READ: usize = 1 << 32;

#[pymethods]
impl Vm {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "they are keywords in Python")]
    #[pyo3(signature = (memory, vcpus=1, policy="kvm", profile="zen", event_mask=0, nx_huge_pages=false, features=vec![],
                        model_version="linux-6.1", decider=None))]
    fn new(
        py: Python<'_>,
        memory: u64,
        vcpus: usize,
        policy: &str,
        profile: &str,
        event_mask: u32,
        nx_huge_pages: bool,
        features: Vec<(String, String)>,
        model_version: &str,
        decider: Option<Decider>,
    ) -> PyResult<Self> {
        let mut cpu = CpuFeatures::named(profile).map_err(errors::config)?;
        for (name, value) in features {
            cpu = cpu.with(&name, &value).map_err(errors::config)?;
        }
        let kernel = Kernel::named(model_version).map_err(errors::config)?;
        let source = Arc::new(Source { base: policy.to_owned(), decider });
        let (policy, failure) = source.make(py)?;
        let config = Config { cpu, kernel, nx_huge_pages };
        let engine = Engine::new(memory, vcpus, config, policy, event_mask).map_err(errors::config)?;
        Ok(Self { engine, rows: Vec::new(), failure, source, hardware: Hardware::default() })
    }

    /// Name of the kernel whose rules hold.
    #[getter]
    fn model_version(&self) -> &'static str {
        self.engine.shadow().config.kernel.name
    }

    /// The vCPUs.
    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let count = slf.try_borrow()?.engine.vcpus().len();
        let vcpus: PyResult<Vec<_>> =
            (0..count).map(|index| Py::new(py, Vcpu { vm: slf.clone().unbind(), index })).collect();
        PyTuple::new(py, vcpus?)
    }

    #[pyo3(signature = (slot, gpa, size, readonly=false, dirty_log=false))]
    fn add_slot(&mut self, slot: u16, gpa: u64, size: u64, readonly: bool, dirty_log: bool) -> PyResult<()> {
        self.engine.add_slot(slot, Gpa(gpa), size, readonly, dirty_log).map_err(errors::config)
    }

    fn delete_slot(&mut self, slot: u16) -> PyResult<()> {
        self.engine.delete_slot(slot).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::AllGone);
        Ok(())
    }

    fn get_dirty_log(&mut self, slot: u16) -> PyResult<Vec<u64>> {
        let frames = self.engine.get_dirty_log(slot).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::LogRead);
        Ok(frames)
    }

    fn set_dirty_log(&mut self, slot: u16, enabled: bool) -> PyResult<()> {
        let before = self.engine.logs_dirty(slot);
        self.engine.set_dirty_log(slot, enabled).map_err(errors::config)?;
        if before != enabled {
            self.hardware.told(&self.engine, HostAct::LogSet);
        }
        Ok(())
    }

    fn notifier_unmap(&mut self, gpa: u64, size: u64) -> PyResult<()> {
        self.engine.notifier_unmap(Gpa(gpa), size).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::Dropped(Gpa(gpa), size));
        Ok(())
    }

    fn move_slot(&mut self, slot: u16, gpa: u64) -> PyResult<()> {
        let before = self.engine.shadow().memory.generation;
        self.engine.move_slot(slot, Gpa(gpa)).map_err(errors::config)?;
        if self.engine.shadow().memory.generation != before {
            self.hardware.told(&self.engine, HostAct::AllGone);
        }
        Ok(())
    }

    fn set_manual_dirty_log(&mut self, enabled: bool, initially_set: bool) -> PyResult<()> {
        self.engine.set_manual_dirty(ManualDirty { enabled, initially_set }).map_err(errors::config)
    }

    #[allow(clippy::needless_pass_by_value, reason = "PyO3 hands the list over by value")]
    fn clear_dirty_log(&mut self, slot: u16, frames: Vec<u64>) -> PyResult<()> {
        self.engine.clear_dirty_log(slot, &frames).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::LogCleared(&frames));
        Ok(())
    }

    fn notifier_change(&mut self, gpa: u64, size: u64) -> PyResult<()> {
        self.engine.notifier_change(Gpa(gpa), size).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::Dropped(Gpa(gpa), size));
        Ok(())
    }

    fn notifier_age(&mut self, gpa: u64, size: u64, flush: bool) -> PyResult<bool> {
        self.engine.notifier_age(Gpa(gpa), size, flush).map_err(errors::config)
    }

    fn notifier_test_young(&self, gpa: u64, size: u64) -> PyResult<bool> {
        self.engine.notifier_test_young(Gpa(gpa), size).map_err(errors::config)
    }

    fn set_nx_huge_pages(&mut self, enabled: bool) {
        let before = self.engine.shadow().config.nx_huge_pages;
        self.engine.set_nx_huge_pages(enabled);
        if before != enabled {
            self.hardware.told(&self.engine, HostAct::AllGone);
        }
    }

    fn recover_nx_huge_pages(&mut self) -> u64 {
        self.engine.recover_nx_huge_pages()
    }

    fn set_page_quota(&mut self, n: u64) -> PyResult<()> {
        self.engine.set_page_quota(n).map_err(errors::config)
    }

    #[allow(clippy::needless_pass_by_value, reason = "PyO3 hands the bytes over by value")]
    fn write_memory(&mut self, py: Python<'_>, gpa: u64, data: PyBuffer<u8>) -> PyResult<()> {
        self.engine.write_memory(Gpa(gpa), &data.to_vec(py)?).map_err(errors::memory)
    }

    #[pyo3(signature = (gpa, size, touch=false))]
    fn read_memory(&mut self, gpa: u64, size: usize, touch: bool) -> PyResult<Vec<u8>> {
        if size > MAX_READ {
            return Err(errors::refused(format!("read_memory: size {size} is above the limit of {MAX_READ} bytes")));
        }
        let bytes = self.engine.read_memory(Gpa(gpa), size).map_err(errors::memory)?;
        if touch {
            self.engine.touch(Gpa(gpa), size).map_err(errors::memory)?;
        }
        Ok(bytes)
    }

    fn set_host_pages(&mut self, gpa: u64, size: u64, state: &str) -> PyResult<()> {
        self.engine.set_host_pages(Gpa(gpa), size, host_state(state)?).map_err(errors::config)?;
        self.hardware.told(&self.engine, HostAct::Dropped(Gpa(gpa), size));
        Ok(())
    }

    fn set_sites(&mut self, sites: Vec<u64>) {
        self.engine.set_sites(sites);
    }

    /// Statistics of the VM, then the sums over its vCPUs, in the order of `COUNTERS`.
    fn counter_values(&self) -> Vec<u64> {
        let mut out = self.engine.counters().values();
        out.extend(self.engine.vcpu_counters().values());
        out
    }

    /// Runs packed rows of a trace with the GIL released.
    #[pyo3(signature = (rows, first_row=0, pages=None, outcomes=false))]
    #[allow(clippy::needless_pass_by_value, reason = "PyO3 hands the buffers over by value")]
    fn run_rows<'py>(
        &mut self,
        py: Python<'py>,
        rows: PyBuffer<u8>,
        first_row: u64,
        pages: Option<PyBuffer<u8>>,
        outcomes: bool,
    ) -> PyResult<RunTuple<'py>> {
        let rows = slice(&rows)?;
        let pages = pages.map_or_else(|| Ok(Vec::new()), |pages| pages.to_vec(py))?;
        let mut out = Vec::with_capacity(if outcomes { rows.len() } else { 0 });
        let (engine, block) = (&mut self.engine, &mut self.rows);
        let hardware = &mut self.hardware;
        let totals = py.detach(|| {
            let mut options = RunOptions { first_row, pages: Pages(&pages), no_values: !outcomes };
            let mut totals = RunTotals::default();
            for part in rows.chunks(BLOCK * ROW_BYTES) {
                block.clear();
                block.extend_from_slice(part);
                totals.add(&if outcomes {
                    hardware.run(engine, block, &options, |outcome| out.extend_from_slice(&packed(outcome)))?
                } else {
                    hardware.run(engine, block, &options, |_| {})?
                });
                options.first_row += BLOCK as u64;
            }
            Ok(totals)
        });
        raise(py, self.failure.as_ref())?;
        let totals = totals.map_err(errors::trace)?;
        let bytes = outcomes.then(|| pyo3::types::PyBytes::new(py, &out));
        Ok((
            totals.by_status.to_vec(),
            totals.faults_matched,
            totals.faults_missed,
            totals.faults_unexpected,
            totals.first_mismatch,
            bytes,
        ))
    }

    /// Follows TLBs of these sizes from now on, empty ones; `None`: follows none.
    fn set_tlb(&mut self, sizes: Option<Sizes>) -> PyResult<()> {
        self.hardware.set_tlb(self.engine.vcpus().len(), sizes)
    }

    /// The guest runs under nested paging from now on.
    fn set_nested(&mut self, sizes: Sizes, stage: Stage) -> PyResult<()> {
        self.hardware.set_nested(&self.engine, sizes, stage)
    }

    /// The numbers of `NestedStatistics`; `None` under the shadow.
    fn nested_counts(&self) -> Option<Vec<u64>> {
        self.hardware.nested_counts()
    }

    /// Accesses, hits, misses, references, flushes; `None` if no TLB is followed.
    fn tlb_counts(&self) -> Option<(u64, u64, u64, u64, u64)> {
        let counts = self.hardware.tlb.as_ref()?.counts();
        Some((counts.accesses, counts.hits, counts.misses, counts.references, counts.flushes))
    }

    /// Records the kinds in `mask` from now on; gives the mask before.
    fn set_event_mask(&mut self, mask: u32) -> u32 {
        self.engine.set_events(mask)
    }

    /// The whole state as it is now; `beside`: with the hardware that is followed, too.
    #[pyo3(signature = (beside=false))]
    fn take_snapshot(&self, beside: bool) -> Snapshot {
        Snapshot {
            engine: self.engine.clone(),
            failure: self.failure.clone(),
            source: self.source.clone(),
            hardware: if beside { self.hardware.clone() } else { Hardware::default() },
        }
    }

    /// Goes back (or over) to a state. `beside`: becomes the snapshot's VM, with its number of vCPUs and its hardware.
    #[pyo3(signature = (snapshot, beside=false))]
    fn go_back(&mut self, snapshot: &Snapshot, beside: bool) -> PyResult<()> {
        if beside {
            self.hardware.clone_from(&snapshot.hardware);
        } else if snapshot.engine.vcpus().len() != self.engine.vcpus().len() {
            return Err(errors::refused(format!(
                "the snapshot is of a VM with {} vCPUs, this one has {}",
                snapshot.engine.vcpus().len(),
                self.engine.vcpus().len()
            )));
        }
        self.engine = snapshot.engine.clone();
        self.failure.clone_from(&snapshot.failure);
        self.source.clone_from(&snapshot.source);
        Ok(())
    }

    /// A number for the whole state.
    fn state_hash(&self) -> u64 {
        self.engine.state_hash()
    }

    /// Bytes that the VM takes, by what for.
    fn memory_use(&self) -> HashMap<&'static str, usize> {
        self.engine.memory_use().into_iter().collect()
    }

    /// The recorded events as packed records of 40 bytes.
    fn event_records<'py>(&self, py: Python<'py>) -> Bound<'py, pyo3::types::PyBytes> {
        let records = self.engine.events().records();
        let mut out = Vec::with_capacity(records.len() * 40);
        for e in records {
            for word in [e.op, e.a, e.b, e.c] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&e.code.to_le_bytes());
            out.extend_from_slice(&[e.kind as u8, e.vcpu, e.level, e.flag]);
        }
        pyo3::types::PyBytes::new(py, &out)
    }

    /// The recorded events from number `first` on, as the kernel prints them.
    #[pyo3(signature = (first=0))]
    fn event_lines(&self, first: usize) -> Vec<String> {
        self.engine.events().records().iter().skip(first).map(ToString::to_string).collect()
    }

    /// Forgets the recorded events.
    fn clear_events(&mut self) {
        drop(self.engine.take_events());
    }

    /// Checks every invariant of the state from scratch.
    fn audit(&self) -> PyResult<()> {
        self.engine.audit().map_err(errors::invariant)
    }

    /// Every shadow page with its entries.
    fn shadow_pages<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let shadow = self.engine.shadow();
        let arena = shadow.arena();
        let page = |id| {
            let page = &arena[id];
            let level = page.level().0;
            let entries: Vec<_> = shadowkvm_core::shadow::page::bits(&page.used)
                .map(|index| (index, shadow.spte(id.entry(index))))
                .collect();
            let children: Vec<_> = entries
                .iter()
                .map(|(_, spte)| if spte.is_table(level) { i64::from(spte.child().0) } else { -1 })
                .collect();
            let sptes: Vec<_> = entries.iter().map(|(index, spte)| (*index, spte.0)).collect();
            let role = page.role;
            let numbers = (page.unsync, page.root_count, page.unsync_children, page.flood, page.generation, role.0);
            let first = (id.0, page.gfn.0, level, role.access().text(), role.direct(), role.invalid());
            let first = first.into_pyobject(py)?.into_any().cast_into::<PyTuple>()?;
            let numbers = numbers.into_pyobject(py)?.into_any().cast_into::<PyTuple>()?;
            let entries = (sptes, children).into_pyobject(py)?.into_any().cast_into::<PyTuple>()?;
            PyTuple::new(py, first.iter().chain(numbers.iter()).chain(entries.iter()).collect::<Vec<_>>())
        };
        arena.live().into_iter().map(page).collect()
    }

    /// For each vCPU the pages of its current root (none, one, or the four of a PAE root) and the page of each of its
    /// previous ones; -1 for none.
    fn roots(&self) -> Vec<(Vec<i64>, Vec<i64>)> {
        let number = |id: Option<PageId>| id.map_or(-1, |id| i64::from(id.0));
        let current = |root: &Root| match root.top {
            Top::None | Top::Dummy => Vec::new(),
            Top::Page(id) => vec![i64::from(id.0)],
            Top::Pae(pages) => pages.into_iter().map(number).collect(),
        };
        let previous = |roots: &[Root]| roots.iter().map(|root| number(root.page())).collect();
        self.engine.vcpus().iter().map(|v| (current(&v.root), previous(&v.prev_roots))).collect()
    }
}

/// One outcome as 24 bytes: value u8, address u8, `error_code` u4, status u1, 3 bytes of padding.
fn packed(outcome: &Outcome) -> [u8; ROW_BYTES] {
    let mut out = [0; ROW_BYTES];
    out[..8].copy_from_slice(&outcome.value.to_le_bytes());
    out[8..16].copy_from_slice(&outcome.address.to_le_bytes());
    out[16..20].copy_from_slice(&outcome.error_code.to_le_bytes());
    out[20] = outcome.status as u8;
    out
}
