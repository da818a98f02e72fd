//! What is compared: the dense model trained on, and what upcycling makes of it.

use sanderling_common::model_config::{ModelConfig, RouterOrder};
use sanderling_common::upcycle::{Recipe, Scaling, UpcycleError};
use sanderling_worker::model::forward_flops_per_token;

/// One way to go on from the dense checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arm {
    /// In results; never changes its meaning.
    pub(super) key: &'static str,
    /// For people.
    pub(super) name: &'static str,
    /// `None` trains the dense model on.
    recipe: Option<(usize, usize, usize, RouterOrder, Scaling)>,
}

const fn moe(
    key: &'static str,
    name: &'static str,
    (experts, top_k, granularity): (usize, usize, usize),
    router: RouterOrder,
    scaling: Scaling,
) -> Arm {
    Arm { key, name, recipe: Some((experts, top_k, granularity, router, scaling)) }
}

/// All of them, the dense one first.
pub(super) const ARMS: [Arm; 6] = [
    Arm { key: "dense", name: "dense, trained on", recipe: None },
    moe("e8t2", "E8T2, topK-then-softmax", (8, 2, 1), RouterOrder::TopkThenSoftmax, Scaling::None),
    moe(
        "e8t2-softmax-paper",
        "E8T2, softmax-then-topK, scaling `paper`",
        (8, 2, 1),
        RouterOrder::SoftmaxThenTopk,
        Scaling::Paper,
    ),
    moe(
        "e8t2-softmax-exact",
        "E8T2, softmax-then-topK, scaling `exact`",
        (8, 2, 1),
        RouterOrder::SoftmaxThenTopk,
        Scaling::Exact,
    ),
    moe(
        "e8t2-softmax-none",
        "E8T2, softmax-then-topK, no scaling",
        (8, 2, 1),
        RouterOrder::SoftmaxThenTopk,
        Scaling::None,
    ),
    moe(
        "e64g8t8",
        "E64 G8 T8, topK-then-softmax, scaling `exact`",
        (64, 8, 8),
        RouterOrder::TopkThenSoftmax,
        Scaling::Exact,
    ),
];

/// Those that asynchronous workers are compared with AdamW in.
pub(super) const WARM_START_ARMS: [Arm; 2] = [ARMS[1], ARMS[5]];

impl Arm {
    pub(super) fn recipe(&self, seed: u64) -> Option<Recipe> {
        let (experts, top_k, granularity, router, scaling) = self.recipe?;
        Some(Recipe { experts, top_k, granularity, router, scaling, seed })
    }

    /// The architecture it trains.
    pub(super) fn config(&self, dense: &ModelConfig) -> Result<ModelConfig, UpcycleError> {
        self.recipe(0).map_or_else(|| Ok(dense.clone()), |recipe| recipe.config(dense))
    }

    /// How much more a token costs than with the dense model: the share of steps that equal compute allows.
    pub(super) fn cost(&self, dense: &ModelConfig, context: usize) -> Result<f64, UpcycleError> {
        let flops = |config: &ModelConfig| forward_flops_per_token(config, context, true);
        Ok(flops(&self.config(dense)?) / flops(dense))
    }
}

/// What is held equal to the dense model trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Budget {
    /// Floating-point operations.
    Compute,
    /// Training tokens.
    Tokens,
}

impl Budget {
    pub(super) const ALL: [Self; 2] = [Self::Compute, Self::Tokens];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Tokens => "tokens",
        }
    }
}
