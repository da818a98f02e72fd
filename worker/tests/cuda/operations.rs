//! Every operation against the CPU's, on random numbers.
//!
//! Both begin with the same numbers, which bfloat16 has too, drawn from a fixed seed. Some shapes are listed: odd ones, for which
//! the kernels go the slow way, and even ones; others are drawn, by the seed that `SANDERLING_SHAPES_SEED` gives. A GPU gets larger
//! ones besides, which would take the emulator long.

use ndarray::Array2;
use sanderling_common::model_config::RouterOrder;
use sanderling_worker::kernels::cpu::{self, Cpu};
use sanderling_worker::kernels::cuda::{Buffer, Cuda, Emulated, Precision, Routing};
use sanderling_worker::kernels::{
    ATTENTION_STATISTICS, AttentionShape, ExpertWeights, Head, HeadGradient, Kernels, RmsNorm, Rotation,
    RouterShape, RouterStatistics, RowScale, RowScaleGradient, Weights, Write,
};

use crate::device::{Place, everywhere, kernels, of_worst_row, relative, tolerance, tolerance_of_row};
use crate::driver::is_stood_in_for;
use crate::random::Random;
use crate::skip;

/// Both devices, and what compares them.
struct Pair {
    cuda: Cuda,
    cpu: Cpu,
    random: Random,
    tolerance: f64,
}

/// The same memory on both.
struct Both {
    cuda: Box<Buffer>,
    cpu: Vec<f32>,
}

impl Pair {
    fn new(place: Place, precision: Precision) -> Option<Self> {
        kernels(place, precision).map(Self::of)
    }

    fn of(cuda: Cuda) -> Self {
        let tolerance = tolerance(cuda.precision());
        Self { cuda, cpu: Cpu::new(), random: Random::new(7), tolerance }
    }

    fn with(&mut self, mut cuda: Box<Buffer>, len: usize, deviation: f64) -> Both {
        let cpu = self.random.exact(len, deviation);
        self.cuda.upload(&cpu, &mut cuda);
        Both { cuda, cpu }
    }

    /// Random floats.
    fn floats(&mut self, len: usize, deviation: f64) -> Both {
        let cuda = self.cuda.allocate(len).unwrap();
        self.with(cuda, len, deviation)
    }

    /// Random floats that products multiply.
    fn factors(&mut self, len: usize, deviation: f64) -> Both {
        let cuda = self.cuda.allocate_factors(len).unwrap();
        self.with(cuda, len, deviation)
    }

    /// Random activations.
    fn activations(&mut self, len: usize, deviation: f64) -> Both {
        let cuda = self.cuda.allocate_activations(len).unwrap();
        self.with(cuda, len, deviation)
    }

    fn close(&mut self, what: &str, both: &Both) {
        self.close_to(what, both, both.cpu.len());
    }

    /// Compares the first elements.
    fn close_to(&mut self, what: &str, both: &Both, len: usize) {
        self.compared(what, both, len);
    }

    /// Compares the first elements, and returns those of the GPU.
    fn compared(&mut self, what: &str, both: &Both, len: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; len];
        self.cuda.download(&both.cuda, &mut values).unwrap_or_else(|error| panic!("{what}: {error}"));
        let deviation = relative(&values, &both.cpu[..len]);
        assert!(deviation < self.tolerance, "{what}: {deviation:.1e}");
        values
    }

    /// The same, and every row of that width.
    fn close_rows(&mut self, what: &str, both: &Both, width: usize) {
        self.close_rows_to(what, both, (both.cpu.len(), width));
    }

    /// The same of the first elements.
    fn close_rows_to(&mut self, what: &str, both: &Both, (len, width): (usize, usize)) {
        let values = self.compared(what, both, len);
        self.rows_are_close(what, (&values, &both.cpu[..len]), width);
    }

    /// Compares all elements, and every row of a matrix among them, or of several that lie `stride` apart.
    fn close_matrices(&mut self, what: &str, both: &Both, first: Weights, (count, stride): (usize, usize)) {
        let values = self.compared(what, both, both.cpu.len());
        for number in 0..count {
            let from = first.offset + number * stride;
            let range = from..from + first.outputs * first.inputs;
            self.rows_are_close(what, (&values[range.clone()], &both.cpu[range]), first.inputs);
        }
    }

    fn rows_are_close(&self, what: &str, (found, expected): (&[f32], &[f32]), width: usize) {
        let (worst, most) = (of_worst_row(found, expected, width), tolerance_of_row(self.cuda.precision()));
        assert!(worst < most, "a row of {what}: {worst:.1e}");
    }
}

/// Shapes that are drawn for an operation, and how large each side of them is at most; on a GPU larger ones besides.
const DRAWN: usize = 4;
const DRAWN_SIDE: usize = 48;
const DRAWN_LARGE: usize = 8;
const DRAWN_LARGE_SIDE: usize = 600;

/// What shapes are drawn from.
fn drawn_shapes() -> Random {
    let seed = match std::env::var("SANDERLING_SHAPES_SEED") {
        Ok(seed) => {
            seed.parse().unwrap_or_else(|error| panic!("SANDERLING_SHAPES_SEED is {seed:?}: {error}"))
        }
        Err(_) => 1,
    };
    println!("shapes are drawn with SANDERLING_SHAPES_SEED={seed}");
    Random::new(seed)
}

/// Small shapes and drawn ones, and on a GPU large ones too. What draws them gets the most that a side may be.
fn shapes<T: Copy>(place: Place, small: &[T], large: &[T], draw: impl Fn(&mut Random, usize) -> T) -> Vec<T> {
    let mut random = drawn_shapes();
    let mut all = small.to_vec();
    all.extend((0..DRAWN).map(|_| draw(&mut random, DRAWN_SIDE)));
    if place == Place::Gpu && !is_stood_in_for() {
        all.extend_from_slice(large);
        all.extend((0..DRAWN_LARGE).map(|_| draw(&mut random, DRAWN_LARGE_SIDE)));
    }
    all
}

/// As often as not one that kernels for steps of 16 bytes take.
fn side(random: &mut Random, most: usize) -> usize {
    if random.below(2) == 0 { random.up_to(most) } else { 8 * random.up_to(most / 8) }
}

fn two_sides(random: &mut Random, most: usize) -> (usize, usize) {
    (side(random, most), side(random, most))
}

fn three_sides(random: &mut Random, most: usize) -> (usize, usize, usize) {
    (side(random, most), side(random, most), side(random, most))
}

fn sums(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for len in shapes(place, &[1, 7, 4096, 5003], &[3_000_001], |random, most| random.up_to(most * most)) {
        let (a, b, c) = (pair.floats(len, 1.0), pair.activations(len, 1.0), pair.floats(len, 1.0));
        let mut out = pair.floats(len, 1.0);
        pair.cuda.add(len, &a.cuda, &b.cuda, &mut out.cuda);
        pair.cpu.add(len, &a.cpu, &b.cpu, &mut out.cpu);
        pair.close(&format!("{len} floats and activations"), &out);
        pair.cuda.add(len, &a.cuda, &c.cuda, &mut out.cuda);
        pair.cpu.add(len, &a.cpu, &c.cpu, &mut out.cpu);
        pair.close(&format!("{len} floats and floats"), &out);
        let (found, expected) = (pair.cuda.sum(&a.cuda, len).unwrap(), pair.cpu.sum(&a.cpu, len).unwrap());
        assert!((found - expected).abs() < 1e-9 * len as f64, "{len}: {found} {expected}");
        let range = len / 3..len / 2 + 1;
        pair.cuda.zero(&mut out.cuda, range.clone());
        pair.cpu.zero(&mut out.cpu, range);
        pair.close(&format!("{len} partly zero"), &out);
    }
}

fn products(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    let small = [(1, 1, 1), (5, 3, 7), (33, 65, 24), (70, 16, 40), (130, 136, 8)];
    let large = [(300, 512, 256), (1024, 4096, 1024), (1000, 77, 513), (4096, 8, 2048)];
    for (rows, outputs, inputs) in shapes(place, &small, &large, three_sides) {
        let name = format!("{rows} × {inputs} to {outputs}");
        let offset = 3;
        let weights = Weights { offset, outputs, inputs };
        let params = pair.factors(offset + outputs * inputs + 5, 0.5);
        let (x, dy) = (pair.activations(rows * inputs, 1.0), pair.activations(rows * outputs, 1.0));
        // A gradient in floats, as the residual stream's is, and one that has no twin.
        let (float_dy, plain_dy) = (pair.factors(rows * outputs, 1.0), pair.floats(rows * outputs, 1.0));
        for write in [Write::Replace, Write::Add] {
            let mut outs = [pair.activations(rows * outputs, 1.0), pair.floats(rows * outputs, 1.0)];
            for y in &mut outs {
                pair.cuda.product(&params.cuda, weights, rows, &x.cuda, &mut y.cuda, write);
                pair.cpu.product(&params.cpu, weights, rows, &x.cpu, &mut y.cpu, write);
                pair.close_rows(&format!("product {write:?} {name}"), y, outputs);
            }
            let mut outs = [pair.activations(rows * inputs, 1.0), pair.floats(rows * inputs, 1.0)];
            for dx in &mut outs {
                for dy in [&dy, &float_dy, &plain_dy] {
                    let (cuda, cpu) = (&mut dx.cuda, &mut dx.cpu);
                    pair.cuda.product_input_gradient(&params.cuda, weights, rows, &dy.cuda, cuda, write);
                    pair.cpu.product_input_gradient(&params.cpu, weights, rows, &dy.cpu, cpu, write);
                    pair.close_rows(&format!("input gradient {write:?} {name}"), dx, inputs);
                }
            }
        }
        let mut grad = pair.floats(params.cpu.len(), 1.0);
        for dy in [&dy, &float_dy, &plain_dy] {
            pair.cuda.product_weight_gradient(&mut grad.cuda, weights, rows, &dy.cuda, &x.cuda);
            pair.cpu.product_weight_gradient(&mut grad.cpu, weights, rows, &dy.cpu, &x.cpu);
            pair.close_matrices(&format!("weight gradient {name}"), &grad, weights, (1, 0));
        }
    }
}

/// Products read what the parameters are now.
fn changed_parameters(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    let weights = Weights { offset: 0, outputs: 8, inputs: 16 };
    let mut params = pair.factors(128, 1.0);
    let (x, mut y) = (pair.activations(4 * 16, 1.0), pair.activations(4 * 8, 1.0));
    for round in 0..3 {
        pair.cuda.product(&params.cuda, weights, 4, &x.cuda, &mut y.cuda, Write::Replace);
        pair.cpu.product(&params.cpu, weights, 4, &x.cpu, &mut y.cpu, Write::Replace);
        pair.close(&format!("round {round}"), &y);
        params.cpu = pair.random.exact(128, 1.0);
        pair.cuda.upload(&params.cpu, &mut params.cuda);
    }
}

fn biases(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for (rows, width) in shapes(place, &[(1, 1), (7, 5), (70, 264), (300, 40)], &[(5000, 3072)], two_sides) {
        let params = pair.floats(width + 9, 1.0);
        let mut y = pair.activations(rows * width, 1.0);
        pair.cuda.add_bias(&params.cuda, 4..4 + width, rows, &mut y.cuda);
        pair.cpu.add_bias(&params.cpu, 4..4 + width, rows, &mut y.cpu);
        pair.close_rows(&format!("bias {rows} × {width}"), &y, width);
        let (dy, mut grad) = (pair.activations(rows * width, 1.0), pair.floats(width + 9, 1.0));
        pair.cuda.bias_gradient(&mut grad.cuda, 4..4 + width, rows, &dy.cuda);
        pair.cpu.bias_gradient(&mut grad.cpu, 4..4 + width, rows, &dy.cpu);
        pair.close(&format!("bias gradient {rows} × {width}"), &grad);
    }
}

fn norms(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    let small = [(1, 1), (5, 7), (9, 65), (3, 128), (20, 520), (2, 2052)];
    for (rows, width) in shapes(place, &small, &[(3000, 2048), (700, 4096), (100, 9001)], two_sides) {
        let name = format!("{rows} × {width}");
        let norm = RmsNorm { offset: 3, rows, width, eps: 1e-5 };
        let params = pair.floats(width + 5, 1.0);
        let (x, delta) = (pair.floats(rows * width, 1.0), pair.activations(rows * width, 1.0));
        let (mut y, mut inverse) = (pair.activations(rows * width, 1.0), pair.floats(rows, 1.0));
        let mut sum = pair.floats(rows * width, 1.0);
        let cuda_inputs = (&*x.cuda, &*delta.cuda);
        let cpu_inputs = (&x.cpu[..], &delta.cpu[..]);
        let (cuda, cpu) = (&mut pair.cuda, &mut pair.cpu);
        cuda.add_rms_norm(norm, &params.cuda, cuda_inputs, &mut sum.cuda, &mut y.cuda, &mut inverse.cuda);
        cpu.add_rms_norm(norm, &params.cpu, cpu_inputs, &mut sum.cpu, &mut y.cpu, &mut inverse.cpu);
        for (what, both, width) in
            [("sum", &sum, width), ("norm of the sum", &y, width), ("its inverse", &inverse, 1)]
        {
            pair.close_rows(&format!("{what} {name}"), both, width);
        }
        pair.cuda.rms_norm(norm, &params.cuda, &x.cuda, &mut y.cuda, &mut inverse.cuda);
        pair.cpu.rms_norm(norm, &params.cpu, &x.cpu, &mut y.cpu, &mut inverse.cpu);
        pair.close_rows(&format!("norm {name}"), &y, width);
        pair.close_rows(&format!("inverse {name}"), &inverse, 1);
        let dy = pair.activations(rows * width, 1.0);
        let (mut dx, mut grad) = (pair.factors(rows * width, 1.0), pair.floats(width + 5, 1.0));
        let saved = (&*x.cuda, &*inverse.cuda);
        pair.cuda.rms_norm_backward(norm, &params.cuda, saved, &dy.cuda, &mut dx.cuda, &mut grad.cuda);
        let saved = (&x.cpu[..], &inverse.cpu[..]);
        pair.cpu.rms_norm_backward(norm, &params.cpu, saved, &dy.cpu, &mut dx.cpu, &mut grad.cpu);
        pair.close_rows(&format!("norm gradient {name}"), &dx, width);
        pair.close(&format!("norm weight gradient {name}"), &grad);
        // The kernel wrote the twin that this product reads.
        let weights = Weights { offset: 0, outputs: width, inputs: 1 };
        let (w, mut out) = (pair.factors(width, 1.0), pair.activations(rows, 1.0));
        pair.cuda.product_input_gradient(&w.cuda, weights, rows, &dx.cuda, &mut out.cuda, Write::Replace);
        pair.cpu.product_input_gradient(&w.cpu, weights, rows, &dx.cpu, &mut out.cpu, Write::Replace);
        let mut values = vec![0.0; rows];
        pair.cuda.download(&out.cuda, &mut values).unwrap();
        // A single sum of terms of both signs is only as good as the largest of them.
        let scale = (width as f32).sqrt() * 8.0 * pair.tolerance as f32;
        for (found, expected) in values.iter().zip(&out.cpu) {
            assert!((found - expected).abs() < scale, "twin {name}: {found} {expected}");
        }
    }
}

fn attention_shapes(place: Place) -> Vec<AttentionShape> {
    let small = [(1, 1, 1, 1, 4), (2, 5, 4, 2, 20), (1, 33, 2, 1, 16), (2, 40, 3, 3, 6), (1, 70, 4, 1, 64)];
    let large = [
        (2, 300, 4, 2, 64),
        (1, 1000, 8, 2, 128),
        (1, 257, 2, 2, 96),
        (1, 200, 2, 1, 256),
        (3, 64, 32, 8, 64),
        (1, 333, 4, 4, 80),
    ];
    let draw = |random: &mut Random, most: usize| {
        let head_dim = 2 * random.up_to(most.min(80));
        drawn_attention(random, most, head_dim)
    };
    shapes(place, &small, &large, draw).into_iter().map(attention_shape).collect()
}

/// Of heads of that width.
fn drawn_attention(random: &mut Random, most: usize, head_dim: usize) -> (usize, usize, usize, usize, usize) {
    let (kv_heads, shared_by) = (random.up_to(3), random.up_to(3));
    (random.up_to(2), random.up_to(2 * most), kv_heads * shared_by, kv_heads, head_dim)
}

fn attention_shape(
    (batch, time, heads, kv_heads, head_dim): (usize, usize, usize, usize, usize),
) -> AttentionShape {
    AttentionShape { batch, time, heads, kv_heads, head_dim }
}

/// Cosines and sines of random angles.
fn tables(pair: &mut Pair, time: usize, head_dim: usize) -> Both {
    let angles = pair.random.values(time * head_dim / 2, 2.0);
    let rows = angles
        .chunks(head_dim / 2)
        .flat_map(|row| row.iter().map(|angle| angle.cos()).chain(row.iter().map(|angle| angle.sin())));
    let cpu: Vec<f32> = rows.collect();
    let mut cuda = pair.cuda.allocate(cpu.len()).unwrap();
    pair.cuda.upload(&cpu, &mut cuda);
    Both { cuda, cpu }
}

fn rotations(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for shape in attention_shapes(place) {
        let tables = tables(&mut pair, shape.time, shape.head_dim);
        let mut qkv = pair.activations(shape.rows() * shape.qkv_width(), 1.0);
        for rotation in [Rotation::Forward, Rotation::Inverse] {
            pair.cuda.rotary(shape, &tables.cuda, rotation, &mut qkv.cuda);
            pair.cpu.rotary(shape, &tables.cpu, rotation, &mut qkv.cpu);
            pair.close_rows(&format!("{rotation:?} {shape:?}"), &qkv, shape.qkv_width());
        }
    }
}

fn attention(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    attends_like_the_cpu(&mut pair, attention_shapes(place));
}

/// Heads of widths whose tiles depend on how much shared memory there is, with as much as cards for games have, and with more.
#[test]
fn wide_heads_attend_with_any_shared_memory() {
    for precision in [Precision::F32, Precision::Bf16] {
        for shared_bytes in [99 * 1024, 163 * 1024] {
            let emulated = Emulated { shared_bytes, ..Emulated::default() };
            let Some(cuda) = skip::kernels(Cuda::emulated_as(precision, emulated)) else { return };
            let shapes = [(1, 70, 2, 1, 64), (1, 40, 2, 1, 96), (1, 35, 1, 1, 128), (1, 20, 1, 1, 160)];
            attends_like_the_cpu(&mut Pair::of(cuda), shapes.into_iter().map(attention_shape));
        }
    }
}

/// By wgmma and a pipeline of warpgroups, both emulated: one tile, several, and what is left of one.
#[test]
fn attention_for_hopper_is_the_cpus() {
    let emulated = Emulated { architecture: 90, ..Emulated::default() };
    let Some(cuda) = skip::kernels(Cuda::emulated_as(Precision::Bf16, emulated)) else { return };
    let mut random = drawn_shapes();
    let drawn = [64, 128, 64, 128].map(|head_dim| drawn_attention(&mut random, 100, head_dim));
    let listed = [(2, 70, 2, 1, 64), (1, 450, 1, 1, 64), (1, 300, 2, 1, 128), (1, 1, 1, 1, 128)];
    attends_like_the_cpu(&mut Pair::of(cuda), listed.into_iter().chain(drawn).map(attention_shape));
}

fn attends_like_the_cpu(pair: &mut Pair, shapes: impl IntoIterator<Item = AttentionShape>) {
    for shape in shapes {
        let rows = shape.rows();
        let qkv = pair.activations(rows * shape.qkv_width(), 1.0);
        let mut out = pair.activations(rows * shape.out_width(), 1.0);
        let mut statistics = pair.floats(rows * shape.heads * ATTENTION_STATISTICS, 1.0);
        pair.cuda.attention(shape, &qkv.cuda, &mut out.cuda, &mut statistics.cuda);
        pair.cpu.attention(shape, &qkv.cpu, &mut out.cpu, &mut statistics.cpu);
        pair.close_rows(&format!("{shape:?}"), &out, shape.out_width());
        let dout = pair.activations(rows * shape.out_width(), 1.0);
        let mut dqkv = pair.activations(rows * shape.qkv_width(), 1.0);
        let saved = (&*out.cuda, &*statistics.cuda);
        pair.cuda.attention_backward(shape, &qkv.cuda, saved, &dout.cuda, &mut dqkv.cuda);
        let saved = (&out.cpu[..], &statistics.cpu[..]);
        pair.cpu.attention_backward(shape, &qkv.cpu, saved, &dout.cpu, &mut dqkv.cpu);
        pair.close_rows(&format!("gradient {shape:?}"), &dqkv, shape.qkv_width());
    }
}

fn cached_attention(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for shape in attention_shapes(place) {
        let AttentionShape { time, .. } = shape;
        let tables = tables(&mut pair, time, shape.head_dim);
        let mut cache = pair.activations(time * shape.kv_width(), 1.0);
        let mut past = 0;
        for part in [time - time / 2, time / 2] {
            let shape = AttentionShape { batch: 1, time: part, ..shape };
            let mut qkv = pair.activations(part * shape.qkv_width(), 1.0);
            let mut out = pair.activations(part * shape.out_width(), 1.0);
            if part == 0 {
                continue;
            }
            let (cuda, cpu) = (&mut pair.cuda, &mut pair.cpu);
            cuda.cached_attention(shape, past, &tables.cuda, &mut qkv.cuda, &mut cache.cuda, &mut out.cuda);
            cpu.cached_attention(shape, past, &tables.cpu, &mut qkv.cpu, &mut cache.cpu, &mut out.cpu);
            pair.close_rows(&format!("{shape:?} after {past}"), &out, shape.out_width());
            past += part;
            pair.close_rows_to(
                &format!("cache {shape:?}"),
                &cache,
                (past * shape.kv_width(), shape.kv_width()),
            );
        }
    }
}

fn gates(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for (rows, width) in
        shapes(place, &[(1, 1), (9, 5), (33, 64), (4, 300)], &[(3000, 4096), (100, 14_336)], two_sides)
    {
        let name = format!("{rows} × {width}");
        let (gate_up, dout) = (pair.activations(rows * 2 * width, 1.0), pair.activations(rows * width, 1.0));
        let mut out = pair.activations(rows * width, 1.0);
        let (gate, mut gradient) = (pair.floats(rows, 1.0), pair.floats(rows, 1.0));
        pair.cuda.swiglu(rows, width, RowScale::One, &gate_up.cuda, &mut out.cuda);
        pair.cpu.swiglu(rows, width, RowScale::One, &gate_up.cpu, &mut out.cpu);
        pair.close_rows(&format!("swiglu {name}"), &out, width);
        pair.cuda.swiglu(rows, width, RowScale::Gate(&gate.cuda), &gate_up.cuda, &mut out.cuda);
        pair.cpu.swiglu(rows, width, RowScale::Gate(&gate.cpu), &gate_up.cpu, &mut out.cpu);
        pair.close_rows(&format!("scaled swiglu {name}"), &out, width);

        let mut wide = pair.activations(rows * 2 * width, 1.0);
        pair.cuda.swiglu_backward(rows, width, RowScaleGradient::One, &dout.cuda, &mut wide.cuda);
        pair.cpu.swiglu_backward(rows, width, RowScaleGradient::One, &dout.cpu, &mut wide.cpu);
        pair.close_rows(&format!("swiglu gradient {name}"), &wide, 2 * width);
        let mut wide = gate_up;
        let scale = RowScaleGradient::Gate { gate: &*gate.cuda, gradient: &mut *gradient.cuda };
        pair.cuda.swiglu_backward(rows, width, scale, &dout.cuda, &mut wide.cuda);
        let scale = RowScaleGradient::Gate { gate: &gate.cpu[..], gradient: &mut gradient.cpu[..] };
        pair.cpu.swiglu_backward(rows, width, scale, &dout.cpu, &mut wide.cpu);
        pair.close_rows(&format!("scaled swiglu gradient {name}"), &wide, 2 * width);
        pair.close(&format!("gradient of the scale {name}"), &gradient);

        let (mut sigma, mut gradient) = (pair.floats(rows, 2.0), pair.floats(rows, 1.0));
        pair.cuda.sigmoid(rows, &mut sigma.cuda);
        pair.cpu.sigmoid(rows, &mut sigma.cpu);
        pair.close(&format!("sigmoid {name}"), &sigma);
        pair.cuda.sigmoid_backward(rows, &sigma.cuda, &mut gradient.cuda);
        pair.cpu.sigmoid_backward(rows, &sigma.cpu, &mut gradient.cpu);
        pair.close(&format!("sigmoid gradient {name}"), &gradient);
    }
}

/// The same tokens routed on both.
struct Routed {
    shape: RouterShape,
    cuda: Routing,
    cpu: cpu::Routing,
    /// Slots in use.
    slots: usize,
}

fn routed(pair: &mut Pair, shape: RouterShape) -> Routed {
    // Room for more, as after a larger batch.
    let room = RouterShape { rows: shape.rows + 3, ..shape };
    let mut cuda = pair.cuda.allocate_routing(room).unwrap();
    let mut cpu = pair.cpu.allocate_routing(room).unwrap_or_else(|never| match never {});
    let logits = pair.floats(shape.rows * shape.experts, 1.0);
    pair.cuda.route(shape, &logits.cuda, &mut cuda);
    pair.cpu.route(shape, &logits.cpu, &mut cpu);
    let (mut found, mut expected) = (RouterStatistics::default(), RouterStatistics::default());
    pair.cuda.router_statistics(&cuda, &mut found).unwrap();
    pair.cpu.router_statistics(&cpu, &mut expected).unwrap_or_else(|never| match never {});
    assert_eq!(
        (&found.expert_tokens, found.dropped),
        (&expected.expert_tokens, expected.dropped),
        "{shape:?}"
    );
    for (found, expected) in found.probability_sums.iter().zip(&expected.probability_sums) {
        assert!((found - expected).abs() < 1e-4 * expected + 1e-6, "{shape:?}: {found} {expected}");
    }
    let (found, expected) = (pair.cuda.router_entropy(&cuda).unwrap(), pair.cpu.router_entropy(&cpu));
    let expected = expected.unwrap_or_else(|never| match never {});
    assert!((found - expected).abs() < 1e-4 * expected + 1e-6, "{shape:?}: {found} {expected}");
    let slots = shape.rows * shape.top_k - usize::try_from(expected_dropped(pair, &cpu)).unwrap();
    Routed { shape, cuda, cpu, slots }
}

fn expected_dropped(pair: &mut Pair, routing: &cpu::Routing) -> u64 {
    let mut statistics = RouterStatistics::default();
    pair.cpu.router_statistics(routing, &mut statistics).unwrap_or_else(|never| match never {});
    statistics.dropped
}

fn router_shapes(place: Place) -> Vec<RouterShape> {
    let small: [(usize, usize, usize); 6] =
        [(1, 1, 1), (5, 3, 2), (40, 8, 2), (130, 16, 4), (33, 40, 3), (300, 4, 1)];
    let large = [(5000, 8, 2), (3000, 64, 8), (2000, 200, 4)];
    let mut all = Vec::new();
    let draw = |random: &mut Random, most: usize| {
        let experts = random.up_to(most.min(200));
        (random.up_to(4 * most), experts, random.up_to(experts.min(8)))
    };
    for (rows, experts, top_k) in shapes(place, &small, &large, draw) {
        for order in [RouterOrder::SoftmaxThenTopk, RouterOrder::TopkThenSoftmax] {
            let even = (rows * top_k).div_ceil(experts);
            for capacity in [None, Some(even), Some((even / 2).max(1))] {
                all.push(RouterShape { rows, experts, top_k, order, capacity });
            }
        }
    }
    all
}

fn routing(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for shape in router_shapes(place) {
        let mut routed = routed(&mut pair, shape);
        let all = shape.rows * shape.top_k;
        for width in [5, 24] {
            let name = format!("{shape:?}, width {width}");
            let inputs = [pair.activations(shape.rows * width, 1.0), pair.floats(shape.rows * width, 1.0)];
            for x in inputs {
                let mut sorted = pair.activations(all * width, 1.0);
                pair.cuda.permute(&routed.cuda, width, &x.cuda, &mut sorted.cuda);
                pair.cpu.permute(&routed.cpu, width, &x.cpu, &mut sorted.cpu);
                pair.close_rows_to(&format!("permute {name}"), &sorted, (routed.slots * width, width));
            }
            let sorted = pair.activations(all * width, 1.0);
            for float in [false, true] {
                let len = shape.rows * width;
                let mut out = if float { pair.floats(len, 1.0) } else { pair.activations(len, 1.0) };
                pair.cuda.unpermute(&routed.cuda, width, &sorted.cuda, &mut out.cuda);
                pair.cpu.unpermute(&routed.cpu, width, &sorted.cpu, &mut out.cpu);
                pair.close_rows(&format!("unpermute {name}"), &out, width);
            }
        }
        let width = 24;
        let mut wide = pair.activations(all * 2 * width, 1.0);
        let (mut out, dout) = (pair.activations(all * width, 1.0), pair.activations(all * width, 1.0));
        pair.cuda.swiglu(all, width, RowScale::Router(&routed.cuda), &wide.cuda, &mut out.cuda);
        pair.cpu.swiglu(all, width, RowScale::Router(&routed.cpu), &wide.cpu, &mut out.cpu);
        pair.close_rows_to(&format!("swiglu {shape:?}"), &out, (routed.slots * width, width));
        let scale = RowScaleGradient::Router(&mut routed.cuda);
        pair.cuda.swiglu_backward(all, width, scale, &dout.cuda, &mut wide.cuda);
        let scale = RowScaleGradient::Router(&mut routed.cpu);
        pair.cpu.swiglu_backward(all, width, scale, &dout.cpu, &mut wide.cpu);
        pair.close_rows_to(
            &format!("swiglu gradient {shape:?}"),
            &wide,
            (routed.slots * 2 * width, 2 * width),
        );
        let mut dlogits = pair.floats(shape.rows * shape.experts, 1.0);
        pair.cuda.router_backward(0.3, &routed.cuda, &mut dlogits.cuda);
        pair.cpu.router_backward(0.3, &routed.cpu, &mut dlogits.cpu);
        // A softmax over one choice has no gradient but rounding.
        if shape.experts > 1 && (shape.top_k > 1 || shape.order == RouterOrder::SoftmaxThenTopk) {
            pair.close(&format!("router gradient {shape:?}"), &dlogits);
        }
    }
}

fn expert_products(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    // Rows, experts, top k, outputs, inputs; the last one's experts are mostly without tokens.
    let small = [(5, 3, 2, 7, 5), (40, 4, 2, 24, 16), (150, 2, 1, 136, 40), (3, 40, 2, 8, 16)];
    let large =
        [(500, 8, 2, 512, 256), (2000, 8, 2, 1000, 264), (300, 64, 4, 128, 384), (4096, 4, 2, 2048, 1024)];
    let draw = |random: &mut Random, most: usize| {
        let (experts, (rows, outputs, inputs)) = (random.up_to(most.min(60)), three_sides(random, most));
        (rows, experts, random.up_to(experts.min(4)), outputs, inputs)
    };
    for (rows, experts, top_k, outputs, inputs) in shapes(place, &small, &large, draw) {
        let even = rows * top_k / experts;
        for capacity in [None, Some(even.max(1))] {
            let order = RouterOrder::TopkThenSoftmax;
            let routed = routed(&mut pair, RouterShape { rows, experts, top_k, order, capacity });
            let name = format!("{:?}, {inputs} to {outputs}", routed.shape);
            let all = rows * top_k;
            // Aligned as a model's are, and not at all.
            for (offset, gap) in [(16, 8), (3, 5)] {
                let stride = outputs * inputs + gap;
                let weights = ExpertWeights { first: Weights { offset, outputs, inputs }, stride };
                let params = pair.factors(offset + experts * stride, 0.5);
                let (x, dy) = (pair.activations(all * inputs, 1.0), pair.activations(all * outputs, 1.0));
                let (mut y, mut dx) =
                    (pair.activations(all * outputs, 1.0), pair.activations(all * inputs, 1.0));
                let mut grad = pair.floats(params.cpu.len(), 1.0);
                let (cuda, cpu) = (&mut pair.cuda, &mut pair.cpu);
                cuda.expert_product(&params.cuda, weights, &routed.cuda, &x.cuda, &mut y.cuda);
                cpu.expert_product(&params.cpu, weights, &routed.cpu, &x.cpu, &mut y.cpu);
                let (to, from) = (&mut dx.cuda, &dy.cuda);
                cuda.expert_product_input_gradient(&params.cuda, weights, &routed.cuda, from, to);
                let (to, from) = (&mut dx.cpu, &dy.cpu);
                cpu.expert_product_input_gradient(&params.cpu, weights, &routed.cpu, from, to);
                cuda.expert_product_weight_gradient(&mut grad.cuda, weights, &routed.cuda, &dy.cuda, &x.cuda);
                cpu.expert_product_weight_gradient(&mut grad.cpu, weights, &routed.cpu, &dy.cpu, &x.cpu);
                pair.close_rows_to(&format!("product {name}"), &y, (routed.slots * outputs, outputs));
                pair.close_rows_to(&format!("input gradient {name}"), &dx, (routed.slots * inputs, inputs));
                let all = (experts, stride);
                pair.close_matrices(&format!("weight gradient {name}"), &grad, weights.first, all);
            }
        }
    }
}

fn embeddings(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    let small = [(1, 1, 1), (7, 5, 3), (100, 3, 24), (70, 300, 65), (33, 1000, 520)];
    for (rows, vocabulary, width) in
        shapes(place, &small, &[(20_000, 32_000, 256), (9000, 7, 2048)], three_sides)
    {
        let name = format!("{rows} of {vocabulary} × {width}");
        let table = Weights { offset: 4, outputs: vocabulary, inputs: width };
        let ids = Array2::from_shape_fn((1, rows), |_| pair.random.below(vocabulary) as u32);
        let mut cuda_tokens = pair.cuda.allocate_tokens(rows + 2).unwrap();
        let mut cpu_tokens = vec![0; rows + 2];
        pair.cuda.upload_tokens(ids.view(), &mut cuda_tokens);
        pair.cpu.upload_tokens(ids.view(), &mut cpu_tokens);
        let params = pair.floats(4 + vocabulary * width, 1.0);
        let (mut out, dout) = (pair.floats(rows * width, 1.0), pair.floats(rows * width, 1.0));
        let mut grad = pair.floats(4 + vocabulary * width, 1.0);
        pair.cuda.embed(&params.cuda, table, rows, &cuda_tokens, &mut out.cuda);
        pair.cpu.embed(&params.cpu, table, rows, &cpu_tokens, &mut out.cpu);
        pair.close_rows(&format!("embedding {name}"), &out, width);
        pair.cuda.embed_backward(&mut grad.cuda, table, rows, &cuda_tokens, &dout.cuda);
        pair.cpu.embed_backward(&mut grad.cpu, table, rows, &cpu_tokens, &dout.cpu);
        pair.close_matrices(&format!("embedding gradient {name}"), &grad, table, (1, 0));
    }
}

fn losses(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    for (rows, vocabulary) in shapes(
        place,
        &[(1, 2), (5, 65), (3, 1000), (2, 9001), (2, 12_288), (2, 24_576)],
        &[(500, 32_000), (40, 128_256)],
        |random, most| (random.up_to(most), 1 + random.up_to(most * most / 8)),
    ) {
        let name = format!("{rows} × {vocabulary}");
        let ids = Array2::from_shape_fn((1, rows), |_| pair.random.below(vocabulary) as u32);
        let mut cuda_tokens = pair.cuda.allocate_tokens(rows).unwrap();
        let mut cpu_tokens = vec![0; rows];
        pair.cuda.upload_tokens(ids.view(), &mut cuda_tokens);
        pair.cpu.upload_tokens(ids.view(), &mut cpu_tokens);
        let (mut logits, mut losses) = (pair.activations(rows * vocabulary, 2.0), pair.floats(rows, 1.0));
        for scale in [None, Some(0.125)] {
            let (cuda, cpu) = (&mut pair.cuda, &mut pair.cpu);
            let shape = (rows, vocabulary);
            cuda.cross_entropy(shape, &cuda_tokens, scale, &mut logits.cuda, &mut losses.cuda);
            cpu.cross_entropy(shape, &cpu_tokens, scale, &mut logits.cpu, &mut losses.cpu);
            pair.close(&format!("loss {name}"), &losses);
            pair.close_rows(&format!("logits {name}"), &logits, vocabulary);
        }
    }
}

/// The head with its loss, whole and in blocks.
fn heads(place: Place, precision: Precision) {
    let Some(mut pair) = Pair::new(place, precision) else { return };
    let small = [(1, 2, 3, 1), (7, 65, 24, 3), (33, 40, 16, 33), (40, 65, 8, 16)];
    let large = [(3000, 32_000, 512, 1024), (600, 128_256, 256, 256)];
    let draw = |random: &mut Random, most: usize| {
        let (rows, vocabulary, width) = three_sides(random, most);
        (rows, vocabulary + 1, width, random.up_to(rows))
    };
    for (rows, vocabulary, width, block_rows) in shapes(place, &small, &large, draw) {
        let name = format!("{rows} × {width} to {vocabulary} by {block_rows}");
        let weights = Weights { offset: 8, outputs: vocabulary, inputs: width };
        let head = Head { weights, rows, block_rows };
        let ids = Array2::from_shape_fn((1, rows), |_| pair.random.below(vocabulary) as u32);
        let mut cuda_tokens = pair.cuda.allocate_tokens(rows).unwrap();
        let mut cpu_tokens = vec![0; rows];
        pair.cuda.upload_tokens(ids.view(), &mut cuda_tokens);
        pair.cpu.upload_tokens(ids.view(), &mut cpu_tokens);
        let params = pair.factors(8 + vocabulary * width, 0.1);
        let (x, mut dx) = (pair.activations(rows * width, 1.0), pair.activations(rows * width, 1.0));
        let mut grad = pair.floats(params.cpu.len(), 1.0);
        let (mut logits, mut losses) =
            (pair.activations(block_rows * vocabulary, 1.0), pair.floats(rows, 1.0));
        for with_gradient in [false, true] {
            let (cuda, cpu) = (&mut pair.cuda, &mut pair.cpu);
            let (to, into) = (&mut *grad.cuda, &mut *dx.cuda);
            let gradient = with_gradient.then_some(HeadGradient { scale: 0.25, grad: to, dx: into });
            let inputs: (&Buffer, _) = (&x.cuda, &cuda_tokens);
            cuda.head_loss(&params.cuda, head, inputs, &mut logits.cuda, &mut losses.cuda, gradient);
            let (to, into) = (&mut grad.cpu[..], &mut dx.cpu[..]);
            let gradient = with_gradient.then_some(HeadGradient { scale: 0.25, grad: to, dx: into });
            let inputs = (&x.cpu[..], &cpu_tokens);
            cpu.head_loss(&params.cpu, head, inputs, &mut logits.cpu, &mut losses.cpu, gradient);
            pair.close(&format!("loss {name}"), &losses);
            pair.close_matrices(&format!("weight gradient {name}"), &grad, weights, (1, 0));
            pair.close_rows(&format!("input gradient {name}"), &dx, width);
        }
    }
}

everywhere! {
    sums, products, changed_parameters, biases, norms, rotations, attention, cached_attention, gates, routing,
    expert_products, embeddings, losses, heads
}
