//! One module per command.

pub mod tokenize;
pub mod train;

/// The command line asks for what makes no sense; the program ends with code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub(crate) String);
