//! The CPU implementation: products by faer, everything else in portable vector code.
//!
//! One thread computes: several workers share a machine, and each is a thread of its own. Nothing allocates once
//! the buffers exist, except attention's scratch when it meets a longer sequence.

mod attention;
mod bias;
mod cross_entropy;
mod gate;
mod method;
mod norm;
mod products;
mod rotary;
mod router;
mod simd;
mod swiglu;
mod tile;

use std::convert::Infallible;
use std::ops::Range;

use ndarray::ArrayView2;
use pulp::Arch;

pub use self::method::{CpuMethod, Entries};
pub use self::router::Routing;
use super::{
    AttentionShape, ExpertWeights, Head, HeadGradient, Kernels, RmsNorm, Rotation, RouterShape,
    RouterStatistics, RowScale, RowScaleGradient, Weights, Write,
};

/// [`Kernels`] on one core of the CPU.
#[derive(Debug)]
pub struct Cpu {
    arch: Arch,
    scratch: attention::Scratch,
}

impl Cpu {
    /// Uses the widest vector instructions that the machine has.
    pub fn new() -> Self {
        Self::with_arch(Arch::new())
    }

    /// Plain scalar code, to test the vector code against; the products keep their vectors.
    pub fn scalar() -> Self {
        Self::with_arch(Arch::Scalar)
    }

    fn with_arch(arch: Arch) -> Self {
        Self { arch, scratch: attention::Scratch::default() }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Kernels for Cpu {
    type Buffer = [f32];
    type Storage = Vec<f32>;
    type Tokens = Vec<u32>;
    type Routing = Routing;
    type Error = Infallible;

    fn allocate(&mut self, len: usize) -> Result<Vec<f32>, Infallible> {
        Ok(vec![0.0; len])
    }

    fn allocate_tokens(&mut self, rows: usize) -> Result<Vec<u32>, Infallible> {
        Ok(vec![0; rows])
    }

    fn allocate_routing(&mut self, shape: RouterShape) -> Result<Routing, Infallible> {
        Ok(Routing::new(shape))
    }

    fn upload_at(&mut self, values: &[f32], buffer: &mut [f32], first: usize) {
        buffer[first..first + values.len()].copy_from_slice(values);
    }

    fn upload_tokens(&mut self, ids: ArrayView2<'_, u32>, tokens: &mut Vec<u32>) {
        assert!(ids.len() <= tokens.len(), "{} token ids for room for {}", ids.len(), tokens.len());
        tokens.iter_mut().zip(ids).for_each(|(token, &id)| *token = id);
    }

    fn download(&mut self, buffer: &[f32], values: &mut [f32]) -> Result<(), Infallible> {
        values.copy_from_slice(&buffer[..values.len()]);
        Ok(())
    }

    fn sum(&mut self, values: &[f32], len: usize) -> Result<f64, Infallible> {
        Ok(values[..len].iter().map(|&value| f64::from(value)).sum())
    }

    fn zero(&mut self, buffer: &mut [f32], range: Range<usize>) {
        buffer[range].fill(0.0);
    }

    fn add(&mut self, len: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
        let sums = a[..len].iter().zip(&b[..len]);
        out[..len].iter_mut().zip(sums).for_each(|(out, (a, b))| *out = a + b);
    }

    fn product(
        &mut self,
        params: &[f32],
        weights: Weights,
        rows: usize,
        x: &[f32],
        y: &mut [f32],
        write: Write,
    ) {
        let (x, y) = (&x[..rows * weights.inputs], &mut y[..rows * weights.outputs]);
        products::forward(weights, params, x, y, write);
    }

    fn product_input_gradient(
        &mut self,
        params: &[f32],
        weights: Weights,
        rows: usize,
        dy: &[f32],
        dx: &mut [f32],
        write: Write,
    ) {
        let (dy, dx) = (&dy[..rows * weights.outputs], &mut dx[..rows * weights.inputs]);
        products::input_gradient(weights, params, dy, dx, write);
    }

    fn product_weight_gradient(
        &mut self,
        grad: &mut [f32],
        weights: Weights,
        rows: usize,
        dy: &[f32],
        x: &[f32],
    ) {
        let (dy, x) = (&dy[..rows * weights.outputs], &x[..rows * weights.inputs]);
        products::weight_gradient(weights, grad, dy, x, Write::Replace);
    }

    fn add_bias(&mut self, params: &[f32], bias: Range<usize>, rows: usize, y: &mut [f32]) {
        let y = &mut y[..rows * bias.len()];
        self.arch.dispatch(bias::Add { bias: &params[bias], y });
    }

    fn bias_gradient(&mut self, grad: &mut [f32], bias: Range<usize>, rows: usize, dy: &[f32]) {
        let dy = &dy[..rows * bias.len()];
        self.arch.dispatch(bias::Gradient { dy, dbias: &mut grad[bias] });
    }

    fn expert_product(
        &mut self,
        params: &[f32],
        weights: ExpertWeights,
        routing: &Routing,
        x: &[f32],
        y: &mut [f32],
    ) {
        let Weights { outputs, inputs, .. } = weights.first;
        for (expert, slots) in routing.occupied() {
            let (x, y) = (&x[scaled(&slots, inputs)], &mut y[scaled(&slots, outputs)]);
            products::forward(weights.expert(expert), params, x, y, Write::Replace);
        }
    }

    fn expert_product_input_gradient(
        &mut self,
        params: &[f32],
        weights: ExpertWeights,
        routing: &Routing,
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let Weights { outputs, inputs, .. } = weights.first;
        for (expert, slots) in routing.occupied() {
            let (dy, dx) = (&dy[scaled(&slots, outputs)], &mut dx[scaled(&slots, inputs)]);
            products::input_gradient(weights.expert(expert), params, dy, dx, Write::Replace);
        }
    }

    fn expert_product_weight_gradient(
        &mut self,
        grad: &mut [f32],
        weights: ExpertWeights,
        routing: &Routing,
        dy: &[f32],
        x: &[f32],
    ) {
        let Weights { outputs, inputs, .. } = weights.first;
        for expert in 0..routing.shape.experts {
            let slots = routing.expert(expert);
            if slots.is_empty() {
                grad[weights.expert(expert).range()].fill(0.0);
            } else {
                let (dy, x) = (&dy[scaled(&slots, outputs)], &x[scaled(&slots, inputs)]);
                products::weight_gradient(weights.expert(expert), grad, dy, x, Write::Replace);
            }
        }
    }

    fn rms_norm(&mut self, norm: RmsNorm, params: &[f32], x: &[f32], y: &mut [f32], inverse_rms: &mut [f32]) {
        let RmsNorm { offset, rows, width, eps } = norm;
        self.arch.dispatch(norm::Forward {
            eps,
            weight: &params[offset..offset + width],
            x: &x[..rows * width],
            y: &mut y[..rows * width],
            inverse_rms: &mut inverse_rms[..rows],
        });
    }

    fn rms_norm_backward(
        &mut self,
        norm: RmsNorm,
        params: &[f32],
        (x, inverse_rms): (&[f32], &[f32]),
        dy: &[f32],
        dx: &mut [f32],
        grad: &mut [f32],
    ) {
        let RmsNorm { offset, rows, width, .. } = norm;
        self.arch.dispatch(norm::Backward {
            weight: &params[offset..offset + width],
            x: &x[..rows * width],
            inverse_rms: &inverse_rms[..rows],
            dy: &dy[..rows * width],
            dx: &mut dx[..rows * width],
            dweight: &mut grad[offset..offset + width],
        });
    }

    fn rotary(&mut self, shape: AttentionShape, tables: &[f32], rotation: Rotation, qkv: &mut [f32]) {
        let qkv = &mut qkv[..shape.rows() * shape.qkv_width()];
        self.arch.dispatch(rotary::Rotate { shape, rotation, first: 0, tables, qkv });
    }

    fn attention(&mut self, shape: AttentionShape, qkv: &[f32], out: &mut [f32], statistics: &mut [f32]) {
        let rows = shape.rows();
        let op = attention::Forward {
            shape,
            qkv: &qkv[..rows * shape.qkv_width()],
            out: &mut out[..rows * shape.out_width()],
            statistics: &mut statistics[..rows * shape.heads * super::ATTENTION_STATISTICS],
            scratch: &mut self.scratch,
        };
        attention::dispatch(self.arch, shape.head_dim, op);
    }

    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &[f32],
        (out, statistics): (&[f32], &[f32]),
        dout: &[f32],
        dqkv: &mut [f32],
    ) {
        let scratch = &mut self.scratch;
        let op = attention::Backward { shape, qkv, out, statistics, dout, dqkv, scratch };
        attention::dispatch(self.arch, shape.head_dim, op);
    }

    fn cached_attention(
        &mut self,
        shape: AttentionShape,
        past: usize,
        tables: &[f32],
        qkv: &mut [f32],
        cache: &mut [f32],
        out: &mut [f32],
    ) {
        assert_eq!(shape.batch, 1, "a cache holds one sequence");
        let qkv = &mut qkv[..shape.time * shape.qkv_width()];
        let rotation = Rotation::Forward;
        self.arch.dispatch(rotary::Rotate { shape, rotation, first: past, tables, qkv });
        let rows = cache[past * shape.kv_width()..].chunks_exact_mut(shape.kv_width());
        for (row, qkv) in rows.zip(qkv.chunks_exact(shape.qkv_width())) {
            row.copy_from_slice(&qkv[shape.out_width()..]);
        }
        let (out, scratch) = (&mut out[..shape.time * shape.out_width()], &mut self.scratch);
        let cache = &cache[..(past + shape.time) * shape.kv_width()];
        attention::dispatch(
            self.arch,
            shape.head_dim,
            attention::Cached { shape, past, qkv, cache, out, scratch },
        );
    }

    fn swiglu(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScale<'_, Routing, [f32]>,
        gate_up: &[f32],
        out: &mut [f32],
    ) {
        let (rows, weights) = match scale {
            RowScale::One => (rows, None),
            RowScale::Router(routing) => (routing.slots(), Some(&routing.weights[..routing.slots()])),
            RowScale::Gate(gate) => (rows, Some(&gate[..rows])),
        };
        let (gate_up, out) = (&gate_up[..rows * 2 * width], &mut out[..rows * width]);
        self.arch.dispatch(swiglu::Forward { width, weights, gate_up, out });
    }

    fn swiglu_backward(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScaleGradient<'_, Routing, [f32]>,
        dout: &[f32],
        gate_up: &mut [f32],
    ) {
        let (rows, weights) = match scale {
            RowScaleGradient::One => (rows, None),
            RowScaleGradient::Router(routing) => {
                let slots = routing.slots();
                (slots, Some((&routing.weights[..slots], &mut routing.weight_gradients[..slots])))
            }
            RowScaleGradient::Gate { gate, gradient } => (rows, Some((&gate[..rows], &mut gradient[..rows]))),
        };
        let (dout, gate_up) = (&dout[..rows * width], &mut gate_up[..rows * 2 * width]);
        self.arch.dispatch(swiglu::Backward { width, weights, dout, gate_up });
    }

    fn sigmoid(&mut self, len: usize, values: &mut [f32]) {
        self.arch.dispatch(gate::Forward(&mut values[..len]));
    }

    fn sigmoid_backward(&mut self, len: usize, sigma: &[f32], gradient: &mut [f32]) {
        self.arch.dispatch(gate::Backward { sigma: &sigma[..len], gradient: &mut gradient[..len] });
    }

    fn route(&mut self, shape: RouterShape, logits: &[f32], routing: &mut Routing) {
        routing.route(self.arch, shape, logits);
    }

    fn router_backward(&mut self, auxiliary: f32, routing: &Routing, dlogits: &mut [f32]) {
        routing.backward(auxiliary, dlogits);
    }

    fn router_statistics(
        &mut self,
        routing: &Routing,
        statistics: &mut RouterStatistics,
    ) -> Result<(), Infallible> {
        routing.statistics(statistics);
        Ok(())
    }

    fn router_entropy(&mut self, routing: &Routing) -> Result<f64, Infallible> {
        Ok(routing.entropy())
    }

    fn permute(&mut self, routing: &Routing, width: usize, x: &[f32], sorted: &mut [f32]) {
        for (row, &token) in sorted.chunks_exact_mut(width).zip(routing.tokens_of_slots()) {
            row.copy_from_slice(&x[token as usize * width..][..width]);
        }
    }

    fn unpermute(&mut self, routing: &Routing, width: usize, sorted: &[f32], out: &mut [f32]) {
        let choices = routing.slots_of_choices().chunks_exact(routing.shape.top_k);
        for (row, slots) in out.chunks_exact_mut(width).zip(choices) {
            let kept = slots.iter().map(|&slot| slot as usize).filter(|&slot| slot < routing.slots());
            let mut slots = kept.map(|slot| &sorted[slot * width..][..width]);
            match slots.next() {
                Some(slot) => row.copy_from_slice(slot),
                None => row.fill(0.0),
            }
            for slot in slots {
                row.iter_mut().zip(slot).for_each(|(sum, value)| *sum += value);
            }
        }
    }

    fn embed(&mut self, params: &[f32], table: Weights, rows: usize, tokens: &Vec<u32>, out: &mut [f32]) {
        let width = table.inputs;
        for (row, &token) in out.chunks_exact_mut(width).zip(&tokens[..rows]) {
            row.copy_from_slice(&params[table.range()][token as usize * width..][..width]);
        }
    }

    fn embed_backward(
        &mut self,
        grad: &mut [f32],
        table: Weights,
        rows: usize,
        tokens: &Vec<u32>,
        dout: &[f32],
    ) {
        let width = table.inputs;
        let grad = &mut grad[table.range()];
        for (row, &token) in dout.chunks_exact(width).zip(&tokens[..rows]) {
            let sums = &mut grad[token as usize * width..][..width];
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
    }

    fn cross_entropy(
        &mut self,
        (rows, vocab): (usize, usize),
        targets: &Vec<u32>,
        gradient_scale: Option<f32>,
        logits: &mut [f32],
        losses: &mut [f32],
    ) {
        self.arch.dispatch(cross_entropy::CrossEntropy {
            vocab,
            gradient_scale,
            targets: &targets[..rows],
            logits: &mut logits[..rows * vocab],
            losses: &mut losses[..rows],
        });
    }

    fn head_loss(
        &mut self,
        params: &[f32],
        head: Head,
        (x, targets): (&[f32], &Vec<u32>),
        logits: &mut [f32],
        losses: &mut [f32],
        mut gradient: Option<HeadGradient<'_, [f32]>>,
    ) {
        let weights @ Weights { outputs, inputs, .. } = head.weights;
        for rows in head.blocks() {
            let (x, logits) = (&x[scaled(&rows, inputs)], &mut logits[..rows.len() * outputs]);
            products::forward(weights, params, x, logits, Write::Replace);
            self.arch.dispatch(cross_entropy::CrossEntropy {
                vocab: outputs,
                gradient_scale: gradient.as_ref().map(|gradient| gradient.scale),
                targets: &targets[rows.clone()],
                logits: &mut *logits,
                losses: &mut losses[rows.clone()],
            });
            if let Some(HeadGradient { grad, dx, .. }) = &mut gradient {
                let write = if rows.start == 0 { Write::Replace } else { Write::Add };
                products::weight_gradient(weights, grad, logits, x, write);
                let dx = &mut dx[scaled(&rows, inputs)];
                products::input_gradient(weights, params, logits, dx, Write::Replace);
            }
        }
    }
}

/// The elements of a run of rows.
fn scaled(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
