//! How many tokens an expert takes of a training batch before it drops some.

/// What the capacity factor is a factor of: published figures mean one or the other, which differ by top_k.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum CapacityConvention {
    /// ⌊tokens / experts · factor⌋, as in arXiv 2412.09952
    #[default]
    Tokens,
    /// ⌈tokens · top_k / experts · factor⌉, as in Megatron: 1 is just enough at perfect balance
    Slots,
}

/// A limit on the tokens of each expert, in training. Evaluation and generation drop nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// The capacity factor, positive.
    pub factor: f64,
    /// What it is a factor of.
    pub convention: CapacityConvention,
}

impl Capacity {
    /// The most tokens that each of `experts` takes of `tokens` that choose `top_k` experts each; at least 1.
    pub fn limit(&self, tokens: usize, experts: usize, top_k: usize) -> usize {
        let experts = experts as f64;
        let limit = match self.convention {
            CapacityConvention::Tokens => (tokens as f64 / experts * self.factor).floor(),
            CapacityConvention::Slots => ((tokens * top_k) as f64 / experts * self.factor).ceil(),
        };
        // A cast to an integer saturates.
        (limit as usize).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_conventions_differ_by_top_k_and_rounding() {
        let limit = |factor, convention, tokens| Capacity { factor, convention }.limit(tokens, 8, 2);
        assert_eq!(limit(4.0, CapacityConvention::Tokens, 512), 256);
        assert_eq!(limit(2.0, CapacityConvention::Slots, 512), 256);
        assert_eq!(limit(1.0, CapacityConvention::Tokens, 31), 3);
        assert_eq!(limit(1.0, CapacityConvention::Slots, 31), 8);
        assert_eq!(limit(0.01, CapacityConvention::Tokens, 31), 1);
        assert_eq!(limit(f64::MAX, CapacityConvention::Slots, 31), usize::MAX);
    }
}
