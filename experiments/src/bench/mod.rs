//! `sanderling bench`: how fast this machine is at what Sanderling does.

mod model;
mod report;
mod shape;
mod step;

pub use model::{Arguments as ModelArguments, model};
