//! The two cores together, without a network: the published traces, the invariants of ARCHITECTURE.md, and a
//! simulation of many workers under faults.

mod cluster;
mod conservation;
mod delivery;
mod purity;
mod replicas;
mod simulation;
mod traces;
