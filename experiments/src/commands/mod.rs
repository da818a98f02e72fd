//! One module per command.

pub mod train;
