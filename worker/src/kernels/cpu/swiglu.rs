//! SwiGLU: SiLU(gate) ⊙ up, optionally scaled per row by the router's weight or a gate.

use pulp::{Simd, WithSimd};

use super::simd::{load, sigmoid, store, vectors};

/// out = weight · gate·σ(gate) ⊙ up.
pub(super) struct Forward<'a> {
    pub(super) width: usize,
    pub(super) weights: Option<&'a [f32]>, // (rows)
    pub(super) gate_up: &'a [f32],         // (rows, 2·width)
    pub(super) out: &'a mut [f32],         // (rows, width)
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.gate_up.chunks_exact(2 * self.width).zip(self.out.chunks_exact_mut(self.width));
        for (row, (gate_up, out)) in rows.enumerate() {
            let (gate, up) = gate_up.split_at(self.width);
            let weight = simd.splat_f32s(self.weights.map_or(1.0, |weights| weights[row]));
            for i in 0..vectors::<S>(self.width) {
                let (gate, up) = (load(simd, gate, i), load(simd, up, i));
                let silu = simd.mul_f32s(gate, sigmoid(simd, gate));
                store(simd, out, i, simd.mul_f32s(simd.mul_f32s(silu, up), weight));
            }
        }
    }
}

/// d gate = weight·dout ⊙ up ⊙ σ(gate)·(1 + gate·(1 − σ(gate))), d up = weight·dout ⊙ SiLU(gate), in place, and
/// d weight = Σ dout ⊙ SiLU(gate) ⊙ up.
pub(super) struct Backward<'a> {
    pub(super) width: usize,
    pub(super) weights: Option<(&'a [f32], &'a mut [f32])>, // (rows) and its gradient
    pub(super) dout: &'a [f32],                             // (rows, width)
    pub(super) gate_up: &'a mut [f32],                      // (rows, 2·width)
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let one = simd.splat_f32s(1.0);
        let rows = self.gate_up.chunks_exact_mut(2 * self.width).zip(self.dout.chunks_exact(self.width));
        for (row, (gate_up, dout)) in rows.enumerate() {
            let (gates, ups) = gate_up.split_at_mut(self.width);
            let weight = simd.splat_f32s(self.weights.as_ref().map_or(1.0, |(weights, _)| weights[row]));
            let mut dweight = simd.splat_f32s(0.0);
            for i in 0..vectors::<S>(self.width) {
                let (gate, up, dout) = (load(simd, gates, i), load(simd, ups, i), load(simd, dout, i));
                let sigma = sigmoid(simd, gate);
                let silu = simd.mul_f32s(gate, sigma);
                let dout_up = simd.mul_f32s(dout, up);
                dweight = simd.mul_add_e_f32s(dout_up, silu, dweight);
                // σ·(1 + gate·(1 − σ)) = σ + silu·(1 − σ)
                let slope = simd.mul_add_e_f32s(silu, simd.sub_f32s(one, sigma), sigma);
                store(simd, gates, i, simd.mul_f32s(weight, simd.mul_f32s(dout_up, slope)));
                store(simd, ups, i, simd.mul_f32s(weight, simd.mul_f32s(dout, silu)));
            }
            if let Some((_, dweights)) = &mut self.weights {
                dweights[row] = simd.reduce_sum_f32s(dweight);
            }
        }
    }
}
