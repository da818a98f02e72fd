//! A clock around every operation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use ndarray::ArrayView2;

use super::cpu::Cpu;
use super::{
    AttentionShape, ExpertWeights, Head, HeadGradient, Kernels, RmsNorm, Rotation, RouterShape,
    RouterStatistics, RowScale, RowScaleGradient, Weights, Write,
};

/// What an operation took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// All calls together, in milliseconds.
    pub ms: f64,
    /// How many there were.
    pub calls: u64,
}

/// Time and calls by operation.
pub type SpentByKernel = BTreeMap<&'static str, Spent>;

/// Kernels that can tell how long each of them takes.
pub trait Clocked: Kernels {
    /// Begins to measure every operation from now on.
    fn start_timing(&mut self);
    /// What each operation took since [`start_timing`](Self::start_timing), which ends.
    ///
    /// # Errors
    /// If the device failed.
    fn stop_timing(&mut self) -> Result<SpentByKernel, Self::Error>;
    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// The first failure since the last wait.
    fn wait(&mut self) -> Result<(), Self::Error>;
}

/// The CPU's kernels with a clock around each. Those that are methods of the trait by default count as what they call.
#[derive(Debug, Default)]
pub struct TimedCpu {
    cpu: Cpu,
    spent: Option<SpentByKernel>,
}

impl Clocked for TimedCpu {
    fn start_timing(&mut self) {
        self.spent = Some(SpentByKernel::new());
    }

    fn stop_timing(&mut self) -> Result<SpentByKernel, Self::Error> {
        Ok(self.spent.take().unwrap_or_default())
    }

    fn wait(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

type Outcome<T> = Result<T, <Cpu as Kernels>::Error>;
type Routing = <Cpu as Kernels>::Routing;

macro_rules! timed {
    ($($name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {
        impl Kernels for TimedCpu {
            type Buffer = [f32];
            type Storage = Vec<f32>;
            type Tokens = Vec<u32>;
            type Routing = Routing;
            type Error = <Cpu as Kernels>::Error;
            $(
                fn $name(&mut self, $($argument: $kind),*) $(-> $result)? {
                    let start = Instant::now();
                    let result = self.cpu.$name($($argument),*);
                    if let Some(spent) = &mut self.spent {
                        let spent = spent.entry(stringify!($name)).or_default();
                        spent.ms += start.elapsed().as_secs_f64() * 1e3;
                        spent.calls += 1;
                    }
                    result
                }
            )*
        }
    };
}

timed! {
    allocate(len: usize) -> Outcome<Vec<f32>>;
    allocate_tokens(rows: usize) -> Outcome<Vec<u32>>;
    allocate_routing(shape: RouterShape) -> Outcome<Routing>;
    upload_at(values: &[f32], buffer: &mut [f32], first: usize);
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
    head_loss(
        params: &[f32], head: Head, inputs: (&[f32], &Vec<u32>), logits: &mut [f32], losses: &mut [f32],
        gradient: Option<HeadGradient<'_, [f32]>>
    );
}
