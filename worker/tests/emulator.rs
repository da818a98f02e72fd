//! The emulator of the CUDA kernels computes what plain loops do, and notices what a kernel may not do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "skip/mod.rs"]
mod skip;

use std::path::Path;
use std::process::{Command, Output};

#[test]
fn the_emulator_computes_like_plain_loops_and_notices_mistakes() {
    let Some(compiler) = skip::compiler() else { return };
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulate");
    let compiled = Command::new(&compiler)
        .current_dir(&kernels)
        .args(["-std=c++17", "-O1", "-w", "-rdynamic", "-DSANDERLING_EMULATE", "-DACT_BF16=1"])
        .args(["-I.", "-Iemulator", "emulator/tests/emulate.cpp", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));

    // Orders of threads: their own, and drawn ones.
    for seed in 0..4 {
        let run = Command::new(&program).env("EMULATE_SEED", seed.to_string()).output().unwrap();
        assert!(run.status.success(), "seed {seed}: {}", errors(&run));
    }
    for (kernel, reason) in [
        ("left_alone", "threads wait for others that never come"),
        ("past_the_end", "a write past the end of shared memory"),
        ("some_lanes", "a mask of less than a warp"),
        ("used_too_early", "sums of products that were not waited for"),
        ("never_waited_for", "products that nobody waited for"),
        ("never_copied", "copies that nobody waited for"),
        ("unknown_tile", "a product of what was written without a fence"),
        ("unknown_copy", "a product of what was written without a fence"),
        ("unfenced_sums", "a product of registers without a fence"),
        ("operand_used_again", "an operand in registers that changed before the wait"),
        ("untold_barrier", "a box for a barrier without its fence"),
        ("box_over_stores", "a box over what was written before a fence"),
    ] {
        let run = Command::new(&program).arg(kernel).output().unwrap();
        assert!(!run.status.success(), "{kernel} is not noticed");
        let errors = errors(&run);
        assert!(errors.contains(kernel) && errors.contains(reason), "{kernel}: {errors}");
    }
}

fn errors(run: &Output) -> String {
    String::from_utf8_lossy(&run.stderr).into_owned()
}
