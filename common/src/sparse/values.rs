//! Values as bytes: float32, bfloat16, 8-bit multiples of a scale, or signs of one magnitude.

use crate::sparse::ValueFormat;

/// A value of 12 582 912 + x has x, rounded to the nearest integer (half to even), in its lowest bits, for
/// |x| < 2²². It vectorises on every target, unlike `round_ties_even`, which is a library call without SSE 4.1.
const ROUND: f32 = 12_582_912.0;

/// The largest finite bfloat16, without its sign.
const BF16_MAX: u16 = 0x7f7f;

/// Why value bytes cannot be accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ValueError {
    /// A value, or a product of scale and code, that is infinite or not a number.
    NonFinite,
    /// A scale or code that no encoder writes.
    NotCanonical,
}

/// Bytes of `count` values, the scale included.
pub(super) fn encoded_bytes(count: usize, format: ValueFormat) -> usize {
    match format {
        ValueFormat::F32 => 4 * count,
        ValueFormat::Bf16 => 2 * count,
        ValueFormat::Int8 if count == 0 => 0,
        ValueFormat::Int8 => 4 + count,
        ValueFormat::Sign if count == 0 => 0,
        ValueFormat::Sign => 4 + count.div_ceil(8),
    }
}

/// Appends the bytes of finite values, and replaces each value by what its bytes decode to.
pub(super) fn encode(values: &mut [f32], format: ValueFormat, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + encoded_bytes(values.len(), format), 0);
    let bytes = &mut out[start..];
    match format {
        ValueFormat::F32 => {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(&*values) {
                *bytes = value.to_le_bytes();
            }
        }
        ValueFormat::Bf16 => {
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                let code = to_bf16(*value);
                *bytes = code.to_le_bytes();
                *value = from_bf16(code);
            }
        }
        ValueFormat::Int8 => {
            if let Some((scale_bytes, codes)) = bytes.split_first_chunk_mut() {
                let scale = scale(values);
                *scale_bytes = scale.to_le_bytes();
                encode_int8(values, scale, codes);
            }
        }
        ValueFormat::Sign => {
            if let Some((magnitude_bytes, signs)) = bytes.split_first_chunk_mut() {
                let magnitude = mean_magnitude(values);
                *magnitude_bytes = magnitude.to_le_bytes();
                encode_signs(values, magnitude, signs);
            }
        }
    }
}

/// The bfloat16 nearest to a finite value, half to even; the largest finite one rather than infinity.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    let (sign, magnitude) = (rounded as u16 & 0x8000, rounded as u16 & 0x7fff);
    sign | magnitude.min(BF16_MAX)
}

fn from_bf16(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// max|v| / 127, one step less where 127 times that would overflow.
fn scale(values: &[f32]) -> f32 {
    let max = values.iter().fold(0, |max, value| (value.to_bits() & 0x7fff_ffff).max(max));
    let scale = f32::from_bits(max) / 127.0;
    if (127.0 * scale).is_finite() { scale } else { scale.next_down() }
}

fn encode_int8(values: &mut [f32], scale: f32, codes: &mut [u8]) {
    if scale == 0.0 {
        // All values are zero, or so small that their scale underflows; `codes` is zero already.
        values.fill(0.0);
        return;
    }
    for (code, value) in codes.iter_mut().zip(values) {
        let rounded = (*value / scale).clamp(-127.0, 127.0) + ROUND;
        *code = rounded.to_bits() as u8;
        *value = (rounded - ROUND) * scale + 0.0;
    }
}

/// The mean of abs(v), which is the magnitude that leaves the least error, in the order of the values.
fn mean_magnitude(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
    (sum / values.len() as f64) as f32
}

fn encode_signs(values: &mut [f32], magnitude: f32, signs: &mut [u8]) {
    if magnitude == 0.0 {
        // All values are zero, or so small that their mean underflows; `signs` is zero already.
        values.fill(0.0);
        return;
    }
    for (signs, values) in signs.iter_mut().zip(values.chunks_mut(8)) {
        for (bit, value) in values.iter_mut().enumerate() {
            *signs |= u8::from(value.is_sign_negative()) << bit;
            *value = magnitude.copysign(*value);
        }
    }
}

/// Appends the `count` values that exactly these bytes encode.
pub(super) fn decode(
    bytes: &[u8],
    count: usize,
    format: ValueFormat,
    out: &mut Vec<f32>,
) -> Result<(), ValueError> {
    let start = out.len();
    match format {
        ValueFormat::F32 => out.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
        ValueFormat::Bf16 => {
            out.extend(bytes.as_chunks().0.iter().map(|&bytes| from_bf16(u16::from_le_bytes(bytes))));
        }
        ValueFormat::Int8 => {
            if let Some((&scale, codes)) = bytes.split_first_chunk() {
                return decode_int8(f32::from_le_bytes(scale), codes, out);
            }
        }
        ValueFormat::Sign => {
            if let Some((&magnitude, signs)) = bytes.split_first_chunk() {
                return decode_signs(f32::from_le_bytes(magnitude), signs, count, out);
            }
        }
    }
    if all_finite(&out[start..]) { Ok(()) } else { Err(ValueError::NonFinite) }
}

fn decode_int8(scale: f32, codes: &[u8], out: &mut Vec<f32>) -> Result<(), ValueError> {
    if !(127.0 * scale).is_finite() {
        return Err(ValueError::NonFinite);
    }
    let code_of_none = codes.contains(&(i8::MIN as u8));
    let zero_scale = scale == 0.0 && codes.iter().any(|&code| code != 0);
    if scale.is_sign_negative() || code_of_none || zero_scale {
        return Err(ValueError::NotCanonical);
    }
    out.extend(codes.iter().map(|&code| f32::from(code as i8) * scale));
    Ok(())
}

fn decode_signs(magnitude: f32, signs: &[u8], count: usize, out: &mut Vec<f32>) -> Result<(), ValueError> {
    if !magnitude.is_finite() {
        return Err(ValueError::NonFinite);
    }
    let zero_magnitude = magnitude == 0.0 && signs.iter().any(|&signs| signs != 0);
    let padding = signs.last().is_some_and(|&last| !count.is_multiple_of(8) && last >> (count % 8) != 0);
    if magnitude.is_sign_negative() || zero_magnitude || padding {
        return Err(ValueError::NotCanonical);
    }
    let sign = |place: usize| if signs[place / 8] >> (place % 8) & 1 == 1 { -magnitude } else { magnitude };
    out.extend((0..count).map(sign));
    Ok(())
}

/// Whether every value is finite, without a branch per value.
pub(super) fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(0, |max, value| (value.to_bits() & 0x7fff_ffff).max(max)) < f32::INFINITY.to_bits()
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    /// What `values` are after encoding, checked against what the bytes decode to.
    fn encoded(values: &[f32], format: ValueFormat) -> Vec<f32> {
        let (mut sent, mut bytes, mut received) = (values.to_vec(), Vec::new(), Vec::new());
        encode(&mut sent, format, &mut bytes);
        assert_eq!(bytes.len(), encoded_bytes(values.len(), format));
        decode(&bytes, values.len(), format, &mut received).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&sent), bits(&received), "{format:?} {values:?}");
        sent
    }

    fn finite() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite())
    }

    proptest! {
        #[test]
        fn f32_is_exact(values in prop::collection::vec(finite(), 0..50)) {
            prop_assert_eq!(encoded(&values, ValueFormat::F32), values);
        }

        #[test]
        fn bf16_rounds_as_half_does_but_saturates(values in prop::collection::vec(finite(), 0..50)) {
            for (value, sent) in values.iter().zip(encoded(&values, ValueFormat::Bf16)) {
                let expected = bf16::from_f32(*value);
                let expected = if expected.is_finite() { expected } else { bf16::MAX.copysign(expected) };
                prop_assert_eq!(sent.to_bits(), expected.to_f32().to_bits());
            }
        }

        #[test]
        fn int8_is_the_nearest_multiple_of_the_scale(values in prop::collection::vec(-100_f32..100.0, 1..50)) {
            let scale = scale(&values);
            for (value, sent) in values.iter().zip(encoded(&values, ValueFormat::Int8)) {
                prop_assert_eq!(sent, (value / scale).round_ties_even() * scale);
                prop_assert!((sent - value).abs() <= 0.5001 * scale);
            }
        }

        #[test]
        fn int8_and_signs_keep_any_finite_values_finite(values in prop::collection::vec(finite(), 0..50)) {
            prop_assert!(all_finite(&encoded(&values, ValueFormat::Int8)));
            prop_assert!(all_finite(&encoded(&values, ValueFormat::Sign)));
        }

        #[test]
        fn signs_have_the_mean_magnitude(values in prop::collection::vec(-100_f32..100.0, 1..50)) {
            let mean = values.iter().map(|value| value.abs()).sum::<f32>() / values.len() as f32;
            for (value, sent) in values.iter().zip(encoded(&values, ValueFormat::Sign)) {
                prop_assert_eq!(sent.is_sign_negative(), value.is_sign_negative());
                prop_assert!((sent.abs() - mean).abs() <= 1e-5 * mean);
            }
        }
    }

    #[test]
    fn extremes_of_bf16_int8_and_signs() {
        let max_bf16 = bf16::MAX.to_f32();
        assert_eq!(encoded(&[f32::MAX, -f32::MAX], ValueFormat::Bf16), [max_bf16, -max_bf16]);
        // The second lies half-way between two codes, and goes to the even one.
        assert_eq!(encoded(&[127.0, 2.5, -3.5, -0.5], ValueFormat::Int8), [127.0, 2.0, -4.0, 0.0]);
        assert_eq!(encoded(&[0.0, -0.0], ValueFormat::Int8), [0.0, 0.0]);
        assert_eq!(encoded(&[f32::from_bits(1)], ValueFormat::Int8), [0.0]);
        assert!(encoded(&[f32::MAX], ValueFormat::Int8)[0] > 0.999 * f32::MAX);
        assert_eq!(encoded(&[f32::MAX, -f32::MAX], ValueFormat::Sign), [f32::MAX, -f32::MAX]);
        assert_eq!(encoded(&[3.0, -0.0], ValueFormat::Sign), [1.5, -1.5]);
        assert_eq!(encoded(&[0.0, -0.0], ValueFormat::Sign), [0.0, 0.0]);
    }

    #[test]
    fn refuses_what_no_encoder_writes() {
        let check = |bytes: &[u8], format, expected| {
            assert_eq!(decode(bytes, 1, format, &mut Vec::new()), Err(expected), "{bytes:?}");
        };
        let int8 = |scale: f32, code: i8| [&scale.to_le_bytes()[..], &[code as u8]].concat();
        check(&f32::NAN.to_le_bytes(), ValueFormat::F32, ValueError::NonFinite);
        check(&f32::NEG_INFINITY.to_le_bytes(), ValueFormat::F32, ValueError::NonFinite);
        check(&bf16::INFINITY.to_le_bytes(), ValueFormat::Bf16, ValueError::NonFinite);
        check(&int8(f32::NAN, 1), ValueFormat::Int8, ValueError::NonFinite);
        check(&int8(f32::MAX, 1), ValueFormat::Int8, ValueError::NonFinite);
        check(&int8(-1.0, 1), ValueFormat::Int8, ValueError::NotCanonical);
        check(&int8(-0.0, 0), ValueFormat::Int8, ValueError::NotCanonical);
        check(&int8(0.0, 1), ValueFormat::Int8, ValueError::NotCanonical);
        check(&int8(1.0, -128), ValueFormat::Int8, ValueError::NotCanonical);
        check(&int8(f32::INFINITY, 1), ValueFormat::Sign, ValueError::NonFinite);
        check(&int8(-1.0, 1), ValueFormat::Sign, ValueError::NotCanonical);
        check(&int8(0.0, 1), ValueFormat::Sign, ValueError::NotCanonical);
        check(&int8(1.0, 2), ValueFormat::Sign, ValueError::NotCanonical);
    }
}
