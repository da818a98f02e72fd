//! Training speed of the model on a GPU, per step and per kernel.
//!
//!     cargo bench -p sanderling-worker --bench cuda_model -- --config e8t2 --batch 8
//!
//! `dense` has the shape of a model of 1B parameters, `e8t2` eight experts of which two serve each token, with as many
//! active ones, and `layer` is the expert layer alone in the size of Llama 3's 8B. A step is the forward and the backward
//! pass with the gradient of every parameter; the step of a method is not part of it. FLOPs count products and attention,
//! forward and backward as three times forward, over the peak of the device's tensor cores. JSON lines go to standard
//! output, and tables to standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints what it measures")]

use std::collections::BTreeMap;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use ndarray::Array2;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_worker::kernels::cuda::{Buffer, Cuda, CudaError, MemoryNeeded, Precision, Spent};
use sanderling_worker::kernels::{ExpertWeights, Kernels, RouterShape, RowScale, RowScaleGradient, Weights};
use sanderling_worker::model::{Balancing, Model, forward_flops_per_token};

/// Memory that scratch, cuBLASLt's workspace and the driver take beside what is estimated, in bytes.
const RESERVE_BYTES: usize = 3 << 30;

/// Floats of the block that parameters are made of, again and again: odd, so that it falls differently into every matrix.
const BLOCK: usize = (1 << 22) + 17;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shape {
    Dense,
    E8t2,
    Layer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Number {
    F32,
    Tf32,
    Bf16,
}

/// Training speed of the model on a GPU.
#[derive(Debug, Parser)]
struct Options {
    /// What to measure; everything if nothing is named.
    #[arg(long, value_enum)]
    config: Vec<Shape>,
    /// Sequences of a batch; as many as fit if it is not given.
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a sequence, and a fourth of those of the layer alone.
    #[arg(long, default_value_t = 4096)]
    time: usize,
    /// What products multiply.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: Number,
    /// Steps that are measured, after two that are not.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Layers of the model.
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Peak of the device in TFLOP/s, if it is not one that is known.
    #[arg(long)]
    peak: Option<f64>,
    /// The number of the GPU.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut options = Options::parse();
    let precision = match options.precision {
        Number::F32 => Precision::F32,
        Number::Tf32 => Precision::Tf32,
        Number::Bf16 => Precision::Bf16,
    };
    if options.config.is_empty() {
        options.config = vec![Shape::Dense, Shape::E8t2, Shape::Layer];
    }
    for &shape in &options.config {
        let kernels = match Cuda::new(options.device, precision) {
            Ok(kernels) => kernels,
            Err(error @ (CudaError::MissingLibrary(_) | CudaError::NoDevice { .. })) => {
                eprintln!("SKIPPED: {error}");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let measured = match shape {
            Shape::Layer => layer(&options, kernels),
            Shape::Dense | Shape::E8t2 => model(&options, shape, kernels),
        };
        if let Err(error) = measured {
            eprintln!("{shape:?}: {error}");
            println!("{}", serde_json::json!({ "config": format!("{shape:?}"), "error": error.to_string() }));
        }
    }
    Ok(())
}

/// Dense TFLOP/s of the tensor cores (of the plain ones for float32), by NVIDIA's data sheets.
fn peak(kernels: &Cuda, options: &Options) -> f64 {
    let name = &kernels.properties().name;
    let bf16 = match name {
        name if name.contains("H100 PCIe") => 756.0,
        name if name.contains("H100") || name.contains("H200") || name.contains("GH200") => 989.4,
        name if name.contains("A100") => 312.0,
        _ => f64::NAN,
    };
    let share = match options.precision {
        Number::Bf16 => 1.0,
        Number::Tf32 => 0.5,
        Number::F32 => 67.0 / 989.4,
    };
    options.peak.unwrap_or(bf16 * share) * 1e12
}

fn config(options: &Options, shape: Shape) -> ModelConfig {
    let (intermediate_size, feed_forward) = match shape {
        Shape::E8t2 => {
            (4096, FeedForward::Moe { experts: 8, top_k: 2, router: RouterOrder::TopkThenSoftmax })
        }
        Shape::Dense | Shape::Layer => (8192, FeedForward::Dense),
    };
    ModelConfig {
        vocab_size: 32_000,
        hidden_size: 2048,
        layers: options.layers,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate_size,
        feed_forward,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_llama3: None,
        tie_word_embeddings: false,
        shared_expert: None,
        qkv_bias: false,
        context: options.time,
    }
}

/// The largest batch for which the estimate fits.
fn largest_batch(config: &ModelConfig, precision: Precision, time: usize, free: usize) -> usize {
    let fits = |batch: usize| {
        MemoryNeeded::new(config, precision, batch * time)
            .is_ok_and(|needed| needed.bytes() + RESERVE_BYTES <= free)
    };
    (1..1024).take_while(|&batch| fits(batch)).last().unwrap_or(0)
}

/// About normal, of standard deviation 0.02, from a small block.
fn fill(kernels: &mut Cuda, buffer: &mut Buffer) -> Result<(), CudaError> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let block: Vec<f32> =
        (0..BLOCK.min(buffer.len())).map(|_| 0.04 * (uniform() + uniform() + uniform())).collect();
    let mut first = 0;
    while first < buffer.len() {
        let count = block.len().min(buffer.len() - first);
        kernels.upload_at(&block[..count], buffer, first);
        first += count;
    }
    kernels.wait()
}

fn model(options: &Options, shape: Shape, mut kernels: Cuda) -> Result<(), Failure> {
    let config = config(options, shape);
    let (precision, free) = (kernels.precision(), kernels.free_bytes()?);
    let fits = largest_batch(&config, precision, options.time, free);
    let batch = options.batch.unwrap_or(fits);
    let needed = MemoryNeeded::new(&config, precision, batch.max(1) * options.time)?;
    let gigabytes = |bytes: usize| bytes as f64 / 1e9;
    eprintln!(
        "\n{shape:?} on {}: batch {batch} × {} needs {:.1} GB ({:.1} for the model, {:.1} for the step), {:.1} GB are free",
        kernels.properties().name,
        options.time,
        gigabytes(needed.bytes()),
        gigabytes(needed.model),
        gigabytes(needed.step),
        gigabytes(free)
    );
    if batch == 0 || needed.bytes() > free {
        let (needed, free) = (gigabytes(needed.bytes()), gigabytes(free));
        return Err(
            format!("{needed:.1} GB are needed and {free:.1} are free: a batch of {fits} would fit").into()
        );
    }
    let peak = peak(&kernels, options);
    let layout = config.layout()?;
    let mut params = kernels.allocate_factors(layout.len())?;
    fill(&mut kernels, &mut params)?;
    for tensor in layout.tensors().iter().filter(|tensor| tensor.name.ends_with("norm.weight")) {
        kernels.upload_at(&vec![1.0; tensor.len], &mut params, tensor.offset);
    }
    let mut grad = kernels.allocate(layout.len())?;
    let vocabulary = config.vocab_size;
    let ids = Array2::from_shape_fn((batch, options.time + 1), |(b, t)| {
        ((b * 7919 + t * t * 31 + t * 1299 + b * t) % vocabulary) as u32
    });
    let (inputs, targets) = (ids.slice(ndarray::s![.., ..-1]), ids.slice(ndarray::s![.., 1..]));
    let mut model = Model::new(config.clone(), kernels)?;
    let balancing = Balancing { auxiliary: 0.01, capacity: None };
    let mut loss = f64::NAN;
    let mut step = |model: &mut Model<Cuda>, params: &mut Buffer| -> Result<f64, Failure> {
        let start = Instant::now();
        // A method's step would have changed them, so that products read them anew.
        model.kernels_mut().upload_at(&[0.01], params, 0);
        loss = model.loss_and_grad(params, inputs, targets, balancing, &mut grad)?.cross_entropy;
        model.kernels_mut().wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    for _ in 0..2 {
        step(&mut model, &mut params)?;
    }
    let seconds: Vec<f64> =
        (0..options.steps).map(|_| step(&mut model, &mut params)).collect::<Result<_, _>>()?;
    model.kernels_mut().start_timing();
    let timed_steps = 2;
    for _ in 0..timed_steps {
        step(&mut model, &mut params)?;
    }
    let spent = model.kernels_mut().stop_timing()?;
    let held = model.kernels_mut().held_bytes();

    let tokens = (batch * options.time) as f64;
    let mut sorted = seconds;
    sorted.sort_by(f64::total_cmp);
    let (median, best) = (sorted[sorted.len() / 2], sorted[0]);
    let flops = |causal| 3.0 * tokens * forward_flops_per_token(&config, options.time, causal);
    let mfu = |causal| flops(causal) / median / peak;
    eprintln!(
        "{} parameters, loss {loss:.3}: median {:.1} ms, best {:.1} ms, {:.0} tokens/s, MFU {:.1} % causal, {:.1} % with full \
         attention, of {:.1} TFLOP/s",
        layout.len(),
        median * 1e3,
        best * 1e3,
        tokens / median,
        100.0 * mfu(true),
        100.0 * mfu(false),
        peak / 1e12
    );
    table(&spent, timed_steps);
    println!(
        "{}",
        serde_json::json!({
            "config": format!("{shape:?}"),
            "device": model.kernels_mut().properties().name,
            "precision": format!("{precision:?}"),
            "parameters": layout.len(),
            "batch": batch,
            "time": options.time,
            "loss": loss,
            "median_ms": median * 1e3,
            "best_ms": best * 1e3,
            "tokens_per_second": tokens / median,
            "mfu_causal": mfu(true),
            "mfu_full": mfu(false),
            "peak_tflops": peak / 1e12,
            "held_bytes": held,
            "estimated_bytes": needed.bytes(),
            "kernels_ms": milliseconds(&spent, timed_steps),
        })
    );
    Ok(())
}

fn milliseconds(spent: &BTreeMap<&'static str, Spent>, steps: usize) -> BTreeMap<&'static str, f64> {
    spent.iter().map(|(&name, spent)| (name, spent.ms / steps as f64)).collect()
}

fn table(spent: &BTreeMap<&'static str, Spent>, steps: usize) {
    let total: f64 = spent.values().map(|spent| spent.ms).sum();
    let mut kernels: Vec<_> = spent.iter().collect();
    kernels.sort_by(|a, b| b.1.ms.total_cmp(&a.1.ms));
    for (name, spent) in kernels {
        eprintln!(
            "  {name:<40}{:>9.3} ms {:>5.1} %  {:>5} calls  {:>9.1} µs/call",
            spent.ms / steps as f64,
            100.0 * spent.ms / total,
            spent.calls / steps as u64,
            1e3 * spent.ms / spent.calls as f64
        );
    }
    eprintln!("  {:<40}{:>9.3} ms", "all kernels", total / steps as f64);
}

/// The expert layer of Llama 3's 8B size with eight experts: from the normed tokens to the gradient of them.
fn layer(options: &Options, mut kernels: Cuda) -> Result<(), Failure> {
    let (d, f, experts, top_k, rows) = (4096, 14_336, 8, 2, 4 * options.time);
    let (precision, slots) = (kernels.precision(), rows * top_k);
    let peak = peak(&kernels, options);
    let shape = RouterShape { rows, experts, top_k, order: RouterOrder::TopkThenSoftmax, capacity: None };
    let stride = 3 * d * f;
    let gate_up = ExpertWeights { first: Weights { offset: 0, outputs: 2 * f, inputs: d }, stride };
    let down = ExpertWeights { first: Weights { offset: 2 * f * d, outputs: d, inputs: f }, stride };
    let mut params = kernels.allocate_factors(experts * stride)?;
    fill(&mut kernels, &mut params)?;
    let mut grad = kernels.allocate(experts * stride)?;
    let mut routing = kernels.allocate_routing(shape)?;
    let (mut logits, mut dlogits) = (kernels.allocate(rows * experts)?, kernels.allocate(rows * experts)?);
    fill(&mut kernels, &mut logits)?;
    let mut x = kernels.allocate_activations(rows * d)?;
    fill(&mut kernels, &mut x)?;
    let mut dy = kernels.allocate_factors(rows * d)?;
    fill(&mut kernels, &mut dy)?;
    let mut y = kernels.allocate_activations(rows * d)?;
    let mut sorted = kernels.allocate_activations(slots * d)?;
    let mut wide = kernels.allocate_activations(slots * 2 * f)?;
    let mut hidden = kernels.allocate_activations(slots * f)?;
    let mut outputs = kernels.allocate_activations(slots * d)?;
    let mut dhidden = kernels.allocate_activations(slots * f)?;
    let mut step = |kernels: &mut Cuda| -> Result<f64, CudaError> {
        let start = Instant::now();
        kernels.route(shape, &logits, &mut routing);
        kernels.permute(&routing, d, &x, &mut sorted);
        kernels.expert_product(&params, gate_up, &routing, &sorted, &mut wide);
        kernels.swiglu(slots, f, RowScale::Router(&routing), &wide, &mut hidden);
        kernels.expert_product(&params, down, &routing, &hidden, &mut outputs);
        kernels.unpermute(&routing, d, &outputs, &mut y);
        kernels.permute(&routing, d, &dy, &mut outputs);
        kernels.expert_product_weight_gradient(&mut grad, down, &routing, &outputs, &hidden);
        kernels.expert_product_input_gradient(&params, down, &routing, &outputs, &mut dhidden);
        kernels.swiglu_backward(slots, f, RowScaleGradient::Router(&mut routing), &dhidden, &mut wide);
        kernels.expert_product_weight_gradient(&mut grad, gate_up, &routing, &wide, &sorted);
        kernels.expert_product_input_gradient(&params, gate_up, &routing, &wide, &mut outputs);
        kernels.unpermute(&routing, d, &outputs, &mut y);
        kernels.router_backward(0.01, &routing, &mut dlogits);
        kernels.wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    for _ in 0..2 {
        step(&mut kernels)?;
    }
    let mut seconds: Vec<f64> = (0..options.steps).map(|_| step(&mut kernels)).collect::<Result<_, _>>()?;
    kernels.start_timing();
    let timed_steps = 2;
    for _ in 0..timed_steps {
        step(&mut kernels)?;
    }
    let spent = kernels.stop_timing()?;
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let flops = 3.0 * 2.0 * slots as f64 * (3 * d * f) as f64;
    eprintln!(
        "\nExpert layer {d} × {f}, {experts} experts, top-{top_k}, {rows} tokens on {}: median {:.2} ms, best {:.2} ms, {:.1} \
         TFLOP/s, MFU {:.1} % of {:.1} TFLOP/s",
        kernels.properties().name,
        median * 1e3,
        seconds[0] * 1e3,
        flops / median / 1e12,
        100.0 * flops / median / peak,
        peak / 1e12
    );
    table(&spent, timed_steps);
    println!(
        "{}",
        serde_json::json!({
            "config": "layer",
            "device": kernels.properties().name,
            "precision": format!("{precision:?}"),
            "tokens": rows,
            "median_ms": median * 1e3,
            "best_ms": seconds[0] * 1e3,
            "tflops": flops / median / 1e12,
            "mfu": flops / median / peak,
            "peak_tflops": peak / 1e12,
            "kernels_ms": milliseconds(&spent, timed_steps),
        })
    );
    Ok(())
}
