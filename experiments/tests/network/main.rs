//! Server and workers over real QUIC on the loopback interface: whole runs, killed workers, broken links, strangers, who
//! is admitted and what is too much.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admission;
mod beginnings;
mod durability;
mod faults;
mod limits;
mod order;
mod peer;
mod recovery;
mod runs;
mod strangers;
mod support;
