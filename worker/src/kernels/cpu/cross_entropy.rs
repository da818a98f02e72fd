//! Softmax cross-entropy over the vocabulary, forward and backward in one pass over each row.

use pulp::{Simd, WithSimd};

use super::simd::{exp, load, store, vectors};

/// losses = −ln softmax(logits)[target]; with a scale, logits ← scale·(softmax − one-hot).
pub(super) struct CrossEntropy<'a> {
    pub(super) vocab: usize,
    pub(super) gradient_scale: Option<f32>,
    pub(super) targets: &'a [u32],    // (rows)
    pub(super) logits: &'a mut [f32], // (rows, vocab)
    pub(super) losses: &'a mut [f32], // (rows)
}

impl WithSimd for CrossEntropy<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.logits.chunks_exact_mut(self.vocab).zip(self.targets);
        for ((logits, &target), loss) in rows.zip(self.losses) {
            let target = target as usize;
            let target_logit = logits[target];
            let max = row_max(simd, logits);
            let shift = simd.splat_f32s(max);
            let mut sums = simd.splat_f32s(0.0);
            for i in 0..self.vocab / S::F32_LANES {
                let e = exp(simd, simd.sub_f32s(load(simd, logits, i), shift));
                sums = simd.add_f32s(sums, e);
                if self.gradient_scale.is_some() {
                    store(simd, logits, i, e);
                }
            }
            let mut sum = simd.reduce_sum_f32s(sums);
            // The tail's spare lanes must not count, so it goes through a vector of its own.
            let tail = &mut logits[self.vocab / S::F32_LANES * S::F32_LANES..];
            if !tail.is_empty() {
                let e = exp(simd, simd.sub_f32s(load(simd, tail, 0), shift));
                let mut lanes = [0.0; 16];
                let lanes = &mut lanes[..tail.len()];
                store(simd, lanes, 0, e);
                sum += lanes.iter().sum::<f32>();
                if self.gradient_scale.is_some() {
                    tail.copy_from_slice(lanes);
                }
            }
            *loss = sum.ln() + (max - target_logit);
            if let Some(scale) = self.gradient_scale {
                let factor = simd.splat_f32s(scale / sum);
                for i in 0..vectors::<S>(self.vocab) {
                    store(simd, logits, i, simd.mul_f32s(load(simd, logits, i), factor));
                }
                logits[target] -= scale;
            }
        }
    }
}

/// The largest element of a row.
#[inline(always)]
fn row_max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, tail) = S::as_simd_f32s(row);
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for &vector in vectors {
        max = simd.max_f32s(max, vector);
    }
    tail.iter().fold(simd.reduce_max_f32s(max), |max, &value| max.max(value))
}
