//! Built-in policies: names with their rules.

use crate::error::{ConfigError, refuse};
use crate::policy::{Policy, Rules, Victim};
use crate::types::ENTRIES;

/// A row of the table of built-in policies.
#[derive(Debug)]
pub struct Builtin {
    /// Its name.
    pub name: &'static str,
    /// What a number behind the name (`name:N`) means, and the least and the greatest; empty without one.
    pub parameter: (&'static str, u32, u32),
    /// What it does otherwise than KVM.
    pub doc: &'static str,
    /// Where the rule comes from.
    pub source: &'static str,
    rules: fn(u32) -> Rules,
}

/// A policy that is nothing but rules.
#[derive(Debug)]
struct Fixed(Rules);

impl Policy for Fixed {
    fn rules(&self) -> Rules {
        self.0
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(Self(self.0))
    }
}

const NONE: (&str, u32, u32) = ("", 0, 0);
const EMULATED: Rules = Rules { may_unsync: false, ..Rules::KVM };

macro_rules! policies {
    ($($name:literal $parameter:expr, $doc:literal, $source:literal, $rules:expr;)*) => {
        /// Every built-in policy.
        pub const POLICIES: &[Builtin] = &[$(
            Builtin { name: $name, parameter: $parameter, doc: $doc, source: $source, rules: $rules },
        )*];
    };
}

policies! {
    "kvm" NONE, "KVM's rules", "Linux 6.1, arch/x86/kvm/mmu", |_| Rules::KVM;
    "no_unsync" NONE,
        "last-level tables never go out of sync; each store to one is emulated",
        "KVM without mmu_try_to_unsync_pages (before Linux 2.6.28)",
        |_| EMULATED;
    "zap_on_write" NONE,
        "no unsync, and each emulated store to an upper-level table zaps its shadow page",
        "KVM's first shadow MMU (Linux 2.6.20)",
        |_| Rules { flood_threshold: 1, ..EMULATED };
    "update_on_write" NONE,
        "no unsync; an emulated store to a last-level table fills its entry anew",
        "KVM's mmu_pte_write_new_pte (Linux 2.6.21 to 2.6.27)",
        |_| Rules { update_on_write: true, ..EMULATED };
    "xen_oos" NONE,
        "at most 3 tables of each vCPU out of sync; a fourth brings the first back",
        "Xen's out-of-sync pages (SHADOW_OOS_PAGES, xen/arch/x86/mm/shadow)",
        |_| Rules { unsync_limit: Some(3), ..Rules::KVM };
    "unsync_limit" ("tables out of sync for each vCPU", 1, 1 << 20),
        "at most N tables of each vCPU out of sync; one more brings the first back",
        "Xen's rule, with the number free",
        |n| Rules { unsync_limit: Some(n), ..Rules::KVM };
    "dirty_tables" NONE,
        "at most 16 tables out of sync, and every CR3 load brings all of them back, whatever they belong to",
        "VirtualBox's dirty page-table pages (PGMPOOL aDirtyPages)",
        |_| Rules { unsync_limit: Some(16), sync_all: true, ..Rules::KVM };
    "eager_sync" NONE,
        "a CR3 load brings every table of the VM into step, not only those below the new root",
        "KVM's kvm_mmu_sync_roots without its tree of marks",
        |_| Rules { sync_all: true, ..Rules::KVM };
    "invlpg_protects" NONE,
        "INVLPG brings the whole table into step and write-protects it again, where KVM looks at one entry",
        "the alternative to FNAME(invlpg) of Linux 6.1",
        |_| Rules { invlpg_protects: true, ..Rules::KVM };
    "flood" ("stores that zap; 0: none do", 0, 1 << 20),
        "N emulated stores in a row to an upper-level table zap its shadow page, where KVM takes 3",
        "detect_write_flooding of Linux 6.1, with the number free",
        |n| Rules { flood_threshold: if n == 0 { u32::MAX } else { n }, ..Rules::KVM };
    "no_prefetch" NONE,
        "a fault fills in its own entry only, not the 7 neighbours",
        "pte_prefetch of Linux 6.1, left out",
        |_| Rules { prefetch: 1, ..Rules::KVM };
    "prefetch" ("entries, a power of two", 1, ENTRIES as u32),
        "a fault fills in the group of N entries around its own, where KVM takes 8",
        "pte_prefetch of Linux 6.1, with the number free",
        |n| Rules { prefetch: n as usize, ..Rules::KVM };
    "small_pages" NONE,
        "no large shadow entries: guest and host pages of 2 MiB are shadowed by 4 KiB entries",
        "kvm_mmu_hugepage_adjust of Linux 6.1, left out",
        |_| Rules { large_pages: false, ..Rules::KVM };
    "recycle_newest" NONE,
        "when the quota is used up, the shadow page that was made last goes, where KVM takes the first",
        "the alternative to kvm_mmu_zap_oldest_mmu_pages of Linux 6.1",
        |_| Rules { victim: Victim::Newest, ..Rules::KVM };
    "recycle_emptiest" NONE,
        "when the quota is used up, the shadow page with the fewest entries goes",
        "the alternative to kvm_mmu_zap_oldest_mmu_pages of Linux 6.1",
        |_| Rules { victim: Victim::Emptiest, ..Rules::KVM };
}

/// A new instance of the built-in policy of that name: `kvm`, or `prefetch:16` where there is a number.
///
/// # Errors
/// No such policy; a number that is missing, too much, or out of its range.
pub fn builtin(text: &str) -> Result<Box<dyn Policy>, ConfigError> {
    let (name, number) = text.split_once(':').map_or((text, None), |(name, number)| (name, Some(number)));
    let Some(row) = POLICIES.iter().find(|row| row.name == name) else {
        let names: Vec<_> = POLICIES.iter().map(|row| row.name).collect();
        return refuse!("policy {name:?} is not known; choose one of {}", names.join(", "));
    };
    let (what, least, most) = row.parameter;
    let value = match number {
        None if what.is_empty() => 0,
        None => return refuse!("policy {name}: a number is needed, as in {name}:{}", least.max(4)),
        Some(number) if what.is_empty() => return refuse!("policy {name}: it takes no number ({number:?})"),
        Some(number) => match number.parse::<u32>() {
            Ok(value) if (least..=most).contains(&value) => value,
            _ => return refuse!("policy {name}: {number:?} is no number from {least} to {most} ({what})"),
        },
    };
    if name == "prefetch" && !value.is_power_of_two() {
        return refuse!("policy prefetch: {value} is no power of two");
    }
    Ok(Box::new(Fixed((row.rules)(value))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_makes_a_policy_of_its_own() {
        let mut seen = Vec::new();
        for row in POLICIES {
            let text = if row.parameter.0.is_empty() { row.name.to_owned() } else { format!("{}:4", row.name) };
            let rules = builtin(&text).expect(row.name).rules();
            assert!(!seen.contains(&rules), "{} is like another", row.name);
            seen.push(rules);
        }
        assert_eq!(builtin("kvm").unwrap().rules(), Rules::KVM);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, why) in [
            ("nonsense", "is not known"),
            ("flood", "a number is needed"),
            ("kvm:3", "takes no number"),
            ("prefetch:6", "no power of two"),
            ("prefetch:1024", "from 1 to 512"),
            ("unsync_limit:0", "from 1"),
            ("flood:-1", "no number"),
        ] {
            let error = builtin(text).unwrap_err();
            assert!(error.0.contains(why), "{text}: {}", error.0);
        }
    }
}
