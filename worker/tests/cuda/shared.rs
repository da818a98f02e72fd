//! Several threads that queue products on one device at the same time, each with a handle of its own.

use std::thread;

use sanderling_worker::kernels::cuda::{Cuda, CudaError, Precision};
use sanderling_worker::kernels::timed::Clocked;
use sanderling_worker::kernels::{Kernels, Weights, Write};

use crate::device::{Place, everywhere, kernels};
use crate::driver::is_stood_in_for;
use crate::random::Random;
use crate::skip;

/// Rows, outputs and inputs. Small results of long sums are those that cuBLASLt splits: several launches a product, which
/// share its workspace.
const SHAPES: [(usize, usize, usize); 2] = [(7, 24, 64), (16, 8, 260)];
const SHAPES_LARGE: [(usize, usize, usize); 6] =
    [(64, 64, 16384), (8, 256, 8192), (2048, 4, 128), (128, 128, 4096), (256, 65, 2048), (2048, 384, 128)];

/// How much is multiplied.
#[derive(Clone, Copy)]
struct Load {
    shapes: &'static [(usize, usize, usize)],
    threads: usize,
    /// Times that the products of a shape are looked at, and queued before they are.
    rounds: usize,
    repeats: usize,
}

/// What all products of the shapes come to, and how often they came to something else in more rounds.
fn products(mut cuda: Cuda, load: Load) -> (Vec<Vec<f32>>, usize) {
    let mut random = Random::new(11);
    let (mut first, mut others) = (Vec::new(), 0);
    let mut upload = |cuda: &mut Cuda, len: usize, parameters: bool| {
        let made = if parameters { cuda.allocate_factors(len) } else { cuda.allocate_activations(len) };
        let (mut buffer, values) = (made.unwrap(), random.exact(len, 1.0));
        cuda.upload(&values, &mut buffer);
        buffer
    };
    for &(rows, outputs, inputs) in load.shapes {
        let weights = Weights { offset: 0, outputs, inputs };
        let params = upload(&mut cuda, outputs * inputs, true);
        let x = upload(&mut cuda, rows * inputs, false);
        let dy = upload(&mut cuda, rows * outputs, false);
        let mut y = cuda.allocate_activations(rows * outputs).unwrap();
        let mut dx = cuda.allocate_activations(rows * inputs).unwrap();
        let mut gradient = cuda.allocate(outputs * inputs).unwrap();
        for round in 0..load.rounds {
            for _ in 0..load.repeats {
                cuda.product(&params, weights, rows, &x, &mut y, Write::Replace);
                cuda.product_input_gradient(&params, weights, rows, &dy, &mut dx, Write::Replace);
                cuda.product_weight_gradient(&mut gradient, weights, rows, &dy, &x);
            }
            let results = [&y, &dx, &gradient].map(|buffer| {
                let mut values = vec![f32::NAN; buffer.len()];
                cuda.download(buffer, &mut values).unwrap();
                values
            });
            if round == 0 {
                first.extend(results);
            } else {
                let expected = &first[first.len() - results.len()..];
                others +=
                    expected.iter().zip(&results).filter(|(expected, result)| expected != result).count();
            }
        }
    }
    (first, others)
}

fn threads_get_the_same_products(place: Place, precision: Precision) {
    let Some(cuda) = kernels(place, precision) else { return };
    let load = match place {
        _ if is_stood_in_for() => Load { shapes: &SHAPES, threads: 3, rounds: 2, repeats: 1 },
        Place::Emulator => Load { shapes: &SHAPES, threads: 3, rounds: 2, repeats: 1 },
        Place::Gpu => Load { shapes: &SHAPES_LARGE, threads: 8, rounds: 40, repeats: 8 },
    };
    let (alone, others) = products(cuda.beside(), load);
    assert_eq!(others, 0, "a product that is repeated comes to the same");
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..load.threads).map(|_| scope.spawn(|| products(cuda.beside(), load))).collect();
        for thread in threads {
            let (together, others) = thread.join().unwrap();
            let same = alone.iter().zip(&together).filter(|(alone, together)| alone == together).count();
            assert_eq!((same, others), (alone.len(), 0), "products beside those of other threads");
        }
    });
}

/// What was queued for memory that is given back is done first.
fn memory_is_given_back_in_time(place: Place, precision: Precision) {
    let Some(mut cuda) = kernels(place, precision) else { return };
    const LEN: usize = 5000;
    let mut out = cuda.allocate(LEN).unwrap();
    {
        let (mut a, mut b) = (cuda.allocate(LEN).unwrap(), cuda.allocate(LEN).unwrap());
        cuda.upload(&[1.0; LEN], &mut a);
        cuda.upload(&[2.0; LEN], &mut b);
        cuda.add(LEN, &a, &b, &mut out);
    }
    // It may lie where they did.
    let mut other = cuda.allocate(LEN).unwrap();
    cuda.upload(&[5.0; LEN], &mut other);
    let mut values = vec![f32::NAN; LEN];
    cuda.download(&out, &mut values).unwrap();
    assert!(values.iter().all(|&value| value == 3.0), "{place:?}");
}

/// What was marked in the queue is given back by whoever gives up.
fn timing_that_is_given_up_leaves_nothing(place: Place, precision: Precision) {
    let Some(mut cuda) = kernels(place, precision) else { return };
    let [a, mut out] = [0, 1].map(|_| cuda.allocate(100).unwrap());
    cuda.start_timing();
    cuda.add(100, &a, &a, &mut out);
}

/// Two GPUs of one machine, used in turns by one thread.
#[test]
fn a_second_gpu_computes_beside_the_first() {
    let Some(first) = skip::kernels(Cuda::new(0, Precision::F32)) else { return };
    let second = match Cuda::new(1, Precision::F32) {
        Err(error @ (CudaError::NoDevice { .. } | CudaError::TooOld { .. })) => {
            return skip::skip("gpus", &error);
        }
        made => made.unwrap(),
    };
    const LEN: usize = 300;
    let mut made: Vec<_> = [first, second]
        .into_iter()
        .enumerate()
        .map(|(number, mut cuda)| {
            let [mut values, sums] = [0, 1].map(|_| cuda.allocate(LEN).unwrap());
            cuda.upload(&[number as f32 + 1.0; LEN], &mut values);
            (cuda, values, sums)
        })
        .collect();
    for round in 0..3 {
        // Nothing but launches in between.
        for (cuda, values, sums) in &mut made {
            cuda.add(LEN, values, values, sums);
            std::mem::swap(values, sums);
        }
        for (number, (cuda, values, _)) in made.iter_mut().enumerate() {
            let mut found = vec![f32::NAN; LEN];
            cuda.download(values, &mut found).unwrap();
            let expected = (number as f32 + 1.0) * 2f32.powi(round + 1);
            assert!(found.iter().all(|&value| value == expected), "GPU {number}, round {round}");
        }
    }
}

everywhere!(
    threads_get_the_same_products,
    memory_is_given_back_in_time,
    timing_that_is_given_up_leaves_nothing
);
