//! Server and workers over real QUIC on the loopback interface: whole runs, killed workers, broken links, strangers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod beginnings;
mod faults;
mod recovery;
mod runs;
mod strangers;
mod support;
