//! A worker whose model and method are on a device against one that has them on the host: the same bits, whatever comes.
//!
//! The same bodies run on plain loops, on kernels emulated by a C++ compiler, and on a GPU where there is one; the last two
//! say so loudly when they are skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod exchange;
mod memory;
#[path = "../skip/mod.rs"]
mod skip;
mod twins;

use proptest::prelude::*;
use sanderling_worker::kernels::cpu::CpuMethod;
use sanderling_worker::kernels::cuda::{Cuda, Precision};

use skip::kernels;
use twins::{Course, course, same_as_the_host};

proptest! {
    #[test]
    fn plain_loops_come_to_what_the_host_comes_to(course in course()) {
        same_as_the_host(&course, CpuMethod::default);
    }
}

#[test]
fn every_method_format_and_rate_comes_to_what_the_host_comes_to() {
    for course in Course::all() {
        same_as_the_host(&course, CpuMethod::default);
    }
}

fn all_courses(device: &Cuda) {
    for course in Course::all().chain(Course::long()) {
        same_as_the_host(&course, || device.beside());
    }
}

#[test]
fn emulated_kernels_come_to_what_the_host_comes_to() {
    for precision in [Precision::F32, Precision::Bf16] {
        if let Some(device) = kernels(Cuda::emulated(precision)) {
            all_courses(&device);
        }
    }
}

#[test]
fn a_gpu_comes_to_what_the_host_comes_to() {
    for precision in [Precision::F32, Precision::Bf16] {
        if let Some(device) = kernels(Cuda::new(0, precision)) {
            all_courses(&device);
            same_as_the_host(&Course::large(), || device.beside());
        }
    }
}
