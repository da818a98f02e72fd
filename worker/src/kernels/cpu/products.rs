//! Dense matrix products, by faer.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::kernels::{Weights, Write};

/// y (rows, outputs) = x (rows, inputs) · Wᵀ, or added to y.
pub(super) fn forward(weights: Weights, params: &[f32], x: &[f32], y: &mut [f32], write: Write) {
    let Weights { outputs, inputs, .. } = weights;
    let rows = y.len() / outputs;
    let y = MatMut::from_row_major_slice_mut(y, rows, outputs);
    let x = MatRef::from_row_major_slice(x, rows, inputs);
    let w = MatRef::from_row_major_slice(&params[weights.range()], outputs, inputs);
    matmul(y, accumulation(write), x, w.transpose(), 1.0, Par::Seq);
}

/// dx (rows, inputs) = dy (rows, outputs) · W, or added to dx.
pub(super) fn input_gradient(weights: Weights, params: &[f32], dy: &[f32], dx: &mut [f32], write: Write) {
    let Weights { outputs, inputs, .. } = weights;
    let rows = dx.len() / inputs;
    let dx = MatMut::from_row_major_slice_mut(dx, rows, inputs);
    let dy = MatRef::from_row_major_slice(dy, rows, outputs);
    let w = MatRef::from_row_major_slice(&params[weights.range()], outputs, inputs);
    matmul(dx, accumulation(write), dy, w, 1.0, Par::Seq);
}

fn accumulation(write: Write) -> Accum {
    match write {
        Write::Replace => Accum::Replace,
        Write::Add => Accum::Add,
    }
}

/// dW (outputs, inputs) = dyᵀ · x at the weights' place in `grad`, or added to it; zero without rows.
pub(super) fn weight_gradient(weights: Weights, grad: &mut [f32], dy: &[f32], x: &[f32], write: Write) {
    let Weights { outputs, inputs, .. } = weights;
    let rows = x.len() / inputs;
    let dw = MatMut::from_row_major_slice_mut(&mut grad[weights.range()], outputs, inputs);
    let dy = MatRef::from_row_major_slice(dy, rows, outputs);
    let x = MatRef::from_row_major_slice(x, rows, inputs);
    matmul(dw, accumulation(write), dy.transpose(), x, 1.0, Par::Seq);
}
