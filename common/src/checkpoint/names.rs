//! What tensors are called in the files of each architecture.

use super::Architecture;
use crate::model_config::ModelConfig;

/// Width of the shared expert that `Qwen2MoeForCausalLM` demands, where the model has none and zeros are written.
///
/// Converters to block-quantised formats want multiples of 32.
pub(super) const NEUTRAL_SHARED_EXPERT: usize = 32;

/// The name of one of our tensors in an architecture's files.
pub(super) fn stored_name(architecture: Architecture, name: &str) -> String {
    match architecture {
        Architecture::Llama | Architecture::Mixtral => name.to_owned(),
        Architecture::Qwen2Moe => name
            .replace(".block_sparse_moe.", ".mlp.")
            .replace(".w1.", ".gate_proj.")
            .replace(".w3.", ".up_proj.")
            .replace(".w2.", ".down_proj."),
    }
}

/// Whether a tensor, by the name in its file, decides what a part of `Qwen2MoeForCausalLM` adds to the model: where all
/// of them are zero, the part changes nothing, whatever its inner tensors hold.
pub(super) fn decides(name: &str) -> bool {
    name.ends_with("_proj.bias") || name.ends_with("shared_expert.down_proj.weight")
}

/// Names and shapes of the tensors that an architecture demands and that the model does not have.
pub(super) fn neutral_tensors(architecture: Architecture, config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    if architecture != Architecture::Qwen2Moe {
        return Vec::new();
    }
    let (d, shared) = (config.hidden_size, NEUTRAL_SHARED_EXPERT);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let biases = [("self_attn.q_proj.bias", q), ("self_attn.k_proj.bias", kv), ("self_attn.v_proj.bias", kv)]
        .map(|(name, width)| (name, vec![width]));
    let expert = [
        ("mlp.shared_expert.gate_proj.weight", vec![shared, d]),
        ("mlp.shared_expert.up_proj.weight", vec![shared, d]),
        ("mlp.shared_expert.down_proj.weight", vec![d, shared]),
        ("mlp.shared_expert_gate.weight", vec![1, d]),
    ];
    let biases = biases.into_iter().filter(|_| !config.qkv_bias);
    let missing: Vec<_> =
        biases.chain(expert.into_iter().filter(|_| config.shared_expert.is_none())).collect();
    let named = |layer: usize| {
        missing.iter().map(move |(name, shape)| (format!("model.layers.{layer}.{name}"), shape.clone()))
    };
    (0..config.layers).flat_map(named).collect()
}

/// Tensors that some writers add though they follow from the others.
pub(super) fn is_derived(config: &ModelConfig, name: &str) -> bool {
    (config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
}
