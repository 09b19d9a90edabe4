//! Events as the golden traces have them: a line for each VM exit, a word or two for each event.

use shadowkvm_core::engine::Vm;
use shadowkvm_core::events::{EXIT_REASONS, Event, EventKind};
use shadowkvm_core::role::Role;
use shadowkvm_core::types::Level;
use std::fmt::Write as _;

/// The lines between the guest's set-up (root, code page, page of ops) and its HLT; `root` counts only where not 0.
pub(crate) fn lines(vm: &Vm) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut last = None;
    for event in vm.events().records() {
        if event.kind == EventKind::Exit {
            if event.code == 1 {
                break;
            }
            // A fault has an event of its own, with the address.
            let title = if event.code == 0 { "" } else { EXIT_REASONS[event.code as usize] };
            lines.push(if title == "io" { "io · host".into() } else { title.into() });
        } else if let Some(word) = word(event, last)
            && let Some(line) = lines.last_mut()
        {
            if !(line.is_empty() || word.starts_with('+')) {
                line.push_str(" · ");
            }
            line.push_str(word.trim_start_matches('+'));
        }
        last = Some(event.kind);
    }
    lines.split_off(2.min(lines.len()))
}

fn page(event: &Event) -> String {
    let role = Role(event.code);
    let mut text = format!("{:x}/l{}", event.a, role.level().0);
    if role.direct() {
        text.push('d');
    }
    write!(text, " {}", role.access().text()).expect("a string takes any text");
    if role.invalid() {
        text.push_str(" inv");
    }
    if event.b > 0 {
        write!(text, " root{}", event.b).expect("a string takes any text");
    }
    if event.flag & 1 != 0 && event.kind != EventKind::SyncPage {
        text.push_str(" uns");
    }
    text
}

/// The event's words; entries that are written one after the other share one `set`, which `+` continues.
fn word(event: &Event, last: Option<EventKind>) -> Option<String> {
    let code = event.code;
    Some(match event.kind {
        EventKind::PageFault => format!("PF {:x} err {code:x}", event.b),
        EventKind::PagetableWalk => format!("walk {:x}/{code:x}", event.a),
        EventKind::SetAccessedBit => format!("setA {:x}", event.a),
        EventKind::SetDirtyBit => format!("setD {:x}", event.a),
        EventKind::WalkerError => format!("werr {code:x}"),
        EventKind::GetPage => format!("get {} {}", page(event), if event.flag & 2 != 0 { "new" } else { "existing" }),
        EventKind::SyncPage => format!("SYNC {}", page(event)),
        EventKind::UnsyncPage => format!("UNSYNC {}", page(event)),
        EventKind::PrepareZapPage => format!("ZAP {}", page(event)),
        EventKind::SpteRequested => {
            let nowhere = if event.b == 1 << 63 { " nopfn" } else { "" };
            format!("req {:x} L{}{nowhere}", event.a, event.level)
        }
        EventKind::SetSpte => {
            let prefix = if last == Some(EventKind::SetSpte) { "+ " } else { "set " };
            let never = if event.b >> 63 != 0 { "N" } else { "" };
            let level = if Level(event.level) > Level::PT { format!("@L{}", event.level) } else { String::new() };
            format!("{prefix}{:x}:{never}{:x}{level}", event.a, event.b & 0xfff)
        }
        EventKind::MarkMmioSpte => format!("mark_mmio {:x} a{code:x} g{:x}", event.b, event.c),
        EventKind::HandleMmioPageFault => format!("hmmio {:x} {:x} a{code:x}", event.a, event.b),
        EventKind::CheckMmioSpte => {
            format!("check {:x} g{:x}/{:x} {}", event.a, event.b, event.c, u8::from(event.b == event.c))
        }
        EventKind::MatchMmio => format!("match {}", if event.flag & 2 == 0 { "GVA" } else { "GPA" }),
        EventKind::Mmio if event.flag == 0 => "mmio unsatisfied-read".into(),
        EventKind::Mmio if event.flag == 2 => "mmio write".into(),
        EventKind::EmulateInsn => "emu".into(),
        EventKind::ZapAllFast | EventKind::InjException => {
            let line = event.to_string();
            line.strip_prefix("kvm_mmu_").unwrap_or(&line).replace("kvm_inj_exception:", "inj").replace("fast:", "fast")
        }
        // Elements of walks are left out there, and so is the answer to a read, which comes with the next entry.
        _ => return None,
    })
}
