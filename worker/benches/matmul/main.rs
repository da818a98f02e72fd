//! Which crate multiplies the matrices of small transformers fastest, on one thread.
//!
//!     cargo bench -p sanderling-worker --bench matmul
//!
//! GFLOP/s per shape for the three products of a linear layer: forward y = x·Wᵀ, input gradient dx = dy·W, weight
//! gradient dW = dyᵀ·x, all row-major. The crates take turns within a round and the best of all rounds counts: the
//! machine is shared, and noise only ever slows down. The last line is the geometric mean.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it measures")]

mod kernels;

use std::hint::black_box;
use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};

use kernels::by_gemm;

const ROUNDS: usize = 25;
const CALLS: u32 = 8;

/// (rows, inputs, outputs) and what it is in a model.
const SHAPES: [(usize, usize, usize); 9] = [
    (768, 128, 384),   // q, k, v of 128 wide, batch 12 × 64
    (768, 128, 128),   // attention output
    (768, 128, 688),   // gate and up
    (768, 344, 128),   // down
    (768, 128, 65),    // head over characters
    (192, 128, 256),   // gate and up of one expert of eight, top-2
    (192, 128, 128),   // down of that expert
    (2048, 256, 1376), // gate and up of 256 wide, batch 8 × 256
    (2048, 688, 256),  // down
];

/// A row-major matrix, possibly read transposed.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    transposed: bool,
}

type Multiply = fn(Operand<'_>, Operand<'_>, &mut [f32], usize, usize);

const CRATES: [(&str, Multiply); 3] = [("faer", by_faer), ("gemm", by_gemm), ("ndarray", by_ndarray)];

fn by_faer(a: Operand<'_>, b: Operand<'_>, c: &mut [f32], m: usize, n: usize) {
    fn view(x: Operand<'_>) -> MatRef<'_, f32> {
        let matrix = MatRef::from_row_major_slice(black_box(x.data), x.rows, x.columns);
        if x.transposed { matrix.transpose() } else { matrix }
    }
    let c = MatMut::from_row_major_slice_mut(c, m, n);
    matmul(c, Accum::Replace, view(a), view(b), 1.0, Par::Seq);
}

fn by_ndarray(a: Operand<'_>, b: Operand<'_>, c: &mut [f32], m: usize, n: usize) {
    fn view(x: Operand<'_>) -> ArrayView2<'_, f32> {
        let matrix = ArrayView2::from_shape((x.rows, x.columns), black_box(x.data));
        let matrix = matrix.expect("the slice has the shape");
        if x.transposed { matrix.reversed_axes() } else { matrix }
    }
    let mut c = ArrayViewMut2::from_shape((m, n), c).expect("the slice has the shape");
    general_mat_mul(1.0, &view(a), &view(b), 0.0, &mut c);
}

fn main() {
    let values = |len: usize| -> Vec<f32> { (0..len).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect() };
    println!("{:<22}{:<10}{:>9}{:>9}{:>9}", "rows inputs outputs", "product", "faer", "gemm", "ndarray");
    let mut logarithms = [0.0; 3];
    let mut lines = 0;
    for (rows, inputs, outputs) in SHAPES {
        let (x, w, dy) = (values(rows * inputs), values(outputs * inputs), values(rows * outputs));
        let x = Operand { data: &x, rows, columns: inputs, transposed: false };
        let w = Operand { data: &w, rows: outputs, columns: inputs, transposed: false };
        let dy = Operand { data: &dy, rows, columns: outputs, transposed: false };
        let products = [
            ("forward", x, Operand { transposed: true, ..w }, rows, outputs),
            ("input", dy, w, rows, inputs),
            ("weight", Operand { transposed: true, ..dy }, x, outputs, inputs),
        ];
        for (name, a, b, m, n) in products {
            let flops = 2.0 * (rows * inputs * outputs) as f64;
            let rates = measure(a, b, m, n).map(|seconds| flops / seconds / 1e9);
            let shape = format!("{rows} {inputs} {outputs}");
            println!("{shape:<22}{name:<10}{:>9.1}{:>9.1}{:>9.1}", rates[0], rates[1], rates[2]);
            logarithms.iter_mut().zip(rates).for_each(|(sum, rate)| *sum += rate.ln());
            lines += 1;
        }
    }
    let means = logarithms.map(|sum| (sum / f64::from(lines)).exp());
    println!("{:<32}{:>9.1}{:>9.1}{:>9.1}   GFLOP/s", "geometric mean", means[0], means[1], means[2]);
}

/// The best time of one product, in seconds, per crate.
fn measure(a: Operand<'_>, b: Operand<'_>, m: usize, n: usize) -> [f64; 3] {
    let mut results: [Vec<f32>; 3] = std::array::from_fn(|_| vec![0.0; m * n]);
    let mut best = [f64::INFINITY; 3];
    for _ in 0..ROUNDS {
        for (index, (_, multiply)) in CRATES.iter().enumerate() {
            let start = Instant::now();
            for _ in 0..CALLS {
                multiply(a, b, black_box(&mut results[index]), m, n);
            }
            best[index] = best[index].min(start.elapsed().as_secs_f64() / f64::from(CALLS));
        }
    }
    for (result, (name, _)) in results.iter().zip(CRATES) {
        let close = result.iter().zip(&results[0]).all(|(a, b)| (a - b).abs() < 1e-2);
        assert!(close, "{name} does not compute what faer computes");
    }
    best
}
