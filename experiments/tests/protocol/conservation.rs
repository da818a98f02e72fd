//! Nothing is lost on the way: what was sent and what is kept add up to what came in, exactly.
//!
//! Rates, momenta and gradients are dyadic and few, so that every sum and product is exact in float32 and the sums of
//! the test are exact in float64.

use proptest::prelude::*;
use sanderling_common::method::Method;
use sanderling_common::sparse::{Compression, Update, ValueFormat};

use crate::cluster::{Cluster, exact, layout, server_settings, worker_settings};

const SIZES: [usize; 3] = [13, 1, 6];
const ELEMENTS: usize = 20;
const RATE: f64 = 0.125;
const KEEP: f64 = 0.25;

/// Gradients with five significant bits.
fn gradients(count: usize) -> impl Strategy<Value = Vec<Vec<f32>>> {
    let element = (-31_i8..=31).prop_map(|number| f32::from(number) / 8.0);
    prop::collection::vec(prop::collection::vec(element, ELEMENTS), 1..count)
}

/// Per element: what was sent in all, and what is kept.
fn run(
    method: Method,
    momentum: f32,
    compression: Compression,
    gradients: &[Vec<f32>],
    mut each: impl FnMut(&[f32], &Update),
) -> (Vec<f64>, Vec<f64>) {
    let layout = layout(&SIZES);
    let settings = worker_settings(method, RATE, momentum, compression);
    let mut cluster = Cluster::new(&layout, &[0.0; ELEMENTS], &server_settings(None), settings, 1);
    let mut sent = vec![0.0; ELEMENTS];
    for gradient in gradients {
        cluster.exchange(0, gradient);
        let update = cluster.members[0].core.method().sent();
        sent.iter_mut().zip(update.to_dense(&layout)).for_each(|(sum, value)| *sum += f64::from(value));
        each(gradient, update);
    }
    let kept = cluster.members[0].core.method().residual();
    (sent, kept.iter().copied().map(f64::from).collect())
}

proptest! {
    /// Σ sent + u = Σ η·d, also when bfloat16 rounds what is sent.
    #[test]
    fn of_gd_async(gradients in gradients(40), rounded: bool) {
        let format = if rounded { ValueFormat::Bf16 } else { ValueFormat::F32 };
        let mut entered = [0.0; ELEMENTS];
        let compression = Compression { format, ..exact(KEEP) };
        let (sent, u) = run(Method::GdAsync, 0.0, compression, &gradients, |gradient, _| {
            entered.iter_mut().zip(gradient).for_each(|(sum, &d)| *sum += RATE * f64::from(d));
        });
        for element in 0..ELEMENTS {
            prop_assert_eq!(sent[element] + u[element], entered[element]);
        }
    }

    /// (1 − m)·Σ sent + u = Σ η·d. Every sending halves the last bit of u, hence the short runs.
    #[test]
    fn of_sa_momentum(gradients in gradients(12)) {
        let mut entered = [0.0; ELEMENTS];
        let (sent, u) = run(Method::Dgs, 0.5, exact(KEEP), &gradients, |gradient, _| {
            entered.iter_mut().zip(gradient).for_each(|(sum, &d)| *sum += RATE * f64::from(d));
        });
        for element in 0..ELEMENTS {
            prop_assert_eq!(0.5 * sent[element] + u[element], entered[element]);
        }
    }

    /// Σ sent/η + r = Σ u, where u ← m·u + d is masked after being sent.
    #[test]
    fn of_dgc_async(gradients in gradients(12)) {
        let mut u = [0.0_f32; ELEMENTS];
        let mut entered = [0.0; ELEMENTS];
        let (sent, r) = run(Method::DgcAsync, 0.5, exact(KEEP), &gradients, |gradient, sent| {
            for element in 0..ELEMENTS {
                u[element] = 0.5 * u[element] + gradient[element];
                entered[element] += f64::from(u[element]);
            }
            for (tensor, entries) in sent.iter() {
                entries.for_each(&mut u[layout(&SIZES).tensors()[tensor].range()], |u, _| *u = 0.0);
            }
        });
        for element in 0..ELEMENTS {
            prop_assert_eq!(sent[element] / RATE + r[element], entered[element]);
        }
    }
}
