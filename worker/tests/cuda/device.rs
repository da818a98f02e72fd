//! What the tests run on.

use sanderling_worker::kernels::cuda::{Cuda, Precision};

use crate::random::Random;
use crate::skip;

/// Where the kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Emulator,
    Gpu,
}

/// The kernels in a place, or a loud word that there are none.
pub(crate) fn kernels(place: Place, precision: Precision) -> Option<Cuda> {
    skip::kernels(match place {
        Place::Emulator => Cuda::emulated(precision),
        Place::Gpu => Cuda::new(0, precision),
    })
}

/// The largest |a − b| / |b| of a tensor, in the Euclidean norm, that a precision allows.
pub(crate) fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-4,
        // Ten bits of mantissa, as bfloat16 has seven.
        Precision::Tf32 => 5e-3,
        Precision::Bf16 => 2e-2,
    }
}

/// The same of the worst row, as [`of_worst_row`] has it: about 1 for a row that is lost. Generous, as a single row may be
/// unlucky.
pub(crate) fn tolerance_of_row(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2e-3,
        Precision::Tf32 => 0.1,
        Precision::Bf16 => 0.25,
    }
}

/// The Euclidean norms of a − b and of b.
fn norms(a: &[f32], b: &[f32]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    (difference, norm(&mut b.iter().map(|&b| f64::from(b))))
}

fn ratio(difference: f64, size: f64) -> f64 {
    if difference == 0.0 { 0.0 } else { difference / size }
}

/// |a − b| / |b| in the Euclidean norm.
pub(crate) fn relative(a: &[f32], b: &[f32]) -> f64 {
    let (difference, size) = norms(a, b);
    ratio(difference, size)
}

/// The largest |a − b| of a row over what is larger, |b| of that row or the root mean square of all rows' |b|. In the norm of a
/// large tensor some lost rows are too little to be seen.
pub(crate) fn of_worst_row(a: &[f32], b: &[f32], width: usize) -> f64 {
    assert_eq!((a.len(), a.len() % width), (b.len(), 0), "rows of {width}");
    let usual = norms(a, b).1 / ((b.len() / width).max(1) as f64).sqrt();
    let of_rows = a.chunks(width).zip(b.chunks(width)).map(|(a, b)| {
        let (difference, size) = norms(a, b);
        ratio(difference, size.max(usual))
    });
    // What is no number is the worst.
    of_rows.fold(0.0, |worst, row| if row > worst || row.is_nan() { row } else { worst })
}

#[test]
fn a_lost_row_among_thousands_is_found() {
    let (rows, width) = (8192, 64);
    let expected = Random::new(3).values(rows * width, 1.0);
    for value in [0.0, f32::NAN] {
        let mut found = expected.clone();
        found[4095 * width..4096 * width].fill(value);
        let worst = of_worst_row(&found, &expected, width);
        assert!(worst > 0.5 || worst.is_nan(), "{worst}");
    }
    let mut found = expected.clone();
    found[4095 * width..4096 * width].fill(0.0);
    assert!(
        relative(&found, &expected) < tolerance(Precision::Bf16),
        "the whole tensor's norm tells nothing of it"
    );
    // Rounding is not taken for it, nor are rows that are zero.
    let rounded: Vec<f32> = expected.iter().map(|value| value * (1.0 + 2f32.powi(-8))).collect();
    assert!(of_worst_row(&rounded, &expected, width) < 0.01);
    assert_eq!(of_worst_row(&[0.0; 4], &[0.0; 4], 2), 0.0);
}

/// A test for every place and precision, of a function of both.
macro_rules! everywhere {
    ($($name:ident),* $(,)?) => {
        everywhere! { emulator Emulator: $($name),* }
        everywhere! { gpu Gpu: $($name),* }
    };
    ($module:ident $place:ident: $($name:ident),*) => {
        mod $module {
            $(mod $name {
                use sanderling_worker::kernels::cuda::Precision;
                use crate::device::Place;
                #[test]
                fn f32() {
                    super::super::$name(Place::$place, Precision::F32);
                }
                #[test]
                fn tf32() {
                    super::super::$name(Place::$place, Precision::Tf32);
                }
                #[test]
                fn bf16() {
                    super::super::$name(Place::$place, Precision::Bf16);
                }
            })*
        }
    };
}
pub(crate) use everywhere;
