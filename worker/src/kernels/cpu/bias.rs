//! Biases: one vector added to every row, and its gradient.

use pulp::{Simd, WithSimd};

use super::simd::{load, store, vectors};

/// y += bias, row by row.
pub(super) struct Add<'a> {
    pub(super) bias: &'a [f32],  // (width)
    pub(super) y: &'a mut [f32], // (rows, width)
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.y.chunks_exact_mut(self.bias.len()) {
            add(simd, self.bias, row);
        }
    }
}

/// d bias = Σ dy over the rows.
pub(super) struct Gradient<'a> {
    pub(super) dy: &'a [f32],        // (rows, width)
    pub(super) dbias: &'a mut [f32], // (width)
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.dbias.fill(0.0);
        for row in self.dy.chunks_exact(self.dbias.len()) {
            add(simd, row, self.dbias);
        }
    }
}

/// sums += values.
#[inline(always)]
fn add<S: Simd>(simd: S, values: &[f32], sums: &mut [f32]) {
    for i in 0..vectors::<S>(sums.len()) {
        store(simd, sums, i, simd.add_f32s(load(simd, sums, i), load(simd, values, i)));
    }
}
