//! Delivery of an event as the CPU does it: gate, code segment, stack switch and frame, each an access through the shadow
//! that may fault in its own right (APM vol. 2 sections 8.9 and 12.2, SDM vol. 3 section 6.12).

use crate::engine::Vm;
use crate::fault::insn::{Action, Insn};
use crate::fault::{Ctx, DOUBLE_FAULT, PAGE_FAULT};
use crate::outcome::{Outcome, Status};
use crate::types::Gva;

/// #BP.
const BREAKPOINT: u8 = 3;

/// An event, and where the guest keeps its tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// The vector.
    pub vector: u8,
    /// The error code that is pushed.
    pub error_code: Option<u32>,
    /// The instruction that the event interrupts; its address is pushed.
    pub rip: u64,
    /// CPL 3 before the event: the stack comes from the TSS.
    pub user: bool,
    /// Base of the IDT.
    pub idt: u64,
    /// Base of the GDT.
    pub gdt: u64,
    /// Base of the TSS.
    pub tss: u64,
    /// The stack pointer before the event.
    pub rsp: u64,
    /// It comes from the instruction at `rip` (INT3, INT n) and pushes the address behind it.
    pub soft: bool,
}

impl Vm {
    /// Delivers an event on a vCPU. A #PF of the guest during it follows the rules of double faults: it takes the event's
    /// place, or becomes #DF, and a fault while #DF is delivered shuts the vCPU down (`kvm_multiple_exception`, 6.1).
    ///
    /// `Done`: `error_code` is the vector whose handler runs, `address` the handler's, `value` the stack pointer. Other
    /// statuses end the delivery.
    pub fn deliver(&mut self, vcpu: usize, event: &Delivery) -> Outcome {
        self.begin(vcpu);
        let outcome = self.with(vcpu, |ctx| ctx.deliver(event));
        self.end();
        outcome
    }
}

impl Delivery {
    /// The address that is pushed; INT3 is one byte long, INT n two.
    const fn back(&self) -> u64 {
        match (self.soft, self.vector) {
            (false, _) => self.rip,
            (true, BREAKPOINT) => self.rip + 1,
            (true, _) => self.rip + 2,
        }
    }
}

impl Ctx<'_> {
    fn deliver(&mut self, event: &Delivery) -> Outcome {
        let mut event = *event;
        loop {
            self.vcpu.injected = Some((event.vector, event.error_code.unwrap_or(0)));
            let outcome = self.deliver_once(&event);
            match outcome {
                Ok(outcome) => return outcome,
                Err(fault) if fault.status == Status::PageFault => {
                    (event.vector, event.error_code) = (PAGE_FAULT, Some(fault.error_code));
                    event.soft = false;
                }
                Err(fault) if fault.status == Status::DoubleFault => {
                    (event.vector, event.error_code) = (DOUBLE_FAULT, Some(0));
                }
                Err(other) => return other,
            }
        }
    }

    fn deliver_once(&mut self, event: &Delivery) -> Result<Outcome, Outcome> {
        if self.vcpu.regs.lma() { self.deliver_long(event) } else { self.deliver_short(event) }
    }

    fn deliver_long(&mut self, event: &Delivery) -> Result<Outcome, Outcome> {
        let gate_at = event.idt.wrapping_add(16 * u64::from(event.vector));
        let gate = self.delivery_load(event, gate_at, 8)?;
        let upper = self.delivery_load(event, gate_at.wrapping_add(8), 8)?;
        let handler = gate & 0xffff | gate >> 32 & 0xffff_0000 | upper << 32;
        let selector = gate >> 16 & 0xffff;
        self.delivery_load(event, event.gdt.wrapping_add(selector & !7), 8)?;
        let stack_table = gate >> 32 & 7;
        let mut rsp = match stack_table {
            0 if event.user => self.delivery_load(event, event.tss.wrapping_add(4), 8)?,
            0 => event.rsp,
            n => self.delivery_load(event, event.tss.wrapping_add(0x24 + 8 * (n - 1)), 8)?,
        } & !0xf;
        let (ss, cs) = if event.user { (0x1b, 0x23) } else { (0x10, selector) };
        for word in [Some(ss), Some(event.rsp), Some(2), Some(cs), Some(event.back()), event.error_code.map(u64::from)]
        {
            let Some(word) = word else { continue };
            rsp = rsp.wrapping_sub(8);
            self.delivery_push(event, rsp, word, 8)?;
        }
        Ok(self.handled(event, handler, rsp))
    }

    fn deliver_short(&mut self, event: &Delivery) -> Result<Outcome, Outcome> {
        let gate_at = event.idt.wrapping_add(8 * u64::from(event.vector)) & 0xffff_ffff;
        let gate = self.delivery_load(event, gate_at, 4)?;
        let upper = self.delivery_load(event, gate_at.wrapping_add(4), 4)?;
        let handler = gate & 0xffff | upper & 0xffff_0000;
        let selector = gate >> 16 & 0xffff;
        self.delivery_load(event, event.gdt.wrapping_add(selector & !7), 8)?;
        let mut esp = event.rsp;
        let mut frame = vec![2, selector, event.back()];
        if event.user {
            esp = self.delivery_load(event, event.tss.wrapping_add(4), 4)?;
            let ss = self.delivery_load(event, event.tss.wrapping_add(8), 4)? & 0xffff;
            self.delivery_load(event, event.gdt.wrapping_add(ss & !7), 8)?;
            frame = vec![0x23, event.rsp, 2, 0x1b, event.back()];
        }
        for word in frame.into_iter().chain(event.error_code.map(u64::from)) {
            esp = esp.wrapping_sub(4) & 0xffff_ffff;
            self.delivery_push(event, esp, word, 4)?;
        }
        Ok(self.handled(event, handler, esp))
    }

    fn handled(&mut self, event: &Delivery, handler: u64, rsp: u64) -> Outcome {
        self.vcpu.injected = None;
        Outcome { status: Status::Done, value: rsp, error_code: u32::from(event.vector), address: handler }
    }

    fn delivery_load(&mut self, event: &Delivery, at: u64, size: u8) -> Result<u64, Outcome> {
        self.delivery_access(event, Insn::new(Action::Load, at, size)).map(|outcome| outcome.value)
    }

    fn delivery_push(&mut self, event: &Delivery, at: u64, value: u64, size: u8) -> Result<(), Outcome> {
        self.delivery_access(event, Insn { value, writes_tables: false, ..Insn::new(Action::Store, at, size) })
            .map(|_| ())
    }

    fn delivery_access(&mut self, event: &Delivery, insn: Insn) -> Result<Outcome, Outcome> {
        let gva = Gva(if self.vcpu.regs.lma() { insn.gva.0 } else { insn.gva.0 & 0xffff_ffff });
        let Delivery { user, soft, rip, .. } = *event;
        let outcome = self.run_insn(&Insn { gva, user, delivery: true, soft, rip: Some(rip), ..insn });
        if outcome.status == Status::Done { Ok(outcome) } else { Err(outcome) }
    }
}
