//! Server and workers over real QUIC on the loopback interface: whole runs, killed workers, broken links, strangers.

mod faults;
mod relay;
mod runs;
mod strangers;
mod support;
