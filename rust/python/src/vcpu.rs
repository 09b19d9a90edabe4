//! One vCPU: each method is one instruction of the guest.

use crate::errors;
use crate::number::{maybe_word, wide_word, word};
use crate::policy::raise;
use crate::vm::Vm;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shadowkvm_core::counters::VcpuCounters;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Control, Delivery};
use shadowkvm_core::fault::insn::{Action, Insn, RmwKind};
use shadowkvm_core::outcome::Outcome as CoreOutcome;
use shadowkvm_core::types::Gva;

/// What came of one operation: status, value, `error_code`, address.
#[pyclass(frozen, eq, module = "shadowkvm._core")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome(CoreOutcome);

#[pymethods]
impl Outcome {
    #[getter]
    fn status(&self) -> &'static str {
        self.0.status.name()
    }

    #[getter]
    fn value(&self) -> u64 {
        self.0.value
    }

    #[getter]
    fn error_code(&self) -> u32 {
        self.0.error_code
    }

    #[getter]
    fn address(&self) -> u64 {
        self.0.address
    }

    fn __hash__(&self) -> u64 {
        self.0.value ^ self.0.address.rotate_left(17) ^ u64::from(self.0.error_code) << 40 ^ self.0.status as u64
    }

    fn __repr__(&self) -> String {
        let o = &self.0;
        format!(
            "Outcome(status='{}', value={:#x}, error_code={:#x}, address={:#x})",
            o.status.name(),
            o.value,
            o.error_code,
            o.address
        )
    }
}

/// A vCPU of a VM.
#[pyclass(frozen, module = "shadowkvm._core")]
pub(crate) struct Vcpu {
    pub(crate) vm: Py<Vm>,
    pub(crate) index: usize,
}

impl Vcpu {
    /// The VM, which must not be under nested paging: that runs traces only.
    fn under_shadow<'py>(&self, py: Python<'py>) -> PyResult<PyRefMut<'py, Vm>> {
        let vm = self.vm.bind(py).try_borrow_mut()?;
        if vm.hardware.nested.is_some() {
            return Err(errors::refused("under nested paging a guest runs by Vm.run only".into()));
        }
        Ok(vm)
    }

    fn run(&self, py: Python<'_>, insn: &Insn) -> PyResult<Outcome> {
        let mut vm = self.under_shadow(py)?;
        let outcome = vm.engine.execute(self.index, insn);
        raise(py, vm.failure.as_ref()).map(|()| Outcome(outcome))
    }

    fn control(&self, py: Python<'_>, what: Control, rip: Option<u64>) -> PyResult<Outcome> {
        let mut vm = self.under_shadow(py)?;
        let outcome = vm.engine.control(self.index, what, rip);
        raise(py, vm.failure.as_ref()).map(|()| Outcome(outcome))
    }
}

/// The settings that all accesses have in common.
#[derive(Clone, Copy)]
struct How {
    user: bool,
    rip: Option<u64>,
    length: u64,
    ac: bool,
    implicit: bool,
    delivery: bool,
}

fn access(action: Action, gva: u64, size: u64, how: How) -> PyResult<Insn> {
    let wide = size == 16 && matches!(action, Action::Store | Action::Load | Action::Rmw(RmwKind::Cmpxchg));
    if !(1..=8).contains(&size) && !wide {
        return Err(errors::refused(format!(
            "size {size} must be 1 to 8 bytes (16 for an SSE load or store and CMPXCHG16B)"
        )));
    }
    let How { user, rip, length, ac, implicit, delivery } = how;
    if !(1..=15).contains(&length) {
        return Err(errors::refused(format!("length {length} must be 1 to 15, the bytes of an instruction")));
    }
    Ok(Insn { user, rip, length: length as u8, ac, system: implicit, delivery, ..Insn::new(action, gva, size as u8) })
}

/// Elements of a REP that KVM emulates before it enters the guest again; a longer one is several calls.
const MAX_REPEAT: u64 = 1024;

/// A string instruction with a REP prefix.
fn repeated(action: Action, gva: u64, size: u64, count: u64, user: bool, rip: Option<u64>) -> PyResult<Insn> {
    let insn = access(action, gva, size, How { user, rip, length: 1, ac: false, implicit: false, delivery: false })?;
    if !(1..=MAX_REPEAT).contains(&count) || size > 8 {
        return Err(errors::refused(format!("REP: count {count} must be 1 to {MAX_REPEAT} and size {size} at most 8")));
    }
    Ok(Insn { writes_tables: false, rep: true, repeat: count as u32, ..insn })
}

fn store_kind(kind: &str) -> PyResult<bool> {
    match kind {
        "mov" => Ok(true),
        "push" | "stos" | "movs" | "sse" => Ok(false),
        _ => Err(errors::refused(format!("store kind {kind:?} is not known; choose mov, push, stos, movs or sse"))),
    }
}

fn rmw_kind(kind: &str) -> PyResult<(RmwKind, bool)> {
    Ok(match kind {
        "or" => (RmwKind::Or, true),
        "and" => (RmwKind::And, true),
        "xor" => (RmwKind::Xor, false),
        "add" => (RmwKind::Add, false),
        "xchg" => (RmwKind::Xchg, true),
        "cmpxchg" => (RmwKind::Cmpxchg, true),
        _ => {
            return Err(errors::refused(format!(
                "rmw kind {kind:?} is not known; choose or, and, xor, add, xchg or cmpxchg"
            )));
        }
    })
}

#[pymethods]
#[allow(
    clippy::too_many_arguments,
    clippy::fn_params_excessive_bools,
    reason = "the keyword arguments of Python's methods"
)]
impl Vcpu {
    /// The vCPU's number.
    #[getter]
    fn id(&self) -> usize {
        self.index
    }

    /// A load of `size` bytes (1 to 8; 16 for SSE) at guest virtual address `gva`, at CPL 3 if `user`.
    ///
    /// Returns an Outcome; `value` is what was loaded (all ones from a device). A guest fault is a result. ConfigError:
    /// a size that no instruction has.
    ///
    /// With `rip` the instruction is first fetched through the shadow, again whenever it is resumed after an exit, and
    /// KVM's retry rule knows it. `ac`: EFLAGS.AC. `implicit`: an access of the CPU's own (SMAP holds whatever AC says).
    /// `delivery`: made while an event is delivered; `user` is then the CPL before it.
    #[pyo3(signature = (gva, size=8, user=false, *, rip=None, length=1, ac=false, implicit=false, delivery=false))]
    fn read(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = word)] size: u64,
        user: bool,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
        #[pyo3(from_py_with = word)] length: u64,
        ac: bool,
        implicit: bool,
        delivery: bool,
    ) -> PyResult<Outcome> {
        self.run(py, &access(Action::Load, gva, size, How { user, rip, length, ac, implicit, delivery })?)
    }

    /// A store of the low `size` bytes of `value` at guest virtual address `gva`, at CPL 3 if `user`.
    ///
    /// `kind`: "mov" counts as writing page tables; "push", "stos", "movs" and "sse" do not, and KVM first tries them with the
    /// page no longer shadowed.
    ///
    /// With `rip` the instruction is first fetched through the shadow, again whenever it is resumed after an exit, and
    /// KVM's retry rule knows it. `ac`: EFLAGS.AC. `implicit`: an access of the CPU's own (SMAP holds whatever AC says).
    /// `delivery`: made while an event is delivered; `user` is then the CPL before it.
    #[pyo3(signature = (gva, value, size=8, user=false, *, kind="mov", rip=None, length=1, ac=false, implicit=false, delivery=false))]
    fn write(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = wide_word)] value: u128,
        #[pyo3(from_py_with = word)] size: u64,
        user: bool,
        kind: &str,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
        #[pyo3(from_py_with = word)] length: u64,
        ac: bool,
        implicit: bool,
        delivery: bool,
    ) -> PyResult<Outcome> {
        let insn = access(Action::Store, gva, size, How { user, rip, length, ac, implicit, delivery })?;
        if size <= 8 && value >> 64 != 0 {
            return Err(errors::refused(format!(
                "value {value:#x} has more than 64 bits: only a store of 16 bytes may"
            )));
        }
        let (value, high) = (value as u64, (value >> 64) as u64);
        self.run(py, &Insn { value, high, writes_tables: store_kind(kind)?, ..insn })
    }

    /// A read-modify-write: "or", "and", "xor", "add", "xchg" or "cmpxchg" with `operand`; `value` is what was there.
    ///
    /// `expected`: what cmpxchg compares with (None: it finds what it expects). `locked`: with a LOCK prefix.
    #[pyo3(signature = (gva, operand, kind="or", size=8, user=false, *, expected=None, locked=true, rip=None, length=1, ac=false))]
    fn rmw(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = word)] operand: u64,
        kind: &str,
        #[pyo3(from_py_with = word)] size: u64,
        user: bool,
        #[pyo3(from_py_with = maybe_word)] expected: Option<u64>,
        locked: bool,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
        #[pyo3(from_py_with = word)] length: u64,
        ac: bool,
    ) -> PyResult<Outcome> {
        let (kind, writes_tables) = rmw_kind(kind)?;
        let how = How { user, rip, length, ac, implicit: false, delivery: false };
        let insn = access(Action::Rmw(kind), gva, size, how)?;
        let locked = locked || kind == RmwKind::Xchg;
        self.run(py, &Insn { value: operand, expected, locked, writes_tables, ..insn })
    }

    /// An instruction fetch at guest virtual address `gva`, at CPL 3 if `user`.
    #[pyo3(signature = (gva, user=false, *, rip=None, ac=false))]
    fn fetch(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        user: bool,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
        ac: bool,
    ) -> PyResult<Outcome> {
        let how = How { user, rip, length: 1, ac, implicit: false, delivery: false };
        self.run(py, &access(Action::Fetch, gva, 1, how)?)
    }

    /// REP STOS: `count` elements (at most 1,024) of `size` bytes from `gva` upwards.
    #[pyo3(signature = (gva, value, count, size=8, user=false, *, rip=None))]
    fn rep_stos(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = word)] value: u64,
        #[pyo3(from_py_with = word)] count: u64,
        #[pyo3(from_py_with = word)] size: u64,
        user: bool,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.run(py, &Insn { value, ..repeated(Action::Store, gva, size, count, user, rip)? })
    }

    /// REP MOVS: `count` elements (at most 1,024) of `size` bytes from `source` upwards to `gva` upwards.
    #[pyo3(signature = (gva, source, count, size=8, user=false, *, rip=None))]
    fn rep_movs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = word)] source: u64,
        #[pyo3(from_py_with = word)] count: u64,
        #[pyo3(from_py_with = word)] size: u64,
        user: bool,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        let insn = Insn { source: Gva(source), ..repeated(Action::Copy, gva, size, count, user, rip)? };
        self.run(py, &insn)
    }

    /// MOV to CR0. A value that the CPU or the engine does not take is the guest's #GP.
    #[pyo3(signature = (value, *, rip=None))]
    fn load_cr0(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] value: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Cr0(value), rip)
    }

    /// MOV to CR3: another address space, or a flush of this one; unsync tables are brought back in step.
    #[pyo3(signature = (value, *, rip=None))]
    fn load_cr3(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] value: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Cr3(value), rip)
    }

    /// MOV to CR4, as `load_cr0`.
    #[pyo3(signature = (value, *, rip=None))]
    fn load_cr4(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] value: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Cr4(value), rip)
    }

    /// WRMSR to EFER, as `load_cr0`.
    #[pyo3(signature = (value, *, rip=None))]
    fn wrmsr_efer(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] value: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Efer(value), rip)
    }

    /// INVLPG of the page of `gva`.
    #[pyo3(signature = (gva, *, rip=None))]
    fn invlpg(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Invlpg(gva), rip)
    }

    /// Delivery of an event as the CPU does it: gate, code segment, stack switch, frame.
    ///
    /// `idt`, `gdt`, `tss`: where the guest's tables are; `rsp`: the stack before; `user`: CPL 3 before it. A guest #PF
    /// meanwhile takes the event's place or becomes #DF, and a second one there shuts the vCPU down. Returns an Outcome:
    /// "done" with `error_code` = vector whose handler runs, `address` = the handler, `value` = stack pointer.
    ///
    /// `soft`: the instruction at `rip` raises it (INT3, INT n). KVM on hardware without next RIP decodes that again
    /// whenever it puts the event in once more.
    #[pyo3(signature = (vector, *, idt, gdt, rsp, tss=0, error_code=None, rip=0, user=false, soft=false))]
    fn deliver(
        &self,
        py: Python<'_>,
        vector: u8,
        #[pyo3(from_py_with = word)] idt: u64,
        #[pyo3(from_py_with = word)] gdt: u64,
        #[pyo3(from_py_with = word)] rsp: u64,
        #[pyo3(from_py_with = word)] tss: u64,
        error_code: Option<u32>,
        #[pyo3(from_py_with = word)] rip: u64,
        user: bool,
        soft: bool,
    ) -> PyResult<Outcome> {
        let event = Delivery { vector, error_code, rip, user, idt, gdt, tss, rsp, soft };
        Ok(Outcome(self.vm.try_borrow_mut(py)?.engine.deliver(self.index, &event)))
    }

    /// HLT: an exit, and the instruction is skipped.
    #[pyo3(signature = (rip=None))]
    fn hlt(&self, py: Python<'_>, #[pyo3(from_py_with = maybe_word)] rip: Option<u64>) -> PyResult<Outcome> {
        self.control(py, Control::Hlt, rip)
    }

    /// IN or OUT: an exit to user space.
    #[pyo3(signature = (rip=None))]
    fn io(&self, py: Python<'_>, #[pyo3(from_py_with = maybe_word)] rip: Option<u64>) -> PyResult<Outcome> {
        self.control(py, Control::Io, rip)
    }

    /// INVPCID of type 0 to 3 with its 16-byte descriptor (PCID, address) at guest virtual address `gva`.
    #[pyo3(signature = (kind, gva, *, rip=None))]
    fn invpcid(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = word)] kind: u64,
        #[pyo3(from_py_with = word)] gva: u64,
        #[pyo3(from_py_with = maybe_word)] rip: Option<u64>,
    ) -> PyResult<Outcome> {
        self.control(py, Control::Invpcid(kind, gva), rip)
    }

    /// WRPKRU: the rights of the 16 protection keys, two bits each. It does not exit.
    fn set_pkru(&self, py: Python<'_>, #[pyo3(from_py_with = word)] value: u64) -> PyResult<()> {
        let value =
            u32::try_from(value).map_err(|_| errors::refused(format!("pkru {value:#x} has more than 32 bits")))?;
        self.vm.try_borrow_mut(py)?.engine.set_pkru(self.index, value).map_err(errors::config)
    }

    /// Sets control registers as user space does; those that are None stay.
    ///
    /// `cs_l`: whether the code segment is a 64-bit one; None: it is in long mode, as long as the mode does not change.
    #[pyo3(signature = (*, cr0=None, cr3=None, cr4=None, efer=None, cs_l=None))]
    fn set_sregs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = maybe_word)] cr0: Option<u64>,
        #[pyo3(from_py_with = maybe_word)] cr3: Option<u64>,
        #[pyo3(from_py_with = maybe_word)] cr4: Option<u64>,
        #[pyo3(from_py_with = maybe_word)] efer: Option<u64>,
        cs_l: Option<bool>,
    ) -> PyResult<()> {
        let mut vm = self.vm.try_borrow_mut(py)?;
        let old = vm.engine.vcpus()[self.index].regs;
        let mut regs = Registers {
            cr0: cr0.unwrap_or(old.cr0),
            cr3: cr3.unwrap_or(old.cr3),
            cr4: cr4.unwrap_or(old.cr4),
            efer: efer.unwrap_or(old.efer),
            cs_l: old.cs_l,
        };
        regs.cs_l = cs_l.unwrap_or(if regs.lma() == old.lma() { old.cs_l } else { regs.lma() });
        vm.engine.set_sregs(self.index, regs).map_err(errors::config)
    }

    /// CR2: the address of the guest's last #PF.
    #[getter]
    fn cr2(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.vm.try_borrow(py)?.engine.vcpus()[self.index].cr2)
    }

    /// The control registers.
    #[getter]
    fn sregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let regs = self.vm.try_borrow(py)?.engine.vcpus()[self.index].regs;
        let out = PyDict::new(py);
        for (name, value) in [("cr0", regs.cr0), ("cr3", regs.cr3), ("cr4", regs.cr4), ("efer", regs.efer)] {
            out.set_item(name, value)?;
        }
        out.set_item("cs_l", u64::from(regs.cs_l))?;
        Ok(out)
    }

    /// This vCPU's statistics under KVM's names.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for (info, value) in VcpuCounters::INFO.iter().zip(self.counter_values(py)?) {
            out.set_item(info.name, value)?;
        }
        Ok(out)
    }

    /// The values of `counters` in the order of `COUNTERS`' vCPU part.
    fn counter_values(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        Ok(self.vm.try_borrow(py)?.engine.vcpus()[self.index].counters.values())
    }

    fn __repr__(&self) -> String {
        format!("<vCPU {}>", self.index)
    }
}
