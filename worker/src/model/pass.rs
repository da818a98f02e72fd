//! The forward and the backward pass, one layer after the other.

use sanderling_common::model_config::ModelConfig;

use super::cache::Cache;
use super::plan::{FeedForwardPlan, LayerPlan, Plan, SharedExpertPlan};
use super::workspace::{Activations, Gradients, LayerActivations, SharedExpertActivations};
use crate::kernels::{
    AttentionShape, Head, HeadGradient, Kernels, RmsNorm, Rotation, RouterShape, RowScale, RowScaleGradient,
    Weights, Write,
};

/// What both passes over one batch need.
pub(super) struct Pass<'a, K: Kernels> {
    pub(super) config: &'a ModelConfig,
    pub(super) plan: &'a Plan,
    pub(super) kernels: &'a mut K,
    /// Cosines and sines, see [`Kernels::rotary`].
    pub(super) rope: &'a K::Buffer,
    pub(super) shape: AttentionShape,
    /// The most tokens that an expert takes.
    pub(super) capacity: Option<usize>,
    /// Tokens whose logits may exist at a time.
    pub(super) head_rows: usize,
}

impl<K: Kernels> Pass<'_, K> {
    fn rows(&self) -> usize {
        self.shape.rows()
    }

    fn norm(&self, offset: usize) -> RmsNorm {
        let (rows, width) = (self.rows(), self.config.hidden_size);
        RmsNorm { offset, rows, width, eps: self.config.rms_norm_eps }
    }

    /// From `activations.inputs` to `activations.logits`.
    pub(super) fn forward(&mut self, params: &K::Buffer, activations: &mut Activations<K>) {
        let (plan, rows) = (self.plan, self.rows());
        self.layers(params, activations, None);
        self.final_norm(params, activations);
        let (normed, logits) = (&activations.normed, &mut activations.logits);
        self.kernels.product(params, plan.head, rows, normed, logits, Write::Replace);
    }

    /// From `activations.inputs` to `activations.losses`, and to the gradient of the head and of its input.
    pub(super) fn forward_loss(
        &mut self,
        params: &K::Buffer,
        activations: &mut Activations<K>,
        gradient: Option<HeadGradient<'_, K::Buffer>>,
    ) {
        self.layers(params, activations, None);
        self.final_norm(params, activations);
        let rows = self.rows();
        let head = Head { weights: self.plan.head, rows, block_rows: self.head_rows.min(rows) };
        let inputs: (&K::Buffer, _) = (&activations.normed, &activations.targets);
        let (logits, losses) = (&mut activations.logits, &mut activations.losses);
        self.kernels.head_loss(params, head, inputs, logits, losses, gradient);
    }

    /// From the residual stream after the last layer to what the head takes.
    fn final_norm(&mut self, params: &K::Buffer, activations: &mut Activations<K>) {
        self.kernels.rms_norm(
            self.norm(self.plan.final_norm),
            params,
            &activations.residual,
            &mut activations.normed,
            &mut activations.inverse_rms,
        );
    }

    /// Appends `activations.inputs` to a sequence.
    pub(super) fn extend(
        &mut self,
        params: &K::Buffer,
        activations: &mut Activations<K>,
        cache: &mut Cache<K>,
    ) {
        self.layers(params, activations, Some(cache));
        cache.len += self.shape.time;
    }

    /// From `activations.inputs` to the residual stream after the last layer, which [`logits_of`](Self::logits_of) reads.
    pub(super) fn forward_layers(&mut self, params: &K::Buffer, activations: &mut Activations<K>) {
        self.layers(params, activations, None);
    }

    /// The logits of some rows, in the first rows of `activations.logits`, after the layers. At most as many as the pass
    /// has rows.
    ///
    /// Rows are looked up as tokens' embeddings would be, their numbers in place of tokens.
    pub(super) fn logits_of(&mut self, params: &K::Buffer, activations: &mut Activations<K>, wanted: &[u32]) {
        let (plan, rows, count) = (self.plan, self.rows(), wanted.len());
        let Activations { layers, residual, normed, inverse_rms, logits, targets, .. } = activations;
        // What the first layer took is needed no more.
        let found = &mut layers[0].attention_input;
        let numbers = ndarray::ArrayView2::from_shape((1, count), wanted).expect("one row of all numbers");
        self.kernels.upload_tokens(numbers, targets);
        let table = Weights { offset: 0, outputs: rows, inputs: self.config.hidden_size };
        self.kernels.embed(residual, table, count, targets, found);
        let norm = RmsNorm { rows: count, ..self.norm(plan.final_norm) };
        self.kernels.rms_norm(norm, params, found, normed, inverse_rms);
        self.kernels.product(params, plan.head, count, normed, logits, Write::Replace);
    }

    /// From `activations.inputs` to the residual stream after the last layer; with a cache, of tokens that follow it.
    fn layers(
        &mut self,
        params: &K::Buffer,
        activations: &mut Activations<K>,
        mut cache: Option<&mut Cache<K>>,
    ) {
        let (plan, rows) = (self.plan, self.rows());
        let Activations { layers, residual, delta, expert_outputs, .. } = activations;
        self.kernels.embed(params, plan.embedding, rows, &activations.inputs, &mut layers[0].attention_input);
        for (number, layer_plan) in plan.layers.iter().enumerate() {
            let (before, after) = layers.split_at_mut(number + 1);
            let layer = &mut before[number];
            let past = cache.as_mut().map(|cache| (cache.len, &mut cache.layers[number]));
            self.attention(layer_plan, params, layer, delta, past);
            self.feed_forward(&layer_plan.feed_forward, params, layer, (delta, expert_outputs));
            let next = after.first_mut().map_or(&mut *residual, |next| &mut next.attention_input);
            self.kernels.add(rows * self.config.hidden_size, &layer.feed_forward_input, delta, next);
        }
    }

    /// From a layer's input through attention to its normed feed-forward input. `past` is the number of tokens in a
    /// cache and this layer's part of it.
    fn attention(
        &mut self,
        plan: &LayerPlan,
        params: &K::Buffer,
        layer: &mut LayerActivations<K>,
        delta: &mut K::Storage,
        past: Option<(usize, &mut K::Storage)>,
    ) {
        let (shape, rows) = (self.shape, self.rows());
        let (attention_norm, feed_forward_norm) =
            (self.norm(plan.attention_norm), self.norm(plan.feed_forward_norm));
        let kernels = &mut *self.kernels;
        kernels.rms_norm(
            attention_norm,
            params,
            &layer.attention_input,
            &mut layer.attention_normed,
            &mut layer.attention_inverse_rms,
        );
        kernels.product(params, plan.qkv, rows, &layer.attention_normed, &mut layer.qkv, Write::Replace);
        if let Some(bias) = &plan.qkv_bias {
            kernels.add_bias(params, bias.clone(), rows, &mut layer.qkv);
        }
        if let Some((past, cache)) = past {
            kernels.cached_attention(shape, past, self.rope, &mut layer.qkv, cache, &mut layer.attended);
        } else {
            kernels.rotary(shape, self.rope, Rotation::Forward, &mut layer.qkv);
            kernels.attention(shape, &layer.qkv, &mut layer.attended, &mut layer.statistics);
        }
        kernels.product(params, plan.attention_out, rows, &layer.attended, delta, Write::Replace);
        kernels.add_rms_norm(
            feed_forward_norm,
            params,
            (&layer.attention_input, delta),
            &mut layer.feed_forward_input,
            &mut layer.feed_forward_normed,
            &mut layer.feed_forward_inverse_rms,
        );
    }

    /// What the feed-forward network adds to the residual stream, to `delta`.
    fn feed_forward(
        &mut self,
        plan: &FeedForwardPlan,
        params: &K::Buffer,
        layer: &mut LayerActivations<K>,
        (delta, expert_outputs): (&mut K::Storage, &mut K::Storage),
    ) {
        let (rows, d, f) = (self.rows(), self.config.hidden_size, self.config.intermediate_size);
        let capacity = self.capacity;
        let LayerActivations { feed_forward_normed: normed, gate_up, hidden, moe, .. } = layer;
        let kernels = &mut *self.kernels;
        match (plan, moe) {
            (&FeedForwardPlan::Dense { gate_up: gate_up_weights, down }, _) => {
                kernels.product(params, gate_up_weights, rows, normed, gate_up, Write::Replace);
                kernels.swiglu(rows, f, RowScale::One, gate_up, hidden);
                kernels.product(params, down, rows, hidden, delta, Write::Replace);
            }
            (
                &FeedForwardPlan::Moe { router, top_k, order, gate_up: gate_up_weights, down, shared },
                Some(moe),
            ) => {
                kernels.product(params, router, rows, normed, &mut moe.logits, Write::Replace);
                let shape = RouterShape { rows, experts: router.outputs, top_k, order, capacity };
                kernels.route(shape, &moe.logits, &mut moe.routing);
                kernels.permute(&moe.routing, d, normed, &mut moe.sorted);
                kernels.expert_product(params, gate_up_weights, &moe.routing, &moe.sorted, gate_up);
                kernels.swiglu(rows * top_k, f, RowScale::Router(&moe.routing), gate_up, hidden);
                kernels.expert_product(params, down, &moe.routing, hidden, expert_outputs);
                kernels.unpermute(&moe.routing, d, expert_outputs, delta);
                if let (Some(plan), Some(shared)) = (shared, &mut moe.shared) {
                    self.shared_expert(plan, params, normed, shared, delta);
                }
            }
            _ => unreachable!("a mixture-of-experts plan comes with room for its routing"),
        }
    }

    /// Adds to `delta` what the shared expert makes of the normed rows: σ(gate·x) · down(SiLU(gate x) ⊙ up x).
    fn shared_expert(
        &mut self,
        plan: SharedExpertPlan,
        params: &K::Buffer,
        normed: &K::Buffer,
        shared: &mut SharedExpertActivations<K>,
        delta: &mut K::Buffer,
    ) {
        let (rows, width) = (self.rows(), plan.down.inputs);
        let SharedExpertActivations { gate, gate_up, hidden } = shared;
        let kernels = &mut *self.kernels;
        kernels.product(params, plan.gate, rows, normed, gate, Write::Replace);
        kernels.sigmoid(rows, gate);
        kernels.product(params, plan.gate_up, rows, normed, gate_up, Write::Replace);
        kernels.swiglu(rows, width, RowScale::Gate(gate), gate_up, hidden);
        kernels.product(params, plan.down, rows, hidden, delta, Write::Add);
    }

    /// From the gradient of what the head takes, in `gradients.normed`, to that of every parameter but the head's.
    ///
    /// `auxiliary` is the coefficient of one layer's load-balancing loss. `activations` is used up.
    pub(super) fn backward(
        &mut self,
        params: &K::Buffer,
        activations: &mut Activations<K>,
        gradients: &mut Gradients<K>,
        auxiliary: f32,
        grad: &mut K::Buffer,
    ) {
        let (plan, rows) = (self.plan, self.rows());
        let final_norm = self.norm(plan.final_norm);
        self.kernels.zero(&mut gradients.residual, 0..rows * self.config.hidden_size);
        self.kernels.rms_norm_backward(
            final_norm,
            params,
            (&activations.residual, &activations.inverse_rms),
            &gradients.normed,
            &mut gradients.residual,
            grad,
        );
        for (layer_plan, layer) in plan.layers.iter().zip(&mut activations.layers).rev() {
            self.feed_forward_backward(&layer_plan.feed_forward, params, layer, gradients, auxiliary, grad);
            self.kernels.rms_norm_backward(
                self.norm(layer_plan.feed_forward_norm),
                params,
                (&layer.feed_forward_input, &layer.feed_forward_inverse_rms),
                &gradients.normed,
                &mut gradients.residual,
                grad,
            );
            self.attention_backward(layer_plan, params, layer, gradients, grad);
        }
        if plan.head != plan.embedding {
            self.kernels.zero(grad, plan.embedding.range());
        }
        self.kernels.embed_backward(grad, plan.embedding, rows, &activations.inputs, &gradients.residual);
    }

    /// From the residual stream's gradient to that of the feed-forward network's normed input.
    fn feed_forward_backward(
        &mut self,
        plan: &FeedForwardPlan,
        params: &K::Buffer,
        layer: &mut LayerActivations<K>,
        gradients: &mut Gradients<K>,
        auxiliary: f32,
        grad: &mut K::Buffer,
    ) {
        let (rows, d, f) = (self.rows(), self.config.hidden_size, self.config.intermediate_size);
        let LayerActivations { feed_forward_normed: normed, gate_up, hidden, moe, .. } = layer;
        let kernels = &mut *self.kernels;
        match (plan, moe) {
            (&FeedForwardPlan::Dense { gate_up: gate_up_weights, down }, _) => {
                let dout = &gradients.residual;
                kernels.product_weight_gradient(grad, down, rows, dout, hidden);
                kernels.product_input_gradient(
                    params,
                    down,
                    rows,
                    dout,
                    &mut gradients.hidden,
                    Write::Replace,
                );
                kernels.swiglu_backward(rows, f, RowScaleGradient::One, &gradients.hidden, gate_up);
                kernels.product_weight_gradient(grad, gate_up_weights, rows, gate_up, normed);
                let dnormed = &mut gradients.normed;
                kernels.product_input_gradient(
                    params,
                    gate_up_weights,
                    rows,
                    gate_up,
                    dnormed,
                    Write::Replace,
                );
            }
            (
                &FeedForwardPlan::Moe { router, top_k, gate_up: gate_up_weights, down, shared, .. },
                Some(moe),
            ) => {
                let routing = &mut moe.routing;
                kernels.permute(routing, d, &gradients.residual, &mut gradients.sorted);
                kernels.expert_product_weight_gradient(grad, down, routing, &gradients.sorted, hidden);
                let dhidden = &mut gradients.hidden;
                kernels.expert_product_input_gradient(params, down, routing, &gradients.sorted, dhidden);
                kernels.swiglu_backward(rows * top_k, f, RowScaleGradient::Router(routing), dhidden, gate_up);
                kernels.expert_product_weight_gradient(grad, gate_up_weights, routing, gate_up, &moe.sorted);
                let dsorted = &mut gradients.sorted;
                kernels.expert_product_input_gradient(params, gate_up_weights, routing, gate_up, dsorted);
                kernels.unpermute(routing, d, dsorted, &mut gradients.normed);
                kernels.router_backward(auxiliary, routing, &mut gradients.router_logits);
                let dlogits = &gradients.router_logits;
                kernels.product_weight_gradient(grad, router, rows, dlogits, normed);
                let dnormed = &mut gradients.normed;
                kernels.product_input_gradient(params, router, rows, dlogits, dnormed, Write::Add);
                if let (Some(plan), Some(shared)) = (shared, &mut moe.shared) {
                    self.shared_expert_backward(plan, params, normed, shared, gradients, grad);
                }
            }
            _ => unreachable!("a mixture-of-experts plan comes with room for its routing"),
        }
    }

    /// Adds to the normed input's gradient what comes back through the shared expert.
    fn shared_expert_backward(
        &mut self,
        plan: SharedExpertPlan,
        params: &K::Buffer,
        normed: &K::Buffer,
        shared: &mut SharedExpertActivations<K>,
        gradients: &mut Gradients<K>,
        grad: &mut K::Buffer,
    ) {
        let (rows, width) = (self.rows(), plan.down.inputs);
        let SharedExpertActivations { gate, gate_up, hidden } = shared;
        let Gradients { residual: dout, normed: dnormed, shared_gate: dgate, shared_hidden: dhidden, .. } =
            gradients;
        let kernels = &mut *self.kernels;
        kernels.product_weight_gradient(grad, plan.down, rows, dout, hidden);
        kernels.product_input_gradient(params, plan.down, rows, dout, dhidden, Write::Replace);
        let scale: RowScaleGradient<'_, K::Routing, K::Buffer> =
            RowScaleGradient::Gate { gate, gradient: dgate };
        kernels.swiglu_backward(rows, width, scale, dhidden, gate_up);
        kernels.product_weight_gradient(grad, plan.gate_up, rows, gate_up, normed);
        kernels.product_input_gradient(params, plan.gate_up, rows, gate_up, dnormed, Write::Add);
        kernels.sigmoid_backward(rows, gate, dgate);
        kernels.product_weight_gradient(grad, plan.gate, rows, dgate, normed);
        kernels.product_input_gradient(params, plan.gate, rows, dgate, dnormed, Write::Add);
    }

    /// Adds to the residual stream's gradient what comes back through attention.
    fn attention_backward(
        &mut self,
        plan: &LayerPlan,
        params: &K::Buffer,
        layer: &LayerActivations<K>,
        gradients: &mut Gradients<K>,
        grad: &mut K::Buffer,
    ) {
        let (shape, rows) = (self.shape, self.rows());
        let norm = self.norm(plan.attention_norm);
        let Gradients { residual, normed, attended, qkv, .. } = gradients;
        let kernels = &mut *self.kernels;
        kernels.product_weight_gradient(grad, plan.attention_out, rows, residual, &layer.attended);
        kernels.product_input_gradient(params, plan.attention_out, rows, residual, attended, Write::Replace);
        let saved: (&K::Buffer, &K::Buffer) = (&layer.attended, &layer.statistics);
        kernels.attention_backward(shape, &layer.qkv, saved, attended, qkv);
        kernels.rotary(shape, self.rope, Rotation::Inverse, qkv);
        if let Some(bias) = &plan.qkv_bias {
            kernels.bias_gradient(grad, bias.clone(), rows, qkv);
        }
        kernels.product_weight_gradient(grad, plan.qkv, rows, qkv, &layer.attention_normed);
        kernels.product_input_gradient(params, plan.qkv, rows, qkv, normed, Write::Replace);
        let saved: (&K::Buffer, &K::Buffer) = (&layer.attention_input, &layer.attention_inverse_rms);
        kernels.rms_norm_backward(norm, params, saved, normed, residual, grad);
    }
}
