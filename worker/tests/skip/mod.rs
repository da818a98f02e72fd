//! What not every machine has, and tests need: a GPU, NVIDIA's compiler, a C++ compiler.
//!
//! A test without it is skipped, and that is written past the test's captured output. `SANDERLING_TESTS_REQUIRE` names what must
//! be there, separated by commas (`gpu`, `gpus` for a second one, `nvrtc`, `compiler`): without it such a test fails.

#![allow(dead_code, reason = "each of the programs that tests are uses some of it")]

use std::collections::HashSet;
use std::fmt::Display;
use std::io::Write;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use sanderling_worker::kernels::cuda::{Cuda, CudaError};

/// What can be lacking.
const KINDS: [&str; 4] = ["gpu", "gpus", "nvrtc", "compiler"];

const REQUIRE_VARIABLE: &str = "SANDERLING_TESTS_REQUIRE";

/// What was said already in this process.
static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);

/// Says, once, that tests are skipped for the want of something.
///
/// # Panics
/// If it must be there.
pub(crate) fn skip(lacking: &str, why: &dyn Display) {
    let required = std::env::var(REQUIRE_VARIABLE).unwrap_or_default();
    let mut names = required.split(',').map(str::trim).filter(|name| !name.is_empty());
    let unknown = names.clone().find(|name| !KINDS.contains(name));
    assert!(unknown.is_none(), "{REQUIRE_VARIABLE} names {unknown:?}, which is none of {KINDS:?}");
    let is_required = names.any(|name| name == lacking);
    assert!(!is_required, "{REQUIRE_VARIABLE} names {lacking}, and {why}");
    let text = format!("SKIPPED, what needs {lacking}: {why}\n");
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().insert(text.clone()) {
        // What `eprintln!` writes is kept back when a test passes.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// The kernels, if the machine has what they need.
///
/// # Panics
/// If it has, and they cannot be used all the same.
pub(crate) fn kernels(made: Result<Cuda, CudaError>) -> Option<Cuda> {
    let error = match made {
        Ok(kernels) => return Some(kernels),
        Err(error) => error,
    };
    match error {
        CudaError::Library(_)
        | CudaError::NoDevice { .. }
        | CudaError::TooOld { .. }
        | CudaError::OldDriver { .. }
        | CudaError::OldLibrary { .. } => skip("gpu", &error),
        CudaError::NoCompiler(_) => skip("compiler", &error),
        _ => panic!("{error}"),
    }
    None
}

/// The C++ compiler that `$CXX` names, or `c++`.
pub(crate) fn compiler() -> Option<String> {
    let compiler =
        std::env::var("CXX").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Some(compiler);
    }
    skip("compiler", &CudaError::NoCompiler(compiler));
    None
}
