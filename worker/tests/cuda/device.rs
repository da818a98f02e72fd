//! What the tests run on.

use sanderling_worker::kernels::cuda::{Cuda, Precision};

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

/// |a − b| / |b| in the Euclidean norm.
pub(crate) fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let size = norm(&mut b.iter().map(|&b| f64::from(b)));
    if difference == 0.0 { 0.0 } else { difference / size }
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
