//! What the reproductions share: runs as data, the book of those that are finished, and the tables and plots made of it.

mod book;
mod choosing;
mod jobs;
mod reference;
mod search;
mod spec;
mod sweep;
mod text;

pub(super) use book::{Book, Finished};
pub(super) use choosing::{Choosing, Chosen};
pub(super) use jobs::{EVALUATIONS, Jobs, Progress};
pub(super) use reference::{Batches, Stretch, train};
pub(super) use search::{Grid, Search, Tried};
pub(super) use spec::{Run, SMALL_MODEL_RATE, Spec, Subject, Trainer, make, scale_rates, small_model};
pub(super) use sweep::{Sweep, Variant, file_name};
pub(super) use text::{
    Options, look_every, mean_and_spread, mean_curve, plot_both, show, write_configuration, write_report,
};
