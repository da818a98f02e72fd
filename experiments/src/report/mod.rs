//! What a finished run shows: a table, a plot, a sample.

mod plot;
mod table;

pub use plot::{Curve, PlotError, plot_curves, plot_losses, without_beginnings};
pub use table::{closing_table, table};
