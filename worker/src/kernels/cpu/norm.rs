//! RMSNorm, row by row.

use pulp::{Simd, WithSimd};

use super::simd::{load, store, vectors};

/// y = w ⊙ x·r with r = 1/√(mean(x²) + ε).
pub(super) struct Forward<'a> {
    pub(super) eps: f32,
    pub(super) weight: &'a [f32],          // (width)
    pub(super) x: &'a [f32],               // (rows, width)
    pub(super) y: &'a mut [f32],           // (rows, width)
    pub(super) inverse_rms: &'a mut [f32], // (rows)
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width));
        for ((x, y), inverse_rms) in rows.zip(self.inverse_rms) {
            let mut squares = [simd.splat_f32s(0.0); 2];
            for i in 0..vectors::<S>(width) {
                let value = load(simd, x, i);
                squares[i % 2] = simd.mul_add_e_f32s(value, value, squares[i % 2]);
            }
            let mean = simd.reduce_sum_f32s(simd.add_f32s(squares[0], squares[1])) / width as f32;
            *inverse_rms = 1.0 / (mean + self.eps).sqrt();
            let scale = simd.splat_f32s(*inverse_rms);
            for i in 0..vectors::<S>(width) {
                let weighted = simd.mul_f32s(load(simd, x, i), load(simd, self.weight, i));
                store(simd, y, i, simd.mul_f32s(weighted, scale));
            }
        }
    }
}

/// dx += r·(w⊙dy − x̂·mean(w⊙dy⊙x̂)) with x̂ = x·r; dw = Σ dy⊙x̂.
pub(super) struct Backward<'a> {
    pub(super) weight: &'a [f32],      // (width)
    pub(super) x: &'a [f32],           // (rows, width)
    pub(super) inverse_rms: &'a [f32], // (rows)
    pub(super) dy: &'a [f32],          // (rows, width)
    pub(super) dx: &'a mut [f32],      // (rows, width)
    pub(super) dweight: &'a mut [f32], // (width)
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        self.dweight.fill(0.0);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for (((x, dy), dx), &inverse_rms) in rows.zip(self.dx.chunks_exact_mut(width)).zip(self.inverse_rms) {
            let scale = simd.splat_f32s(inverse_rms);
            let mut dots = [simd.splat_f32s(0.0); 2];
            for i in 0..vectors::<S>(width) {
                // dy⊙x, then ·r for the weight and ·w for the projection.
                let product = simd.mul_f32s(load(simd, dy, i), load(simd, x, i));
                let dweight = simd.mul_add_e_f32s(product, scale, load(simd, self.dweight, i));
                store(simd, self.dweight, i, dweight);
                dots[i % 2] = simd.mul_add_e_f32s(product, load(simd, self.weight, i), dots[i % 2]);
            }
            let dot = simd.reduce_sum_f32s(simd.add_f32s(dots[0], dots[1]));
            // r·x̂·mean(w⊙dy⊙x̂) = x·(r³·dot/width)
            let along = simd.splat_f32s(-dot * inverse_rms * inverse_rms * inverse_rms / width as f32);
            for i in 0..vectors::<S>(width) {
                let weighted = simd.mul_f32s(load(simd, dy, i), load(simd, self.weight, i));
                let sum = simd.mul_add_e_f32s(weighted, scale, load(simd, dx, i));
                store(simd, dx, i, simd.mul_add_e_f32s(load(simd, x, i), along, sum));
            }
        }
    }
}
