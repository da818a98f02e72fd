//! Sanderling's parameter server: holds the model, applies workers' sparse updates, answers each with the difference
//! between the model and what that worker has.
//!
//! [`core`] decides everything, without IO, clock or randomness; [`net`] drives it over QUIC; [`results`] is what a run
//! leaves behind. [`net::Server`] is the way in.

pub mod admission;
pub mod commands;
pub mod core;
pub mod net;
pub mod progress;
pub mod recorder;
pub mod results;
pub mod storage;
