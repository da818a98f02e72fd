//! What the reproductions share: runs as data, the book of those that are finished, and the tables and plots made of it.

mod book;
mod choosing;
mod difference;
mod jobs;
mod published;
mod reference;
mod run_file;
mod search;
mod spec;
mod sweep;
mod text;

pub(super) use book::{Book, Finished, REVISION, key_name};
pub(super) use choosing::{Choosing, Chosen, validation};
pub(super) use difference::{Above, Agreement, Difference, cost, held, held_or_not};
pub(super) use jobs::{EVALUATIONS, Jobs, Progress};
pub(super) use published::{MANY, Published, RATES, RATES_OF_MANY, has_momentum, published_grid};
pub(super) use reference::{Stretch, WARM_START_GOAL, Warmup, train};
pub(super) use run_file::RunFile;
pub(super) use search::{Grid, Tried};
pub(super) use spec::{
    Outcome, Run, SMALL_MODEL_RATE, Spec, Subject, Trainer, by_adamw, by_workers, exchanges, make, plain,
    scale_rates,
};
pub(super) use sweep::{Sweep, Variant, Varied};
pub(super) use text::{
    Options, REPORT, counted, curve_of, distinct, escaped, file_name, look_every, mean_and_spread,
    mean_curve, plot_both, plot_training, plus_minus, seeds_text, show, show_loss, typed, workers_option,
    write_configuration, write_part, write_report, write_resolved, write_whole,
};
