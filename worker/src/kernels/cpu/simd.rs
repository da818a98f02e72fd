//! Vector helpers: the exponential, and walking a row in vectors.
//!
//! Vector code is generic over [`pulp::Simd`] and chosen at run time ([`pulp::Arch`]), so that one portable binary
//! uses AVX-512, AVX2 or plain scalar code, and none of it is `unsafe` here. Fused multiply-add is welcome: nothing
//! in the model has to agree between machines bit for bit.

use pulp::Simd;

/// Below this [`exp`] is zero; ln of the smallest normal number is a little lower.
const EXP_MIN: f32 = -87.33;
/// Above this [`exp`] saturates at 2.4e38: 2¹²⁷·eʳ would no longer fit the exponent.
const EXP_MAX: f32 = 88.37;
/// Adding 1.5·2²³ leaves the nearest integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// eˣ to within 2 units in the last place, zero below −87.33, at most 2.4e38.
///
/// The operands of min and max stand so that x86 vector units hand a NaN on.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and eʳ = 1 + r + r²·q(r) with q of degree 4 fitted for the least relative
/// error (3e-9, far below rounding).
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let clamped = simd.max_f32s(splat(EXP_MIN), simd.min_f32s(splat(EXP_MAX), x));
    let shifted = simd.mul_add_e_f32s(clamped, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    // ln 2 in two pieces, the first with trailing zeros, so that n·ln 2 loses nothing.
    let r = simd.mul_add_e_f32s(n, splat(-0.693_359_4), clamped);
    let r = simd.mul_add_e_f32s(n, splat(2.121_944_4e-4), r);
    let mut q = splat(0.001_381_454);
    for coefficient in [0.008_368_745, 0.041_668_39, 0.166_665_21, 0.499_999_94] {
        q = simd.mul_add_e_f32s(q, r, splat(coefficient));
    }
    let power = simd.mul_add_e_f32s(simd.mul_f32s(q, r), r, simd.add_f32s(r, splat(1.0)));
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let scaled = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(power), exponent));
    simd.select_f32s(simd.less_than_f32s(x, splat(EXP_MIN)), splat(0.0), scaled)
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
}

/// The `index`th vector of a row; past the row's end the lanes are zero.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, row: &[f32], index: usize) -> S::f32s {
    let start = index * S::F32_LANES;
    match row.get(start..start + S::F32_LANES) {
        Some(full) => S::as_simd_f32s(full).0[0],
        None => simd.partial_load_f32s(&row[start..]),
    }
}

/// Stores the `index`th vector of a row, leaving out lanes past the row's end.
#[inline(always)]
pub(super) fn store<S: Simd>(simd: S, row: &mut [f32], index: usize, value: S::f32s) {
    let start = index * S::F32_LANES;
    match row.get_mut(start..start + S::F32_LANES) {
        Some(full) => S::as_mut_simd_f32s(full).0[0] = value,
        None => simd.partial_store_f32s(&mut row[start..], value),
    }
}

/// Vectors that cover a row of `len` elements.
#[inline(always)]
pub(super) fn vectors<S: Simd>(len: usize) -> usize {
    len.div_ceil(S::F32_LANES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, Scalar, WithSimd};

    struct Map<'a>(&'a mut [f32]);

    impl WithSimd for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for index in 0..vectors::<S>(self.0.len()) {
                let x = load(simd, self.0, index);
                store(simd, self.0, index, exp(simd, x));
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let inputs: Vec<f32> = (-87_300..=88_360).map(|i| i as f32 * 1e-3 + 1.7e-5).collect();
        let (mut vector, mut scalar) = (inputs.clone(), inputs.clone());
        Arch::new().dispatch(Map(&mut vector));
        Map(&mut scalar).with_simd(Scalar);
        for outputs in [&vector, &scalar] {
            let mut worst = 0.0f64;
            for (&x, &y) in inputs.iter().zip(outputs) {
                let exact = f64::from(x).exp();
                let unit = f64::from((exact as f32).next_up() - exact as f32);
                worst = worst.max((f64::from(y) - exact).abs() / unit);
            }
            assert!(worst < 2.0, "{worst} units");
        }
    }

    #[test]
    fn exp_saturates_and_vanishes() {
        let mut values =
            [f32::MIN, -87.34, -200.0, 0.0, 1.0, 89.0, f32::MAX, f32::NEG_INFINITY, f32::INFINITY];
        Arch::new().dispatch(Map(&mut values));
        assert_eq!(values[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!((values[4] - std::f32::consts::E).abs() < 3e-7, "{}", values[4]);
        assert!(values[5].is_finite() && values[5] > 2e38, "{}", values[5]);
        assert_eq!((values[6], values[7], values[8]), (values[5], 0.0, values[5]));
    }
}
