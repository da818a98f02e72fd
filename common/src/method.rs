//! The training methods a run can choose from, and the settings that suit each.

use std::fmt;

use crate::config::RunConfig;
use crate::sparse::{Compression, ValueFormat};

/// What a worker accumulates and sends. The mathematics is in the worker's `core::method`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Method {
    /// Asynchronous SGD: every gradient goes up whole
    Asgd,
    /// Gradient dropping: the largest accumulated entries go up, the rest waits
    GdAsync,
    /// Deep gradient compression: gradient dropping with momentum correction and factor masking
    DgcAsync,
    /// Dual-way gradient sparsification: sparsification-aware momentum (SAMomentum)
    Dgs,
    /// Dense momentum SGD on one worker
    Msgd,
    /// Gradient dropping of Adam-normalised gradients, taken at the worker's local view
    #[default]
    DgsAdam,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 6] =
        [Self::Asgd, Self::GdAsync, Self::DgcAsync, Self::Dgs, Self::Msgd, Self::DgsAdam];

    /// The name that run files and command lines use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Asgd => "asgd",
            Self::GdAsync => "gd-async",
            Self::DgcAsync => "dgc-async",
            Self::Dgs => "dgs",
            Self::Msgd => "msgd",
            Self::DgsAdam => "dgs-adam",
        }
    }

    /// Whether the method sends every entry, whatever `keep` says.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::Asgd | Self::Msgd)
    }

    /// The settings a run of this method has unless it says otherwise.
    ///
    /// | | asgd | gd-async | dgc-async | dgs | msgd | dgs-adam |
    /// | --- | --- | --- | --- | --- | --- | --- |
    /// | learning rate | 0.2 | 0.2 | 0.1 | 0.1 | 0.1 | 0.002 / √(1 + τ), at most 0.001 |
    /// | of a worker's own, at least | 0 | 0 | 0 | 0 | 0 | 0.001 |
    /// | warm-up, exchanges of each worker | 0 | 0 | 0 | 0 | 0 | 64 |
    /// | the rate falls | half a cosine | half a cosine | half a cosine | half a cosine | half a cosine | in a line, after 60 % |
    /// | momentum | – | – | 0.7 | 0.7 | 0.9 | 0 |
    /// | kept up | all | 1 % | 1 % | 1 % | all | 1 % |
    /// | kept down | all | all | all | all | all | 5 % |
    /// | values | f32 | f32 | f32 | f32 | f32 | int8 |
    /// | whole tensors | – | – | – | – | – | up to 2 000 elements |
    ///
    /// The paper's methods are as published but for the rates, which suit small transformers on about four workers
    /// with gradients clipped to norm 1. Momentum multiplies the reach of a rate by 1/(1 − m), hence the lower ones. Those of
    /// `dgs-adam` were chosen on the default model (1.78 M parameters, 128 wide) for 4 to 32 workers together; a model of half
    /// the width does best with twice the rates, and a run that goes on [from a checkpoint](MethodDefaults::from_checkpoint) with a
    /// quarter of them. `sanderling reproduce recipe` holds them against AdamW.
    pub fn defaults(self) -> MethodDefaults {
        let published = MethodDefaults {
            method: self,
            learning_rate: 0.2,
            rate_scaling: RateScaling::Constant,
            learning_rate_max: 0.2,
            momentum: 0.0,
            keep: 0.01,
            secondary: 1.0,
            values_up: ValueFormat::F32,
            values_down: ValueFormat::F32,
            dense_below: 0,
            local_rate: 0.0,
            warmup_exchanges: 0,
            decay: Decay::Cosine,
        };
        let with_momentum =
            MethodDefaults { learning_rate: 0.1, learning_rate_max: 0.1, momentum: 0.7, ..published.clone() };
        match self {
            Self::Asgd => MethodDefaults { keep: 1.0, ..published },
            Self::GdAsync => published,
            Self::DgcAsync | Self::Dgs => with_momentum,
            Self::Msgd => MethodDefaults { keep: 1.0, momentum: 0.9, ..with_momentum },
            Self::DgsAdam => MethodDefaults {
                learning_rate: 2e-3,
                rate_scaling: RateScaling::InverseSqrt,
                learning_rate_max: 1e-3,
                local_rate: 1e-3,
                warmup_exchanges: 64,
                decay: Decay::Wsd,
                secondary: 0.05,
                values_up: ValueFormat::Int8,
                values_down: ValueFormat::Int8,
                dense_below: 2000,
                ..published
            },
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How the learning rate depends on the staleness τ of the gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum RateScaling {
    /// Not at all
    #[default]
    Constant,
    /// η0/(1+τ), capped
    Inverse,
    /// η0/√(1+τ), capped
    InverseSqrt,
}

/// How the learning rate falls after its warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Decay {
    /// Along half a cosine
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak for 60 % of what follows warmup_steps, and then along a line
    Wsd,
}

/// See [`Method::defaults`] for the values and [`crate::config`] for what each means.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    missing_docs,
    reason = "each field is the default of the setting of the same name, documented there"
)]
pub struct MethodDefaults {
    pub method: Method,
    pub learning_rate: f64,
    pub rate_scaling: RateScaling,
    pub learning_rate_max: f64,
    pub momentum: f32,
    pub keep: f64,
    pub secondary: f64,
    pub values_up: ValueFormat,
    pub values_down: ValueFormat,
    pub dense_below: usize,
    pub local_rate: f64,
    pub warmup_exchanges: u64,
    pub decay: Decay,
}

/// The share of its rates from scratch with which `dgs-adam` goes on from a checkpoint: at the full ones a model first loses of
/// what it has learnt (`docs/results.md`, from a warm start). The other methods keep theirs, for want of evidence.
const CHECKPOINT_RATE_SHARE: f64 = 0.25;

impl MethodDefaults {
    /// Those of a run that goes on from a checkpoint, or from a mixture that is made of one.
    #[must_use]
    pub fn from_checkpoint(self) -> Self {
        if self.method != Method::DgsAdam {
            return self;
        }
        let learning_rate = CHECKPOINT_RATE_SHARE * self.learning_rate;
        let (learning_rate_max, local_rate) = self.rates_beside(learning_rate);
        Self { learning_rate, learning_rate_max, local_rate, ..self }
    }

    /// The cap on the scaled rate, and a worker's own rate, beside another η0: their shares of it stay what they are.
    pub fn rates_beside(&self, learning_rate: f64) -> (f64, f64) {
        let scale = learning_rate / self.learning_rate;
        (scale * self.learning_rate_max, scale * self.local_rate)
    }
}

/// What a worker's compression method needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MethodSettings {
    /// Which.
    pub method: Method,
    /// Momentum m, in [0, 1); `asgd`, `gd-async` and `dgs-adam` have none and ignore it.
    pub momentum: f32,
    /// Decay of the second moment (`dgs-adam`), in [0, 1).
    pub beta2: f32,
    /// Added to the root of the second moment (`dgs-adam`).
    pub epsilon: f32,
    /// Decoupled weight decay λ: λ·θ is part of the direction d; 0 turns it off.
    pub weight_decay: f32,
    /// Gradients are scaled down to this norm; 0 leaves them alone.
    pub clip_norm: f32,
    /// What is sent of the accumulated vector.
    pub compression: Compression,
}

impl From<&RunConfig> for MethodSettings {
    fn from(run: &RunConfig) -> Self {
        let (training, exchange) = (&run.training, &run.exchange);
        let keep = if training.method.is_dense() { 1.0 } else { exchange.keep };
        Self {
            method: training.method,
            momentum: training.momentum,
            beta2: training.beta2,
            epsilon: training.epsilon,
            weight_decay: training.weight_decay,
            clip_norm: training.clip_norm,
            compression: Compression { keep, dense_below: exchange.dense_below, format: exchange.values_up },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_run_files() {
        for method in Method::ALL {
            assert_eq!(serde_json::to_string(&method).unwrap(), format!("\"{method}\""));
        }
    }

    #[test]
    fn dense_methods_send_everything() {
        for method in Method::ALL {
            assert_eq!(method.is_dense(), method.defaults().keep == 1.0, "{method}");
        }
    }

    #[test]
    fn from_a_checkpoint_the_rates_are_lower_by_one_share() {
        let MethodDefaults { learning_rate, learning_rate_max, local_rate, .. } =
            Method::DgsAdam.defaults().from_checkpoint();
        assert_eq!((learning_rate, learning_rate_max, local_rate), (5e-4, 2.5e-4, 2.5e-4));
        assert_eq!(Method::Dgs.defaults().from_checkpoint(), Method::Dgs.defaults());
    }

    #[test]
    fn defaults_name_their_method() {
        assert!(Method::ALL.iter().all(|method| method.defaults().method == *method));
        assert_eq!(Method::default(), Method::DgsAdam);
    }
}
