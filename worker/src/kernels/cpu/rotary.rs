//! Rotary position embedding in the rotate-half form.

use pulp::{Simd, WithSimd};

use super::simd::{load, store, vectors};
use crate::kernels::{AttentionShape, Rotation};

/// (a, b) ← (a·cos − b·sin, b·cos + a·sin) for channels a = i and b = i + head_dim/2 of every query and key head.
pub(super) struct Rotate<'a> {
    pub(super) shape: AttentionShape,
    pub(super) rotation: Rotation,
    /// The position of each sequence's first token.
    pub(super) first: usize,
    pub(super) tables: &'a [f32],  // (positions, cosines then sines, head_dim/2)
    pub(super) qkv: &'a mut [f32], // (batch, time, qkv_width)
}

impl WithSimd for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let head_dim = self.shape.head_dim;
        let half = head_dim / 2;
        let rotated = (self.shape.heads + self.shape.kv_heads) * head_dim;
        let sign = simd.splat_f32s(if self.rotation == Rotation::Forward { 1.0 } else { -1.0 });
        for (row, qkv) in self.qkv.chunks_exact_mut(self.shape.qkv_width()).enumerate() {
            let position = self.first + row % self.shape.time;
            let (cos, sin) = self.tables[position * head_dim..][..head_dim].split_at(half);
            for head in qkv[..rotated].chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..vectors::<S>(half) {
                    let (a, b) = (load(simd, first, i), load(simd, second, i));
                    let (cos, sin) = (load(simd, cos, i), simd.mul_f32s(sign, load(simd, sin, i)));
                    let a_cos = simd.mul_f32s(a, cos);
                    store(simd, first, i, simd.negate_mul_add_e_f32s(b, sin, a_cos));
                    store(simd, second, i, simd.mul_add_e_f32s(a, sin, simd.mul_f32s(b, cos)));
                }
            }
        }
    }
}
