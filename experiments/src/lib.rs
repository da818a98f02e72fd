//! Sanderling at a desk: whole runs on one machine, simulations, and the reports they write.
//!
//! The only crate that sees both server and worker.

pub mod adamw;
pub mod bench;
pub mod card;
pub mod chaos;
mod child;
pub mod commands;
mod due;
pub mod evaluation;
pub mod faults;
pub mod generate;
pub mod relay;
pub mod report;
pub mod reproduce;
pub mod simulation;
pub mod task;
pub mod work;
