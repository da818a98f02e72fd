//! Published results, run again at a scale that fits a desk.

mod arms;
mod results;
mod trainer;
mod upcycling;

pub use upcycling::{Arguments, upcycling};
