//! Where the model's tensors lie in the flat parameter vector.

use std::ops::Range;

use sanderling_common::layout::Layout;
use sanderling_common::model_config::{FeedForward, ModelConfig, ModelConfigError, RouterOrder};

use crate::kernels::{ExpertWeights, Weights};

/// The offsets of everything, found once.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) parameters: usize,
    pub(super) embedding: Weights,
    pub(super) layers: Vec<LayerPlan>,
    pub(super) final_norm: usize,
    /// The embedding itself when tied.
    pub(super) head: Weights,
}

/// One decoder layer.
#[derive(Debug)]
pub(super) struct LayerPlan {
    pub(super) attention_norm: usize,
    /// Queries, keys and values as one matrix.
    pub(super) qkv: Weights,
    /// Their biases as one vector, where the model has them.
    pub(super) qkv_bias: Option<Range<usize>>,
    pub(super) attention_out: Weights,
    pub(super) feed_forward_norm: usize,
    pub(super) feed_forward: FeedForwardPlan,
}

/// The feed-forward half of a layer; gate and up projection are one matrix.
#[derive(Debug)]
pub(super) enum FeedForwardPlan {
    Dense {
        gate_up: Weights,
        down: Weights,
    },
    Moe {
        router: Weights,
        top_k: usize,
        order: RouterOrder,
        gate_up: ExpertWeights,
        down: ExpertWeights,
        shared: Option<SharedExpertPlan>,
    },
}

/// The expert that serves every token, and the single row that makes its gate's logit.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedExpertPlan {
    pub(super) gate: Weights,
    pub(super) gate_up: Weights,
    pub(super) down: Weights,
}

impl Plan {
    pub(super) fn new(config: &ModelConfig) -> Result<Self, ModelConfigError> {
        let layout = config.layout()?;
        let d = config.hidden_size;
        let embedding = weights(&layout, &["model.embed_tokens.weight"], config.vocab_size, d);
        let head = if config.tie_word_embeddings {
            embedding
        } else {
            weights(&layout, &["lm_head.weight"], config.vocab_size, d)
        };
        Ok(Self {
            parameters: layout.len(),
            embedding,
            layers: (0..config.layers).map(|layer| LayerPlan::new(config, &layout, layer)).collect(),
            final_norm: offset(&layout, "model.norm.weight"),
            head,
        })
    }
}

impl LayerPlan {
    fn new(config: &ModelConfig, layout: &Layout, layer: usize) -> Self {
        let (d, out) = (config.hidden_size, config.heads * config.head_dim);
        let qkv_width = out + 2 * config.kv_heads * config.head_dim;
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let qkv = [at("self_attn.q_proj"), at("self_attn.k_proj"), at("self_attn.v_proj")];
        let biases = qkv.each_ref().map(|name| name.replace(".weight", ".bias"));
        Self {
            attention_norm: offset(layout, &at("input_layernorm")),
            qkv: weights(layout, &qkv, qkv_width, d),
            qkv_bias: config.qkv_bias.then(|| weights(layout, &biases, qkv_width, 1).range()),
            attention_out: weights(layout, &[at("self_attn.o_proj")], d, out),
            feed_forward_norm: offset(layout, &at("post_attention_layernorm")),
            feed_forward: FeedForwardPlan::new(config, layout, layer),
        }
    }
}

impl FeedForwardPlan {
    fn new(config: &ModelConfig, layout: &Layout, layer: usize) -> Self {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        match config.feed_forward {
            FeedForward::Dense => Self::Dense {
                gate_up: weights(layout, &[at("mlp.gate_proj"), at("mlp.up_proj")], 2 * f, d),
                down: weights(layout, &[at("mlp.down_proj")], d, f),
            },
            FeedForward::Moe { experts, top_k, router: order } => {
                let moe = |name: &str| at(&format!("block_sparse_moe.{name}"));
                let expert = |e: usize| {
                    let names = [moe(&format!("experts.{e}.w1")), moe(&format!("experts.{e}.w3"))];
                    let down = weights(layout, &[moe(&format!("experts.{e}.w2"))], d, f);
                    (weights(layout, &names, 2 * f, d), down)
                };
                let (gate_up, down) = expert(0);
                let stride = if experts > 1 { expert(1).0.offset - gate_up.offset } else { 0 };
                Self::Moe {
                    router: weights(layout, &[moe("gate")], experts, d),
                    top_k,
                    order,
                    gate_up: ExpertWeights { first: gate_up, stride },
                    down: ExpertWeights { first: down, stride },
                    shared: config.shared_expert.map(|width| {
                        let part = |name: &str| moe(&format!("shared_expert.{name}"));
                        SharedExpertPlan {
                            gate: weights(layout, &[moe("shared_expert_gate")], 1, d),
                            gate_up: weights(layout, &[part("gate_proj"), part("up_proj")], 2 * width, d),
                            down: weights(layout, &[part("down_proj")], d, width),
                        }
                    }),
                }
            }
        }
    }
}

fn offset(layout: &Layout, name: &str) -> usize {
    layout.find(name).unwrap_or_else(|| panic!("the layout of a model has {name}")).offset
}

/// The matrix that adjacent tensors make together.
fn weights<N: AsRef<str>>(layout: &Layout, names: &[N], outputs: usize, inputs: usize) -> Weights {
    let weights = Weights { offset: offset(layout, names[0].as_ref()), outputs, inputs };
    let mut end = weights.offset;
    for name in names {
        let tensor =
            layout.find(name.as_ref()).expect("the layout of a model has every part of its matrices");
        assert_eq!(tensor.offset, end, "{} does not follow the tensor before it", tensor.name);
        end += tensor.len;
    }
    assert_eq!(end, weights.range().end, "{} is not of the shape ({outputs}, {inputs})", names[0].as_ref());
    weights
}
