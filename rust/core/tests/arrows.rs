//! The arrows of ARCHITECTURE.md, checked: who may import whom inside the core.
//!
//! To add a module, give it a place in the tables below. What is checked is the text of the files under src/: every
//! `use` and every path that begins with `crate`, `self`, `super` or a crate's name.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

/// Left (above) may never import right (below). Modules of one row may know each other.
const LAYERS: &[&[&str]] = &[
    &["types", "bits", "words"],
    &["role"], // not inside shadow: events show roles
    &["error", "outcome", "kernel", "config", "counters", "events", "ops"],
    &["policy", "memory"],
    &["mode"], // the control registers select it
    &["cpu"],
    &["guest"],
    &["image"],
    &["shadow"],
    &["hw"],
    &["fault"],
    &["engine", "audit"],
    &["paging"], // looks on: no part of the MMU knows it
];

/// The same inside a module. What stands in its mod.rs (struct Shadow, Flush) belongs to all of its files.
const INNER: &[(&str, &[&[&str]])] = &[(
    "shadow",
    // zap before pages and sync: finding and syncing a page may zap it (a ZapList collects what is to be freed).
    &[
        &["spte"],
        &["page"],
        &["rmap", "track"],
        &["unsync"],
        &["plain"],
        &["make"],
        &["zap"],
        &["pages"],
        &["sync"],
        &["roots"],
    ],
)];

/// Modules that only these may name, whatever the layers say: fault/ alone sees the guest's walk and the shadow.
const ONLY_FOR: &[(&str, &[&str])] = &[("guest::walk", &["guest", "fault", "paging"])];

/// Of another module, a module may name no more than these parts.
const NO_MORE_THAN: &[(&str, &str, &[&str])] = &[("shadow", "guest", &["mode", "gpte"])];

/// The crates that core knows; of serde its traits and derives, for those who keep a state: no format. No Python, no I/O,
/// no clock, no randomness: the dependencies are not there.
const CRATES: &[&str] = &["std", "core", "alloc", "rustc_hash", "serde", "thiserror"];

/// Parts of the standard library that would bring I/O, a clock, randomness or threads in by the back door.
const STD_FORBIDDEN: &[&str] = &["time", "fs", "net", "io", "env", "process", "thread", "os", "random"];

/// Names that must not occur at all. The standard hash map is seeded at random; rustc_hash's is the same everywhere.
const NAMES_FORBIDDEN: &[&str] = &["pyo3", "numpy", "rand", "getrandom", "RandomState", "println", "eprintln"];

#[test]
fn core_keeps_its_arrows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &src, &mut files);
    assert!(!files.is_empty(), "no source files under {}", src.display());
    let found = check(&files);
    assert!(found.is_empty(), "{} broken arrows:\n{}", found.len(), found.join("\n"));
}

fn collect(root: &Path, directory: &Path, files: &mut Vec<(String, String)>) {
    let mut entries: Vec<_> =
        std::fs::read_dir(directory).expect("readable").map(|entry| entry.expect("entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(root, &path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let name = path.strip_prefix(root).expect("below the root").to_string_lossy().replace('\\', "/");
            files.push((name, std::fs::read_to_string(&path).expect("UTF-8")));
        }
    }
}

// -- the rules -----------------------------------------------------------------------------------------------------------

/// All violations in files given as (path below src/, text).
fn check(files: &[(String, String)]) -> Vec<String> {
    let modules: BTreeSet<Vec<String>> = files.iter().map(|(name, _)| module_of(name)).collect();
    let mut found = Vec::new();
    for (name, text) in files {
        let module = module_of(name);
        let mut report = |line: usize, why: &str| found.push(format!("src/{name}:{line}: {why}"));
        if let Some(why) = misplaced(&module) {
            report(1, &why);
        }
        let tokens = tokens(text);
        for token in &tokens {
            if NAMES_FORBIDDEN.contains(&token.text.as_str()) {
                report(token.line, &format!("`{}` has no place in core", token.text));
            }
        }
        for (line, path) in paths(&tokens, &module, &modules) {
            if defines_macro(&tokens, &path) {
                continue; // `pub(crate) use name;` is how a macro leaves its file
            }
            if let Some(why) = broken(&module, &path) {
                report(line, &why);
            }
        }
    }
    found
}

/// "shadow/mod.rs" -> [shadow]; "shadow/rmap.rs" -> [shadow, rmap]; "lib.rs" -> [].
fn module_of(file: &str) -> Vec<String> {
    let mut parts: Vec<String> = file.trim_end_matches(".rs").split('/').map(String::from).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

fn defines_macro(tokens: &[Token], path: &[String]) -> bool {
    let named = |at: &[Token]| at[0].text == "macro_rules" && at[1].text == "!" && at[2].text == path[0];
    path.len() == 1 && tokens.windows(3).any(named)
}

fn layer(layers: &[&[&str]], name: &str) -> Option<usize> {
    layers.iter().position(|row| row.contains(&name))
}

fn inner(name: &str) -> Option<&'static [&'static [&'static str]]> {
    INNER.iter().find(|(module, _)| *module == name).map(|(_, layers)| *layers)
}

/// A module without a place in the tables.
fn misplaced(module: &[String]) -> Option<String> {
    let first = module.first()?;
    if layer(LAYERS, first).is_none() {
        return Some(format!("module `{first}` stands in no row of LAYERS: give it its place"));
    }
    let (layers, second) = (inner(first)?, module.get(1)?);
    layer(layers, second).is_none().then(|| format!("module `{first}::{second}` stands in no row of INNER"))
}

/// What is wrong with `module` naming `path` (absolute; the first part is a module of this crate or a crate).
fn broken(module: &[String], path: &[String]) -> Option<String> {
    let first = path.first()?.as_str();
    if first != "crate" {
        return broken_outside(path);
    }
    let from = module.first()?.as_str(); // lib.rs itself names everybody
    let to = path.get(1)?.as_str();
    let Some(rank) = layer(LAYERS, to) else {
        return Some(format!("`{}` goes through the crate root: name the module itself", path.join("::")));
    };
    let part = path.get(2).map(String::as_str);
    let shown = path.join("::");
    if rank > layer(LAYERS, from)? {
        return Some(format!("`{from}` may not know `{to}` ({shown})"));
    }
    for (whole, users) in ONLY_FOR {
        if part.is_some_and(|part| format!("{to}::{part}") == *whole) && !users.contains(&from) {
            return Some(format!("`{whole}` is only for {} ({shown})", users.join(", ")));
        }
    }
    for (who, whom, parts) in NO_MORE_THAN {
        if *who == from && *whom == to && part.is_none_or(|part| !parts.contains(&part)) {
            return Some(format!("of `{to}`, `{from}` may name only {} ({shown})", parts.join(", ")));
        }
    }
    if from != to {
        return None;
    }
    let layers = inner(from)?;
    let (here, there) = (layer(layers, module.get(1)?)?, layer(layers, part?)?);
    (there > here).then(|| format!("inside `{from}`, `{}` may not know `{}` ({shown})", module[1], path[2]))
}

fn broken_outside(path: &[String]) -> Option<String> {
    let name = path[0].as_str();
    let shown = path.join("::");
    if !CRATES.contains(&name) {
        return Some(format!("core does not depend on `{name}` ({shown})"));
    }
    let std = matches!(name, "std" | "core" | "alloc");
    let second = path.get(1)?.as_str();
    if std && (STD_FORBIDDEN.contains(&second) || second == "*") {
        return Some(format!("`{shown}` has no place in core: no I/O, clock, randomness or threads"));
    }
    let hashed = std && second == "collections" && path.iter().any(|part| part == "HashMap" || part == "HashSet");
    hashed.then(|| format!("`{shown}` is seeded at random: use rustc_hash"))
}

// -- reading Rust as far as imports need it -----------------------------------------------------------------------------

struct Token {
    text: String,
    line: usize,
}

/// Names, `::` and single signs; comments, strings, characters and lifetimes are dropped.
fn tokens(text: &str) -> Vec<Token> {
    let bytes = text.as_bytes();
    let (mut at, mut line, mut out) = (0, 1, Vec::new());
    while at < bytes.len() {
        let start = at;
        let rest = &text[at..];
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            at += block_comment(rest);
        } else if let Some(length) = raw_string(rest) {
            at += length;
        } else if bytes[at] == b'"' {
            at += quoted(rest, b'"');
        } else if bytes[at] == b'\'' {
            at += character_or_lifetime(rest);
        } else if bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_' {
            at += rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            out.push(Token { text: text[start..at].into(), line });
        } else if rest.starts_with("::") {
            at += 2;
            out.push(Token { text: "::".into(), line });
        } else {
            let sign = rest.chars().next().expect("not at the end");
            at += sign.len_utf8();
            if !sign.is_whitespace() {
                out.push(Token { text: sign.into(), line });
            }
        }
        line += text[start..at].matches('\n').count();
    }
    out
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match rest.as_bytes()[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn raw_string(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let end = format!("\"{}", "#".repeat(hashes));
    let content = body[hashes..].strip_prefix('"')?;
    let length = content.find(&end)? + end.len();
    Some(rest.len() - content.len() + length)
}

fn quoted(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn character_or_lifetime(rest: &str) -> usize {
    let mut letters = rest.chars().skip(1);
    let (first, second) = (letters.next(), letters.next());
    if first == Some('\\') || second == Some('\'') { quoted(rest, b'\'') } else { 1 }
}

/// Every imported or named path, made absolute, with its line.
fn paths(tokens: &[Token], file: &[String], modules: &BTreeSet<Vec<String>>) -> Vec<(usize, Vec<String>)> {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let (mut out, mut at, mut depth) = (Vec::new(), 0, 0_usize);
    let mut open: Vec<(usize, String)> = Vec::new(); // inline modules and the depth at which each one opened
    while at < tokens.len() {
        let here: Vec<String> = file.iter().cloned().chain(open.iter().map(|(_, name)| name.clone())).collect();
        match text(at) {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                open.pop_if(|(outer, _)| *outer == depth);
            }
            "mod" if text(at + 2) == "{" => open.push((depth, text(at + 1).into())),
            "use" if text(at + 1) != "<" => {
                let mut found = Vec::new();
                let end = use_tree(tokens, at + 1, &[], &mut found);
                out.extend(found.into_iter().filter_map(|(line, path)| Some((line, absolute(&here, path, modules)?))));
                at = end;
                continue;
            }
            "crate" | "self" | "super" | "std" | "core" | "alloc"
                if text(at + 1) == "::" && (at == 0 || text(at - 1) != "::") && text(at.wrapping_sub(1)) != "in" =>
            {
                let line = tokens[at].line;
                let mut path = vec![text(at).to_string()];
                while text(at + 1) == "::" && text(at + 2).starts_with(|c: char| c.is_alphabetic() || c == '_') {
                    path.push(text(at + 2).into());
                    at += 2;
                }
                // `crate::name!` calls a macro: macros live at the crate root whoever defines them.
                if text(at + 1) != "!" || path.len() > 2 {
                    out.extend(absolute(&here, path, modules).map(|path| (line, path)));
                }
            }
            _ => {}
        }
        at += 1;
    }
    out
}

/// Flattens `a::{b, c::*} as d` from `at` on; returns the index after it.
fn use_tree(tokens: &[Token], mut at: usize, prefix: &[String], out: &mut Vec<(usize, Vec<String>)>) -> usize {
    let mut path = prefix.to_vec();
    let line = tokens.get(at).map_or(0, |token| token.line);
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "::" => at += 1,
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token.text != "}") {
                    at = use_tree(tokens, at, &path, out);
                    at += usize::from(tokens.get(at).is_some_and(|token| token.text == ","));
                }
                return at + 1;
            }
            "as" => at += 2,
            ";" | "," | "}" => break,
            name => {
                path.push(name.into());
                at += 1;
            }
        }
    }
    if path.len() > prefix.len() {
        out.push((line, path));
    }
    at
}

/// `super::x` in a::b is crate::a::x. A first part that is a child of this module is that child, else a crate.
fn absolute(here: &[String], path: Vec<String>, modules: &BTreeSet<Vec<String>>) -> Option<Vec<String>> {
    let mut base = here.to_vec();
    let mut rest = path.as_slice();
    let child: Vec<String> = here.iter().cloned().chain(path.first().cloned()).collect();
    match path.first()?.as_str() {
        "crate" => return Some(path),
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|part| part == "super") {
                base.pop();
                rest = &rest[1..];
            }
        }
        _ if modules.contains(&child) => {}
        // `use Kind::*` brings in the variants of a type that is already in scope.
        name if name.starts_with(char::is_uppercase) => return None,
        _ => return Some(path),
    }
    let mut out = vec!["crate".to_string()];
    out.extend(base);
    out.extend(rest.iter().filter(|part| part.as_str() != "self").cloned());
    Some(out)
}

// -- the checker, checked ------------------------------------------------------------------------------------------------

fn checked(files: &[(&str, &str)]) -> String {
    let owned: Vec<_> = files.iter().map(|(name, text)| ((*name).to_string(), (*text).to_string())).collect();
    check(&owned).iter().fold(String::new(), |mut all, one| {
        let _ = writeln!(all, "{one}");
        all
    })
}

/// (file, its text, what must be said)
const VIOLATIONS: &[(&str, &str, &str)] = &[
    ("types.rs", "use crate::engine::Engine;", "`types` may not know `engine`"),
    ("memory.rs", "use crate::{\n    types::Gpa,\n    shadow::{Flush, rmap},\n};", "src/memory.rs:3: `memory` may not"),
    ("cpu.rs", "fn f() {\n    crate::hw::tlb::flush();\n}", "src/cpu.rs:2: `cpu` may not know `hw`"),
    ("guest/walk.rs", "use super::super::fault::Ctx;", "`guest` may not know `fault`"),
    ("shadow/rmap.rs", "use crate::hw::tlb::Tlb;", "`shadow` may not know `hw`"),
    ("shadow/sync.rs", "use crate::guest::walk::GuestWalk;", "`guest::walk` is only for guest, fault"),
    ("shadow/sync.rs", "use crate::guest::Anything;", "of `guest`, `shadow` may name only mode, gpte"),
    ("hw/walk.rs", "use crate::guest::walk;", "`guest::walk` is only for guest, fault"),
    ("shadow/page.rs", "use super::zap::zap_page;", "inside `shadow`, `page` may not know `zap`"),
    ("shadow/spte.rs", "use crate::shadow::{page::ShadowPage, rmap};", "`spte` may not know `page`"),
    ("shadow/novel.rs", "", "`shadow::novel` stands in no row of INNER"),
    ("novel.rs", "", "`novel` stands in no row of LAYERS"),
    ("cpu.rs", "use crate::Engine;", "goes through the crate root"),
    ("cpu.rs", "use pyo3::prelude::*;", "`pyo3` has no place in core"),
    ("cpu.rs", "use rand::Rng as _;", "core does not depend on `rand`"),
    ("cpu.rs", "use ndarray::Array;", "core does not depend on `ndarray`"),
    ("cpu.rs", "use std::{fmt, time::Duration};", "`std::time::Duration` has no place in core"),
    ("cpu.rs", "fn f() { std::fs::read(\"x\"); }", "`std::fs::read` has no place in core"),
    ("cpu.rs", "use std::collections::{BTreeMap, HashMap};", "seeded at random"),
    ("types.rs", "mod tests {\n    use super::super::cpu::Cpu;\n}", "`types` may not know `cpu`"),
    ("types.rs", "fn f<'a>(x: &'a str) -> char { '\"' }\nuse crate::cpu::Cpu;", "src/types.rs:2:"),
];

#[test]
fn every_kind_of_violation_is_found() {
    for (file, text, why) in VIOLATIONS {
        let said = checked(&[(file, text)]);
        assert!(said.contains(why), "{file}: {text}\nshould be found as: {why}\nbut was: {said:?}");
    }
}

#[test]
fn good_code_passes() {
    let files = [
        ("lib.rs", "//! crate::nowhere\npub mod types;\npub mod shadow;\npub use shadow::Shadow;"),
        ("types.rs", "use std::fmt;\nuse crate::bits::PT_PRESENT;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n"),
        (
            "bits.rs",
            "// use crate::engine::Engine;\n/* use pyo3; /* nested */ */ const S: &str = \"use crate::fault\";",
        ),
        ("shadow/mod.rs", "mod rmap;\nmod zap;\nuse rmap::Rmap;\nuse self::zap::zap;\npub(crate) struct Shadow;"),
        ("shadow/rmap.rs", "use super::{Flush, Shadow, page::PageId};\nuse crate::guest::{gpte, mode::Mode};"),
        (
            "shadow/zap.rs",
            "use super::unsync;\nuse crate::shadow::Flush;\npub(in crate::shadow) fn zap() { crate::emit!(1) }",
        ),
        (
            "fault/mod.rs",
            "use crate::guest::walk::{self, walk_addr};\nuse crate::shadow::Shadow;\nuse rustc_hash::FxHashMap;",
        ),
        ("outcome.rs", "enum RetPf { Retry }\nfn f() {\n    use RetPf::*;\n    let s = r#\"std::fs\"#;\n}"),
        ("audit.rs", "use crate::engine::Engine;\nuse std::collections::BTreeMap;\nuse std::mem::size_of;"),
        ("policy/flood.rs", "use super::Policy;\nuse crate::config::FLOOD;"),
        ("error.rs", "macro_rules! refuse { () => {} }\npub(crate) use refuse;"),
    ];
    assert_eq!(checked(&files), "");
}
