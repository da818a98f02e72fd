//! What experiments train: the language model on a text, and a small classifier of images.

mod classifier;
mod digits;
mod language;

use std::sync::Arc;

use sanderling_common::ids::BatchId;
use sanderling_common::layout::Layout;
use sanderling_common::wire::Split;
use sanderling_worker::model::ModelError;

pub use classifier::{Classifier, ClassifierShape};
pub use digits::{Digits, DigitsTask};
pub use language::LanguageTask;

/// What a gradient came with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// Mean loss over the batch, in nats.
    pub loss: f64,
    /// The share of the choices of experts that were dropped.
    pub dropped: f64,
    /// What was learned from: tokens, or images.
    pub samples: u32,
}

/// How good parameters are on a held-out split.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Score {
    /// Mean loss, in nats; `null` in JSON, and here not a number, once a run has diverged.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// The share that is classified rightly, where there are classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// Reads a number that JSON has no form for, `null`, as one that is not a number.
pub(crate) fn number_or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let number: Option<f64> = serde::Deserialize::deserialize(deserializer)?;
    Ok(number.unwrap_or(f64::NAN))
}

/// A model with its data, whose parameters someone else holds: all that training needs to know of either.
///
/// Everything is a pure function of the arguments and of what the task was made with, its seed among it.
pub trait Task: Send {
    /// The layout of the parameters.
    fn layout(&self) -> &Arc<Layout>;

    /// θ0.
    fn initial(&self) -> Vec<f32>;

    /// Takes the gradient of a batch at `parameters`; [`gradient`](Self::gradient) holds it afterwards.
    ///
    /// # Errors
    /// A [`ModelError`] if it cannot be computed.
    fn take_gradient(&mut self, parameters: &[f32], batch: BatchId) -> Result<Taken, ModelError>;

    /// The last gradient taken.
    fn gradient(&self) -> &[f32];

    /// How good `parameters` are on the whole of a held-out split.
    ///
    /// # Errors
    /// A [`ModelError`] if it cannot be computed.
    fn evaluate(&mut self, parameters: &[f32], split: Split) -> Result<Score, ModelError>;
}
