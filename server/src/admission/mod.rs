//! Who may take part: what a worker shows, and the file of those who may.

mod name;
mod passes;

pub use name::{NAME_CHARACTERS_MAX, Name, NameError};
pub(crate) use passes::read_text;
pub use passes::{PASSES_BYTES_MAX, Passes, PassesError, TokenDigest};
