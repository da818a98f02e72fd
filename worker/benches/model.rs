//! Training speed of the model on one thread, per step and per kernel.
//!
//!     cargo bench -p sanderling-worker --bench model
//!
//! Prints tokens/s of `loss_and_grad`, and the share and rate of every kernel. Times are the median over the steps;
//! FLOPs count products and causal attention, forward and backward as three times forward.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it measures")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use ndarray::{Array2, ArrayView2};
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_worker::kernels::cpu::{Cpu, Routing};
use sanderling_worker::kernels::{
    AttentionShape, ExpertWeights, Kernels, RmsNorm, Rotation, RouterShape, RouterStatistics, RowScale,
    RowScaleGradient, Weights, Write,
};
use sanderling_worker::model::{Balancing, Model, forward_flops_per_token};

const STEPS: usize = 41;

/// The CPU kernels with a clock around each.
#[derive(Default)]
struct Timed {
    cpu: Cpu,
    spent: BTreeMap<&'static str, (Duration, u32)>,
}

macro_rules! timed {
    ($($name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {
        impl Kernels for Timed {
            type Buffer = [f32];
            type Storage = Vec<f32>;
            type Tokens = Vec<u32>;
            type Routing = Routing;
            type Error = <Cpu as Kernels>::Error;
            $(
                fn $name(&mut self, $($argument: $kind),*) $(-> $result)? {
                    let start = Instant::now();
                    let result = self.cpu.$name($($argument),*);
                    let spent = self.spent.entry(stringify!($name)).or_default();
                    spent.0 += start.elapsed();
                    spent.1 += 1;
                    result
                }
            )*
        }
    };
}

type Outcome<T> = Result<T, <Cpu as Kernels>::Error>;

timed! {
    allocate(len: usize) -> Outcome<Vec<f32>>;
    allocate_tokens(rows: usize) -> Outcome<Vec<u32>>;
    allocate_routing(shape: RouterShape) -> Outcome<Routing>;
    upload(values: &[f32], buffer: &mut [f32]);
    upload_tokens(ids: ArrayView2<'_, u32>, tokens: &mut Vec<u32>);
    download(buffer: &[f32], values: &mut [f32]) -> Outcome<()>;
    sum(values: &[f32], len: usize) -> Outcome<f64>;
    zero(buffer: &mut [f32], range: Range<usize>);
    add(len: usize, a: &[f32], b: &[f32], out: &mut [f32]);
    product(params: &[f32], weights: Weights, rows: usize, x: &[f32], y: &mut [f32], write: Write);
    add_bias(params: &[f32], bias: Range<usize>, rows: usize, y: &mut [f32]);
    bias_gradient(grad: &mut [f32], bias: Range<usize>, rows: usize, dy: &[f32]);
    product_input_gradient(params: &[f32], weights: Weights, rows: usize, dy: &[f32], dx: &mut [f32], write: Write);
    product_weight_gradient(grad: &mut [f32], weights: Weights, rows: usize, dy: &[f32], x: &[f32]);
    expert_product(params: &[f32], weights: ExpertWeights, routing: &Routing, x: &[f32], y: &mut [f32]);
    expert_product_input_gradient(
        params: &[f32], weights: ExpertWeights, routing: &Routing, dy: &[f32], dx: &mut [f32]
    );
    expert_product_weight_gradient(
        grad: &mut [f32], weights: ExpertWeights, routing: &Routing, dy: &[f32], x: &[f32]
    );
    rms_norm(norm: RmsNorm, params: &[f32], x: &[f32], y: &mut [f32], inverse_rms: &mut [f32]);
    rms_norm_backward(
        norm: RmsNorm, params: &[f32], saved: (&[f32], &[f32]), dy: &[f32], dx: &mut [f32], grad: &mut [f32]
    );
    rotary(shape: AttentionShape, tables: &[f32], rotation: Rotation, qkv: &mut [f32]);
    attention(shape: AttentionShape, qkv: &[f32], out: &mut [f32], statistics: &mut [f32]);
    attention_backward(
        shape: AttentionShape, qkv: &[f32], saved: (&[f32], &[f32]), dout: &[f32], dqkv: &mut [f32]
    );
    cached_attention(
        shape: AttentionShape, past: usize, tables: &[f32], qkv: &mut [f32], cache: &mut [f32], out: &mut [f32]
    );
    swiglu(rows: usize, width: usize, scale: RowScale<'_, Routing, [f32]>, gate_up: &[f32], out: &mut [f32]);
    swiglu_backward(
        rows: usize, width: usize, scale: RowScaleGradient<'_, Routing, [f32]>, dout: &[f32], gate_up: &mut [f32]
    );
    sigmoid(len: usize, values: &mut [f32]);
    sigmoid_backward(len: usize, sigma: &[f32], gradient: &mut [f32]);
    route(shape: RouterShape, logits: &[f32], routing: &mut Routing);
    router_backward(auxiliary: f32, routing: &Routing, dlogits: &mut [f32]);
    router_statistics(routing: &Routing, statistics: &mut RouterStatistics) -> Outcome<()>;
    router_entropy(routing: &Routing) -> Outcome<f64>;
    permute(routing: &Routing, width: usize, x: &[f32], sorted: &mut [f32]);
    unpermute(routing: &Routing, width: usize, sorted: &[f32], out: &mut [f32]);
    embed(params: &[f32], table: Weights, rows: usize, tokens: &Vec<u32>, out: &mut [f32]);
    embed_backward(grad: &mut [f32], table: Weights, rows: usize, tokens: &Vec<u32>, dout: &[f32]);
    cross_entropy(
        shape: (usize, usize), targets: &Vec<u32>, gradient_scale: Option<f32>, logits: &mut [f32],
        losses: &mut [f32]
    );
}

fn config(kv_heads: usize, intermediate_size: usize, feed_forward: FeedForward) -> ModelConfig {
    ModelConfig {
        vocab_size: 65,
        hidden_size: 128,
        layers: 4,
        heads: 4,
        kv_heads,
        head_dim: 32,
        intermediate_size,
        feed_forward,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_llama3: None,
        tie_word_embeddings: true,
        shared_expert: None,
        qkv_bias: false,
        context: 128,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let moe = FeedForward::Moe { experts: 8, top_k: 2, router: RouterOrder::TopkThenSoftmax };
    let models = [
        ("dense 4 × 128, FFN 344", config(4, 344, FeedForward::Dense), 12, 64),
        ("8 experts top-2 of 128", config(2, 128, moe), 12, 64),
        ("8 experts top-2 of 128", config(2, 128, moe), 8, 128),
    ];
    for (name, config, batch, time) in models {
        bench(name, &config, batch, time)?;
    }
    Ok(())
}

fn bench(
    name: &str,
    config: &ModelConfig,
    batch: usize,
    time: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let params = initial_parameters(config, 1)?;
    let mut grad = vec![0.0; params.len()];
    let ids = Array2::from_shape_fn((batch, time + 1), |(b, t)| ((b * 31 + t * t * 7) % 65) as u32);
    let (inputs, targets) = (ids.slice(ndarray::s![.., ..-1]), ids.slice(ndarray::s![.., 1..]));
    let mut model = Model::new(config.clone(), Timed::default())?;
    let balancing = Balancing { auxiliary: 0.01, capacity: None };
    let mut seconds = Vec::new();
    for step in 0..STEPS {
        if step == 3 {
            model.kernels_mut().spent.clear();
            seconds.clear();
        }
        let start = Instant::now();
        model.loss_and_grad(&params, inputs, targets, balancing, &mut grad)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (median, best) = (seconds[seconds.len() / 2], seconds[0]);
    let tokens = (batch * time) as f64;
    let flops = 3.0 * tokens * forward_flops_per_token(config, time, true);
    println!(
        "\n{name}, {} parameters, batch {batch} × {time}: median {:.1} ms, {:.0} tokens/s, {:.1} GFLOP/s; best {:.1} ms, \
         {:.0} tokens/s, {:.1} GFLOP/s",
        params.len(),
        median * 1e3,
        tokens / median,
        flops / median / 1e9,
        best * 1e3,
        tokens / best,
        flops / best / 1e9
    );
    let steps = seconds.len() as f64;
    let total: f64 = seconds.iter().sum();
    let mut kernels: Vec<_> = std::mem::take(&mut model.kernels_mut().spent).into_iter().collect();
    kernels.sort_by_key(|(_, (spent, _))| std::cmp::Reverse(*spent));
    for (kernel, (spent, calls)) in kernels {
        let spent = spent.as_secs_f64();
        println!(
            "  {kernel:<32}{:>8.3} ms {:>5.1} %  {:>6.1} µs/call",
            spent / steps * 1e3,
            spent / total * 100.0,
            spent / f64::from(calls) * 1e6
        );
    }
    Ok(())
}
