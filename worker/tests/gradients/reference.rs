//! The decoder in plain float64 loops, forward only: slow, obvious, and written apart from the model.

use sanderling_common::layout::Layout;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};

pub(crate) struct Reference<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) layout: &'a Layout,
    pub(crate) params: &'a [f64],
    pub(crate) aux_coefficient: f64,
    /// An expert takes at most ⌊tokens / experts · factor⌋ tokens, at least 1.
    pub(crate) factor: Option<f64>,
}

/// Mean cross-entropy, and the means over the layers of N·Σ f·p and of the share of dropped choices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Losses {
    pub(crate) cross_entropy: f64,
    pub(crate) auxiliary: f64,
    pub(crate) dropped: f64,
}

/// Where a token goes: experts with their weights, and the softmax over all experts.
struct Routed {
    chosen: Vec<(usize, f64)>,
    probabilities: Vec<f64>,
}

type Rows = Vec<Vec<f64>>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| (logit - max).exp() / sum).collect()
}

impl Reference<'_> {
    fn tensor(&self, name: &str) -> &[f64] {
        &self.params[self.layout.find(name).unwrap_or_else(|| panic!("no tensor {name}")).range()]
    }

    /// W·x for W of shape (outputs, inputs).
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        self.tensor(name).chunks_exact(x.len()).map(|row| dot(row, x)).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(self.config.rms_norm_eps)).sqrt();
        x.iter().zip(self.tensor(name)).map(|(x, w)| w * x * scale).collect()
    }

    pub(crate) fn objective(&self, inputs: &[Vec<u32>], targets: &[Vec<u32>]) -> f64 {
        let losses = self.losses(inputs, targets);
        losses.cross_entropy + self.aux_coefficient * losses.auxiliary
    }

    pub(crate) fn losses(&self, inputs: &[Vec<u32>], targets: &[Vec<u32>]) -> Losses {
        let (d, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let embedding = self.tensor("model.embed_tokens.weight");
        let embed = |&token: &u32| embedding[token as usize * d..][..d].to_vec();
        let mut sequences: Vec<Rows> = inputs.iter().map(|ids| ids.iter().map(embed).collect()).collect();
        let (mut auxiliary, mut dropped) = (0.0, 0.0);
        for layer in 0..self.config.layers {
            sequences.iter_mut().for_each(|rows| self.attention(layer, rows));
            let (load, lost) = self.feed_forward(layer, &mut sequences);
            auxiliary += load / self.config.layers as f64;
            dropped += lost / self.config.layers as f64;
        }
        let head = if self.config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        let mut sum = 0.0;
        let tokens = sequences.iter().flatten().zip(targets.iter().flatten());
        for (row, &target) in tokens {
            let logits = self.linear(&format!("{head}.weight"), &self.norm("model.norm.weight", row));
            assert_eq!(logits.len(), vocab);
            sum -= softmax(&logits)[target as usize].ln();
        }
        Losses { cross_entropy: sum / targets.iter().flatten().count() as f64, auxiliary, dropped }
    }

    fn attention(&self, layer: usize, rows: &mut Rows) {
        let config = self.config;
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let normed: Rows = rows.iter().map(|row| self.norm(&at("input_layernorm"), row)).collect();
        let project = |name: &str, turned: bool| -> Rows {
            let mut projected: Rows = normed.iter().map(|row| self.linear(&at(name), row)).collect();
            if config.qkv_bias {
                let bias = self.tensor(&format!("model.layers.{layer}.{name}.bias"));
                let elements = projected.iter_mut().flat_map(|row| row.iter_mut().zip(bias));
                elements.for_each(|(value, bias)| *value += bias);
            }
            if turned {
                projected.iter_mut().enumerate().for_each(|(position, row)| self.rotate(position, row));
            }
            projected
        };
        let queries = project("self_attn.q_proj", true);
        let keys = project("self_attn.k_proj", true);
        let values = project("self_attn.v_proj", false);
        for (position, row) in rows.iter_mut().enumerate() {
            let mut attended = Vec::new();
            for head in 0..config.heads {
                let own = head * config.head_dim..(head + 1) * config.head_dim;
                let group = head / (config.heads / config.kv_heads);
                let shared = group * config.head_dim..(group + 1) * config.head_dim;
                let query = &queries[position][own];
                let score =
                    |key: &Vec<f64>| dot(query, &key[shared.clone()]) / (config.head_dim as f64).sqrt();
                let weights = softmax(&keys[..=position].iter().map(score).collect::<Vec<_>>());
                for channel in shared.clone() {
                    let seen = weights.iter().zip(&values);
                    attended.push(seen.map(|(weight, value)| weight * value[channel]).sum::<f64>());
                }
            }
            let out = self.linear(&at("self_attn.o_proj"), &attended);
            row.iter_mut().zip(out).for_each(|(x, out)| *x += out);
        }
    }

    /// Channel i and channel i + head_dim/2 of each head turn by position·θ^(−2i/head_dim).
    fn rotate(&self, position: usize, row: &mut [f64]) {
        let head_dim = self.config.head_dim;
        for head in row.chunks_exact_mut(head_dim) {
            for i in 0..head_dim / 2 {
                let exponent = -2.0 * i as f64 / head_dim as f64;
                let (sin, cos) = (position as f64 * self.config.rope_theta.powf(exponent)).sin_cos();
                let (a, b) = (head[i], head[i + head_dim / 2]);
                head[i] = a * cos - b * sin;
                head[i + head_dim / 2] = b * cos + a * sin;
            }
        }
    }

    /// Chooses and weighs the experts of one normed token.
    fn route(&self, layer: usize, x: &[f64]) -> Routed {
        let FeedForward::Moe { experts, top_k, router } = self.config.feed_forward else {
            panic!("a dense model routes nothing")
        };
        let logits = self.linear(&format!("model.layers.{layer}.block_sparse_moe.gate.weight"), x);
        let probabilities = softmax(&logits);
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(top_k);
        let weights: Vec<f64> = match router {
            RouterOrder::TopkThenSoftmax => {
                softmax(&order.iter().map(|&expert| logits[expert]).collect::<Vec<_>>())
            }
            RouterOrder::SoftmaxThenTopk => order.iter().map(|&expert| probabilities[expert]).collect(),
        };
        Routed { chosen: order.into_iter().zip(weights).collect(), probabilities }
    }

    /// Takes from every expert the tokens that it has no room for, and returns how many.
    fn drop_tokens(&self, experts: usize, routed: &mut [Routed]) -> f64 {
        let Some(factor) = self.factor else { return 0.0 };
        let limit = ((routed.len() as f64 / experts as f64 * factor) as usize).max(1);
        let mut dropped = 0;
        for expert in 0..experts {
            let chose = |routed: &Routed| routed.chosen.iter().any(|&(chosen, _)| chosen == expert);
            let mut tokens: Vec<usize> = (0..routed.len()).filter(|&token| chose(&routed[token])).collect();
            // A stable sort: ties stay in the order of the tokens.
            let p = |token: usize| routed[token].probabilities[expert];
            tokens.sort_by(|&a, &b| p(b).total_cmp(&p(a)));
            for token in tokens.drain(limit.min(tokens.len())..) {
                routed[token].chosen.retain(|&(chosen, _)| chosen != expert);
                dropped += 1;
            }
        }
        f64::from(dropped)
    }

    /// Adds the feed-forward network's output and returns its load-balancing loss and share of dropped choices.
    fn feed_forward(&self, layer: usize, sequences: &mut [Rows]) -> (f64, f64) {
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let swiglu = |x: &[f64], gate: &str, up: &str, down: &str| {
            let (gate, up) = (self.linear(gate, x), self.linear(up, x));
            let hidden: Vec<f64> =
                gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            self.linear(down, &hidden)
        };
        let normed = |row: &Vec<f64>| self.norm(&at("post_attention_layernorm"), row);
        let inputs: Rows = sequences.iter().flatten().map(normed).collect();
        let tokens = sequences.iter_mut().flatten().zip(&inputs);
        let FeedForward::Moe { experts, top_k, .. } = self.config.feed_forward else {
            for (row, x) in tokens {
                let out = swiglu(x, &at("mlp.gate_proj"), &at("mlp.up_proj"), &at("mlp.down_proj"));
                row.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            }
            return (0.0, 0.0);
        };
        let mut routed: Vec<Routed> = inputs.iter().map(|x| self.route(layer, x)).collect();
        let (mut counts, mut probabilities) = (vec![0.0; experts], vec![0.0; experts]);
        for routed in &routed {
            routed.chosen.iter().for_each(|&(expert, _)| counts[expert] += 1.0);
            probabilities.iter_mut().zip(&routed.probabilities).for_each(|(sum, p)| *sum += p);
        }
        let slots = (inputs.len() * top_k) as f64;
        let dropped = self.drop_tokens(experts, &mut routed) / slots;
        for ((row, x), routed) in tokens.zip(&routed) {
            for &(expert, weight) in &routed.chosen {
                let name = |part: &str| at(&format!("block_sparse_moe.experts.{expert}.{part}"));
                let out = swiglu(x, &name("w1"), &name("w3"), &name("w2"));
                row.iter_mut().zip(out).for_each(|(x, out)| *x += weight * out);
            }
            if self.config.shared_expert.is_some() {
                let name = |part: &str| at(&format!("block_sparse_moe.shared_expert.{part}"));
                let out = swiglu(x, &name("gate_proj"), &name("up_proj"), &name("down_proj"));
                let logit = self.linear(&at("block_sparse_moe.shared_expert_gate"), x)[0];
                row.iter_mut().zip(out).for_each(|(x, out)| *x += out / (1.0 + (-logit).exp()));
            }
        }
        let shares = counts.iter().zip(&probabilities);
        let dot: f64 = shares.map(|(count, p)| count / slots * (p / inputs.len() as f64)).sum();
        (experts as f64 * dot, dropped)
    }
}
