//! The angles of the rotary embedding.

use std::f64::consts::TAU;

use sanderling_common::model_config::{Llama3Rope, ModelConfig};

/// Cosines and sines for every position of the context: per position head_dim/2 cosines, then as many sines.
///
/// Channel pair i turns by position · θ^(−2i/head_dim), stretched as Llama 3 does where the configuration says so.
pub(super) fn tables(config: &ModelConfig) -> Vec<f32> {
    let half = config.head_dim / 2;
    let frequencies: Vec<f64> = (0..half)
        .map(|i| {
            let frequency = libm::pow(config.rope_theta, -(2.0 * i as f64) / config.head_dim as f64);
            config.rope_llama3.map_or(frequency, |scaling| stretch(frequency, scaling))
        })
        .collect();
    let mut tables = Vec::with_capacity(config.context * config.head_dim);
    for position in 0..config.context {
        let angles = || frequencies.iter().map(|frequency| position as f64 * frequency);
        tables.extend(angles().map(|angle| libm::cos(angle) as f32));
        tables.extend(angles().map(|angle| libm::sin(angle) as f32));
    }
    tables
}

/// Llama 3's scaling: high frequencies stay, low ones are divided by the factor, those between are blended.
fn stretch(frequency: f64, scaling: Llama3Rope) -> f64 {
    let context = scaling.original_context as f64;
    let turns = context * frequency / TAU;
    if turns > scaling.high_freq_factor {
        frequency
    } else if turns < scaling.low_freq_factor {
        frequency / scaling.factor
    } else {
        let kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
        (1.0 - kept) * frequency / scaling.factor + kept * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_low_frequencies_only() {
        let scaling =
            Llama3Rope { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        assert_eq!(stretch(1.0, scaling), 1.0);
        assert_eq!(stretch(1e-5, scaling), 1e-5 / 8.0);
        let between = stretch(2.0 * TAU / 8192.0, scaling);
        assert!(between > 2.0 * TAU / 8192.0 / 8.0 && between < 2.0 * TAU / 8192.0, "{between}");
    }
}
