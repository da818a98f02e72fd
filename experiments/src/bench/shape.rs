//! What is measured: models and a layer of known sizes.

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_worker::kernels::cuda::Precision;

/// A model or a layer of a known size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Shape {
    /// The model that `sanderling train` trains by default, 1.8 M parameters
    Default,
    /// Like Llama, dense, 1.1 G parameters
    Dense,
    /// Eight experts of which two serve each token, as many active parameters as `dense`, 3.5 G in all
    E8t2,
    /// The expert layer alone in the size of Llama 3's 8B, eight experts, top-2
    Layer,
}

/// The expert layer: from the normed tokens to the gradient of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerShape {
    /// Width of the tokens.
    pub(super) hidden_size: usize,
    /// Width of an expert.
    pub(super) intermediate_size: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) rows: usize,
}

impl LayerShape {
    /// Elements of an expert's three matrices.
    pub(super) fn stride(self) -> usize {
        3 * self.hidden_size * self.intermediate_size
    }

    pub(super) fn slots(self) -> usize {
        self.rows * self.top_k
    }

    /// About what a step takes, in bytes.
    pub(super) fn bytes(self, precision: Precision) -> usize {
        let (activation, copy) = if precision == Precision::Bf16 { (2, 2) } else { (4, 0) };
        let (parameters, tokens) = (self.experts * self.stride(), self.rows * self.hidden_size);
        let per_slot = 2 * self.hidden_size + 4 * self.intermediate_size;
        parameters * (4 + 4 + copy)
            + tokens * (2 * activation + 4 + copy)
            + self.slots() * per_slot * activation
    }

    /// Floating-point operations of the products, forward and backward.
    pub(super) fn flops(self) -> f64 {
        3.0 * 2.0 * self.slots() as f64 * self.stride() as f64
    }
}

/// The size of the expert layer for so many tokens.
pub(super) fn expert_layer(rows: usize) -> LayerShape {
    LayerShape { hidden_size: 4096, intermediate_size: 14_336, experts: 8, top_k: 2, rows }
}

impl Shape {
    /// In tables and JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Dense => "dense",
            Self::E8t2 => "e8t2",
            Self::Layer => "layer",
        }
    }

    /// Tokens of a sequence, unless one asks for others.
    pub(super) fn context(self) -> usize {
        match self {
            Self::Default => RunConfig::default().model.context,
            Self::Dense | Self::E8t2 | Self::Layer => 4096,
        }
    }

    /// The model; the layer alone is none.
    pub(super) fn config(self, layers: Option<usize>, context: usize) -> Option<ModelConfig> {
        let (intermediate_size, feed_forward) = match self {
            Self::Default => {
                let config = RunConfig::default().model_config(Corpus::bundled().vocabulary().len());
                return Some(ModelConfig { layers: layers.unwrap_or(config.layers), context, ..config });
            }
            Self::Dense => (8192, FeedForward::Dense),
            Self::E8t2 => {
                (4096, FeedForward::Moe { experts: 8, top_k: 2, router: RouterOrder::TopkThenSoftmax })
            }
            Self::Layer => return None,
        };
        Some(ModelConfig {
            vocab_size: 32_000,
            hidden_size: 2048,
            layers: layers.unwrap_or(16),
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            intermediate_size,
            feed_forward,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_llama3: None,
            tie_word_embeddings: false,
            shared_expert: None,
            qkv_bias: false,
            context,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_sizes_that_they_are_named_for() {
        let parameters =
            |shape: Shape| shape.config(None, shape.context()).unwrap().layout().unwrap().len() as f64;
        assert_eq!(parameters(Shape::Default), 1_783_040.0);
        assert_eq!((parameters(Shape::Dense) / 1e8).round(), 11.0);
        assert_eq!((parameters(Shape::E8t2) / 1e8).round(), 35.0);
        assert!(Shape::Layer.config(None, 4096).is_none());
        assert_eq!(Shape::Dense.config(Some(2), 512).unwrap().layers, 2);
    }

    #[test]
    fn a_layer_counts_three_products_of_its_slots_forward_and_six_backward() {
        let shape = LayerShape { hidden_size: 2, intermediate_size: 3, experts: 4, top_k: 2, rows: 5 };
        assert_eq!((shape.stride(), shape.slots()), (18, 10));
        // 9 products of 10 slots, each 2·3 multiplications and as many additions a slot.
        assert_eq!(shape.flops(), 9.0 * 10.0 * 12.0);
        // 72 parameters and their gradient, 3 × 10 values by token, 10 × 16 by slot.
        assert_eq!(shape.bytes(Precision::F32), 4 * (2 * 72 + 30 + 160));
        assert_eq!(shape.bytes(Precision::Bf16), 10 * 72 + 10 * 10 + 2 * 160);
    }
}
