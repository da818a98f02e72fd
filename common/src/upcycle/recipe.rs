//! What is made of a dense model: how many experts, how wide, and how their weights are scaled.

use crate::layout::LayoutError;
use crate::model_config::{FeedForward, ModelConfig, ModelConfigError, RouterOrder};

use super::Scales;

/// How the experts' weights make up for what routing takes from their summed output.
///
/// With S = N·G/T for softmax-then-topk (at a uniform router) and S = G for topk-then-softmax, the sum of the chosen
/// experts' outputs is the dense network's divided by S.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Scaling {
    /// gate, up and down by ∛S each (arXiv 2410.07524, for SwiGLU): inside SiLU the root does not preserve the function
    Paper,
    /// up and down by √S, gate as it is: preserves the function for topk-then-softmax, up to rounding
    #[default]
    Exact,
    /// Weights as they are
    None,
}

/// How a dense model is upcycled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Recipe {
    /// N, experts per layer.
    pub experts: usize,
    /// T, experts active per token; a multiple of the granularity.
    pub top_k: usize,
    /// G: each expert has a G-th of the dense network's width.
    pub granularity: usize,
    /// How router logits become weights.
    pub router: RouterOrder,
    /// How weights are scaled.
    pub scaling: Scaling,
    /// Of the routers' rows.
    pub seed: u64,
}

/// Why a recipe does not fit a dense model.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum UpcycleError {
    /// There is nothing to upcycle.
    #[error("the model is a mixture of experts already; only a dense one can be upcycled")]
    NotDense,
    /// A number that must be positive is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Virtual groups must be whole.
    #[error("experts ({experts}) must be a multiple of the granularity ({granularity})")]
    ExpertsNotGrouped {
        /// Experts asked for.
        experts: usize,
        /// The granularity.
        granularity: usize,
    },
    /// Whole copies of the dense network must be chosen.
    #[error("top_k ({top_k}) must be a multiple of the granularity ({granularity})")]
    TopKNotGrouped {
        /// Active experts asked for.
        top_k: usize,
        /// The granularity.
        granularity: usize,
    },
    /// Shards must be of one width.
    #[error("the dense feed-forward width ({width}) must be a multiple of the granularity ({granularity})")]
    WidthNotDivided {
        /// The dense network's width.
        width: usize,
        /// The granularity.
        granularity: usize,
    },
    /// The mixture makes no model.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
    /// Its tensors do not fit the layout's bounds.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl Recipe {
    /// The architecture of what becomes of `dense`.
    ///
    /// # Errors
    /// An [`UpcycleError`] that names the numbers that do not fit.
    pub fn config(&self, dense: &ModelConfig) -> Result<ModelConfig, UpcycleError> {
        let &Self { experts, top_k, granularity, router, .. } = self;
        if dense.feed_forward != FeedForward::Dense {
            return Err(UpcycleError::NotDense);
        }
        for (name, number) in [("experts", experts), ("top_k", top_k), ("granularity", granularity)] {
            if number == 0 {
                return Err(UpcycleError::Zero(name));
            }
        }
        if !experts.is_multiple_of(granularity) {
            return Err(UpcycleError::ExpertsNotGrouped { experts, granularity });
        }
        if !top_k.is_multiple_of(granularity) {
            return Err(UpcycleError::TopKNotGrouped { top_k, granularity });
        }
        let width = dense.intermediate_size;
        if !width.is_multiple_of(granularity) {
            return Err(UpcycleError::WidthNotDivided { width, granularity });
        }
        let config = ModelConfig {
            intermediate_size: width / granularity,
            feed_forward: FeedForward::Moe { experts, top_k, router },
            ..dense.clone()
        };
        config.validate()?;
        Ok(config)
    }

    /// S: what the summed output of the chosen experts is smaller by than the dense network's.
    pub fn output_ratio(&self) -> f64 {
        let (n, g, t) = (self.experts as f64, self.granularity as f64, self.top_k as f64);
        match self.router {
            RouterOrder::TopkThenSoftmax => g,
            RouterOrder::SoftmaxThenTopk => n * g / t,
        }
    }
}

/// The factors of a recipe's weights.
pub fn scales(recipe: &Recipe) -> Scales {
    let ratio = recipe.output_ratio();
    match recipe.scaling {
        Scaling::Paper => {
            // `libm`, so that every platform has the same bits. Others raise to the power 1/3, which is a unit in the
            // last place apart now and then; float32 products do not notice.
            let root = libm::cbrt(ratio);
            Scales { gate: root, up: root, down: root }
        }
        Scaling::Exact => {
            let root = libm::sqrt(ratio);
            Scales { gate: 1.0, up: root, down: root }
        }
        Scaling::None => Scales { gate: 1.0, up: 1.0, down: 1.0 },
    }
}
