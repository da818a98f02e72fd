//! The CUDA kernels against the CPU's: every operation on random numbers, and the fixtures of whole models.
//!
//! The same bodies run on kernels emulated by a C++ compiler, and on a GPU where there is one (tests named `gpu_…`).
//! Both say so loudly when they are skipped. `SANDERLING_FIXTURES` names the folder of fixtures where this is run away
//! from the sources.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

mod compile;
mod device;
mod driver;
#[path = "../fixture/mod.rs"]
mod fixture;
mod fixtures;
mod graphs;
mod operations;
mod random;
mod shared;
#[path = "../skip/mod.rs"]
mod skip;
#[path = "../standin/mod.rs"]
mod standin;
