//! `cargo run --release --example show -- [--model] FILE`: what an input means, shortened as far as it still fails in the same way.
//!
//! The shortest input is written to FILE.min.

use shadowkvm_fuzz::decode::{RECORD, act};
use shadowkvm_fuzz::finding;
use shadowkvm_fuzz::world::Machine;
use std::process::ExitCode;

/// What makes two findings the same: the text without numbers.
fn kind(text: &str) -> String {
    let line = text.lines().nth(1).unwrap_or(text);
    line.chars().filter(|c| !c.is_ascii_hexdigit()).collect()
}

/// Leaves records out, ever smaller groups, as long as the finding stays.
fn shorten(mut data: Vec<u8>, model: bool) -> Vec<u8> {
    let Some(wanted) = finding(&data, model).map(|text| kind(&text)) else { return data };
    let mut group = 64;
    while group > 0 {
        let mut at = header(&data);
        while at < data.len() {
            let end = (at + group * RECORD).min(data.len());
            let shorter = [&data[..at], &data[end..]].concat();
            if finding(&shorter, model).is_some_and(|text| kind(&text) == wanted) {
                data = shorter;
            } else {
                at = end;
            }
        }
        group /= 2;
    }
    data
}

/// Bytes before the first record.
fn header(data: &[u8]) -> usize {
    data.len() - Machine::read(data).map_or(0, |(_, rest)| rest.len())
}

fn main() -> ExitCode {
    let mut arguments: Vec<_> = std::env::args().skip(1).collect();
    let model = arguments.iter().any(|argument| argument == "--model");
    arguments.retain(|argument| argument != "--model");
    let [path] = arguments.as_slice() else {
        eprintln!("usage: show [--model] FILE");
        return ExitCode::from(2);
    };
    let data = match std::fs::read(path) {
        Ok(data) => shorten(data, model),
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(2);
        }
    };
    let Some((machine, rest)) = Machine::read(&data) else { return ExitCode::SUCCESS };
    println!("{machine:x?}");
    for (i, record) in rest.as_chunks::<RECORD>().0.iter().enumerate() {
        println!("{i:3} {:x?}", act(*record, machine.vcpus()));
    }
    let Some(text) = finding(&data, model) else { return ExitCode::SUCCESS };
    println!("{text}");
    if let Err(error) = std::fs::write(format!("{path}.min"), &data) {
        eprintln!("{path}.min: {error}");
    }
    ExitCode::FAILURE
}
