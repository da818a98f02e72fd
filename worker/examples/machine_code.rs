//! The machine code of every kernel for Hopper: whether a change to sources changed what runs, which needs no GPU to be seen.
//!
//!     cargo run -p sanderling-worker --example machine_code                                    # a line per kernel
//!     cargo run -p sanderling-worker --example machine_code -- docs/results/machine-code.tsv   # and which are not in that list
//!
//! It needs NVRTC (docs/gpu.md). The list in docs/results is of what ran on an H200. Another version of NVRTC makes other code of
//! the same sources, so a list is of one.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "its output is for people")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use sanderling_worker::kernels::cuda::{
    Library, Precision, Target, Unit, architecture, compile_to_cubin, compiler_version, require,
};
use sha2::{Digest, Sha256};

/// Hopper's compute capability, times ten, and the most shared memory of a block there, in bytes.
const HOPPER: (u32, u32) = (90, 227 << 10);

fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether all kernels are in the list, if there is one.
fn run(list: Option<&str>) -> anyhow::Result<bool> {
    require(&[Library::Nvrtc])?;
    let (major, minor) = compiler_version();
    let heading = format!("# NVRTC {major}.{minor}");
    let Some(list) = list else {
        println!("{heading}");
        kernels()?.iter().for_each(|kernel| println!("{kernel}"));
        return Ok(true);
    };
    let text = std::fs::read_to_string(list).with_context(|| format!("cannot read {list}"))?;
    let of = text.lines().next().unwrap_or_default();
    ensure!(of == heading, "{list} is of another compiler: it begins with {of:?}, and this is {heading:?}");
    let kernels = kernels()?;
    let known: BTreeSet<&str> = text.lines().skip(1).collect();
    let (same, other): (Vec<&String>, _) = kernels.iter().partition(|kernel| known.contains(kernel.as_str()));
    other.iter().for_each(|kernel| println!("{kernel}"));
    let above = if other.is_empty() { "" } else { "; the others are above" };
    println!("{} of {} kernels are in {list}{above}", same.len(), kernels.len());
    Ok(other.is_empty())
}

/// A line for each: its name, its unit and what that is compiled for, the bytes of its code and their SHA-256.
fn kernels() -> anyhow::Result<BTreeSet<String>> {
    let target = Target::of(HOPPER.0, HOPPER.1);
    let (mut kernels, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for target in [target, Target { hopper_experts: false, hopper_attention: false, ..target }] {
        for unit in Unit::ALL {
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                if unit.is_for_hopper() && !(target.hopper_experts && precision == Precision::Bf16) {
                    continue;
                }
                let source = unit.source(precision, target);
                let defines: Vec<&str> =
                    source.defines.iter().map(|define| define.trim_start_matches("-D")).collect();
                let unit = format!("{} {}", source.name, defines.join(" "));
                if !seen.insert(unit.clone()) {
                    continue;
                }
                let code = compile_to_cubin(&source, &architecture(HOPPER.0))?.code;
                let codes =
                    texts(&code).with_context(|| format!("the machine code of {unit} is no ELF file"))?;
                kernels.extend(codes.iter().map(|(kernel, code)| {
                    let hash: String =
                        Sha256::digest(code).iter().map(|byte| format!("{byte:02x}")).collect();
                    format!("{kernel}\t{unit}\t{}\t{hash}", code.len())
                }));
            }
        }
    }
    Ok(kernels)
}

/// The kernels' code by their names, from the sections `.text.NAME` of an ELF file of 64 bits.
fn texts(file: &[u8]) -> Option<BTreeMap<String, &[u8]>> {
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let digits = file.get(at..at.checked_add(bytes)?)?;
        Some(digits.iter().rev().fold(0, |number, &digit| number << 8 | usize::from(digit)))
    };
    // The table of sections, and which of them holds their names.
    let (table, size) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let section = |index: usize| -> Option<(usize, &[u8])> {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let (from, len) = (number(at.checked_add(0x18)?, 8)?, number(at.checked_add(0x20)?, 8)?);
        // Sections without contents, which may lie anywhere.
        let contents = file.get(from..from.checked_add(len)?).unwrap_or_default();
        Some((number(at, 4)?, contents))
    };
    let names = section(names)?.1;
    let mut texts = BTreeMap::new();
    for index in 0..count {
        let (name, contents) = section(index)?;
        let name = names.get(name..)?.split(|&byte| byte == 0).next()?;
        if let Some(kernel) = std::str::from_utf8(name).ok()?.strip_prefix(".text.") {
            texts.insert(kernel.to_owned(), contents);
        }
    }
    Some(texts)
}
