//! Server and workers over real QUIC on the loopback interface: whole runs, killed workers, broken links, strangers, who
//! is admitted and what is too much.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test says that it is skipped")]

mod admission;
mod beginnings;
mod durability;
mod faults;
mod gpu;
mod limits;
mod order;
mod peer;
mod recovery;
mod runs;
#[path = "../../../worker/tests/skip/mod.rs"]
mod skip;
mod strangers;
mod support;
