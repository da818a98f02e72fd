//! A worker whose model and method are on a device against one that has them on the host: the same bits, whatever comes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod exchange;
mod twins;

use proptest::prelude::*;
use sanderling_worker::kernels::cpu::CpuMethod;
use sanderling_worker::kernels::cuda::{Cuda, Precision};

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

/// The kernels of a GPU, on the CPU.
#[test]
fn emulated_kernels_come_to_what_the_host_comes_to() {
    for precision in [Precision::F32, Precision::Bf16] {
        let device = Cuda::emulated(precision).unwrap();
        for course in Course::all().chain(Course::long()) {
            same_as_the_host(&course, || device.beside());
        }
    }
}
