//! Every kernel compiles, for every architecture that it is meant for: NVRTC needs no GPU.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sanderling_worker::kernels::cuda::{
    Compiled, Library, Precision, Source, Target, Unit, architecture, compile_to_cubin, compile_to_ptx,
    require,
};

use crate::skip;

/// Compute capabilities times ten, with the most shared memory of a block there, in bytes: each of them has other machine code.
const DEVICES: [(u32, u32); 5] =
    [(80, 163 << 10), (86, 99 << 10), (90, 227 << 10), (100, 227 << 10), (120, 99 << 10)];

/// Threads that compile. CI has as many cores.
const COMPILERS: usize = 2;

fn has_nvrtc() -> bool {
    let usable = require(&[Library::Nvrtc]);
    if let Err(missing) = &usable {
        skip::skip("nvrtc", &format!("no kernel was compiled: {missing}"));
    }
    usable.is_ok()
}

/// What is compiled for these targets and architectures, each source for each architecture once.
fn sources(targets: impl IntoIterator<Item = (Target, String)>) -> Vec<(Source, String)> {
    let (mut sources, mut seen) = (Vec::new(), HashSet::new());
    for (target, architecture) in targets {
        for unit in Unit::ALL {
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                if unit.is_for_hopper() && !(target.hopper_experts && precision == Precision::Bf16) {
                    continue;
                }
                let source = unit.source(precision, target);
                if seen.insert((source.name, source.defines.clone(), architecture.clone())) {
                    sources.push((source, architecture.clone()));
                }
            }
        }
    }
    sources
}

/// Hands every source to one of the compilers' threads.
fn for_each(sources: &[(Source, String)], compile: impl Fn(&Source, &str) + Sync) {
    let (next, compile) = (AtomicUsize::new(0), &compile);
    let work = || {
        while let Some((source, architecture)) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(source, architecture);
        }
    };
    thread::scope(|scope| (0..COMPILERS).for_each(|_| drop(scope.spawn(work))));
}

/// As the driver of a GPU that is newer than the compiler gets them.
#[test]
fn kernels_compile() {
    if !has_nvrtc() {
        return;
    }
    let targets = ["compute_80", "compute_90", "compute_90a"].into_iter().flat_map(|architecture| {
        let hopper = architecture == "compute_90a";
        // Hopper does not lack shared memory.
        let small = [false, true].into_iter().filter(move |small| !(small & hopper));
        small.map(move |small_shared| {
            (
                Target { small_shared, hopper_experts: hopper, hopper_attention: hopper },
                architecture.to_owned(),
            )
        })
    });
    for_each(&sources(targets), |source, architecture| {
        let Compiled { code, log } =
            compile_to_ptx(source, architecture).unwrap_or_else(|error| panic!("{error}"));
        assert!(String::from_utf8_lossy(&code).contains(".entry"), "{} has no kernels", source.name);
        assert!(!warns(&log), "{} for {architecture}: {log}", source.name);
    });
}

/// Whether there is a warning among what the compiler says, or that products by wgmma wait for each other, which costs most of
/// their speed.
fn warns(log: &str) -> bool {
    ["warning", "Performance Loss"].iter().any(|word| log.contains(word))
}

/// As GPUs have them compiled, and without a warning. The compiler hands on to PTX, as they are, instructions that kernels write themselves: only here
/// they are read.
#[test]
fn kernels_assemble() {
    if !has_nvrtc() {
        return;
    }
    let targets = DEVICES.into_iter().flat_map(|(capability, shared_bytes)| {
        let target = Target::of(capability, shared_bytes);
        // What is for Hopper alone can be left out there.
        let without = Target { hopper_experts: false, hopper_attention: false, ..target };
        [target, without].map(|target| (target, architecture(capability)))
    });
    for_each(&sources(targets), |source, architecture| {
        let Compiled { code, log } =
            compile_to_cubin(source, architecture).unwrap_or_else(|error| panic!("{error}"));
        assert!(code.starts_with(b"\x7fELF"), "{} for {architecture} is no machine code", source.name);
        assert!(!warns(&log), "{} for {architecture}: {log}", source.name);
    });
}
