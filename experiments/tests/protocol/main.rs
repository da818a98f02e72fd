//! The two cores together, without a network: the published traces, the invariants of ARCHITECTURE.md, and a
//! simulation of many workers under faults.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

mod cluster;
mod conservation;
mod delivery;
mod purity;
mod recovery;
mod replicas;
mod simulation;
mod traces;
