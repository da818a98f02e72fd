//! Published results, run again at a scale that fits a desk.

mod lab;
mod methods;
mod upcycling;

pub use methods::{Arguments as MethodsArguments, methods};
pub use upcycling::{Arguments as UpcyclingArguments, upcycling};
