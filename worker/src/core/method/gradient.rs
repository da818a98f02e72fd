//! Whether a gradient may be used, and what clipping multiplies it with.

/// A gradient whose norm exceeds this after clipping is as useless as one that is not finite, and is skipped like it.
///
/// With rates up to 2¹⁰ and momentum up to 1 − 2⁻²⁰ an accumulator then stays below 2⁷⁰ for every step, and below
/// float32's 2¹²⁸ for more steps than a run has.
pub const GRADIENT_NORM_MAX: f64 = (1_u64 << 40) as f64;

/// Partial sums, so that the additions overlap and vectorise; their number fixes the order of summation.
const LANES: usize = 16;

/// The sum of squares in float64, which no float32 values overflow: it is finite just when all of them are.
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (sum, &value) in sums.iter_mut().zip(block) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    for (sum, &value) in sums.iter_mut().zip(rest) {
        *sum += f64::from(value) * f64::from(value);
    }
    sums.iter().sum()
}

/// The Euclidean norm, summed in float64; not finite just when an entry is not.
pub fn gradient_norm(gradient: &[f32]) -> f64 {
    sum_of_squares(gradient).sqrt()
}

/// The factor that brings a gradient of this norm down to `clip_norm` (1 if it is no longer than that, or `clip_norm` is
/// 0), or `None` if the gradient may not be used: an entry is not finite, or the norm exceeds [`GRADIENT_NORM_MAX`].
pub fn scale_of_norm(norm: f64, clip_norm: f32) -> Option<f32> {
    if !norm.is_finite() {
        return None;
    }
    let clip_norm = f64::from(clip_norm);
    if clip_norm > 0.0 && norm > clip_norm {
        return Some((clip_norm / norm) as f32);
    }
    (norm <= GRADIENT_NORM_MAX).then_some(1.0)
}

/// [`scale_of_norm`] of the gradient's [`gradient_norm`].
pub fn clip_scale(gradient: &[f32], clip_norm: f32) -> Option<f32> {
    scale_of_norm(gradient_norm(gradient), clip_norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_to_the_norm_and_leaves_shorter_ones_alone() {
        assert_eq!(clip_scale(&[3.0, 4.0], 1.0), Some(0.2));
        assert_eq!(clip_scale(&[3.0, 4.0], 5.0), Some(1.0));
        assert_eq!(clip_scale(&[3.0, 4.0], 0.0), Some(1.0));
        assert_eq!(clip_scale(&[0.0; 40], 1.0), Some(1.0));
    }

    #[test]
    fn finds_what_is_not_finite_wherever_it_is() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 15, 16, 31, 36] {
                let mut gradient = [1.0; 37];
                gradient[at] = bad;
                assert_eq!(clip_scale(&gradient, 1.0), None, "{bad} at {at}");
            }
        }
    }

    #[test]
    fn huge_finite_gradients_need_clipping() {
        let huge = [f32::MAX; 33];
        assert_eq!(clip_scale(&huge, 0.0), None);
        let scale = clip_scale(&huge, 1.0).unwrap();
        let norm = sum_of_squares(&huge.map(|value| value * scale)).sqrt();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
    }
}
