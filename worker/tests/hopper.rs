//! The expert products for Hopper, whose descriptions of tensors a driver encodes: a C++ program of their own makes emulated
//! ones, and compares the kernels with plain loops.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "skip/mod.rs"]
mod skip;

use std::path::Path;
use std::process::Command;

#[test]
fn expert_products_for_hopper_are_those_of_plain_loops() {
    let Some(compiler) = skip::compiler() else { return };
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("experts_hopper");
    let compiled = Command::new(&compiler)
        .current_dir(&kernels)
        .args(["-std=c++17", "-O2", "-w", "-DSANDERLING_EMULATE", "-DACT_BF16=1"])
        .args(["-I.", "-Iemulator", "emulator/tests/experts_hopper.cpp", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&program).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}
