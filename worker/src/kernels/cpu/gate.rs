//! The sigmoid of a gate.

use pulp::{Simd, WithSimd};

use super::simd::{load, sigmoid, store, vectors};

/// x ← σ(x).
pub(super) struct Forward<'a>(pub(super) &'a mut [f32]);

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for i in 0..vectors::<S>(self.0.len()) {
            let sigma = sigmoid(simd, load(simd, self.0, i));
            store(simd, self.0, i, sigma);
        }
    }
}

/// dx = dσ · σ·(1 − σ), in place.
pub(super) struct Backward<'a> {
    pub(super) sigma: &'a [f32],
    pub(super) gradient: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let one = simd.splat_f32s(1.0);
        for i in 0..vectors::<S>(self.sigma.len()) {
            let (sigma, gradient) = (load(simd, self.sigma, i), load(simd, self.gradient, i));
            let slope = simd.mul_f32s(sigma, simd.sub_f32s(one, sigma));
            store(simd, self.gradient, i, simd.mul_f32s(gradient, slope));
        }
    }
}
