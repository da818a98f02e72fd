//! The model against a decoder in float64: losses, and every tensor's gradient against central differences.
//!
//! Sizes are odd on purpose: no width is a multiple of a vector, and the sequences are longer than a block of
//! attention. Runs with vector and with scalar code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

mod reference;

use ndarray::Array2;
use sanderling_common::capacity::{Capacity, CapacityConvention};
use sanderling_common::init::{Purpose, normal_pair, stream, uniform};
use sanderling_common::layout::Layout;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::{Balancing, Model, StepLoss};

use reference::Reference;

const SEQUENCES: usize = 2;
const TIME: usize = 37;

/// Half the distance of the two points of a central difference.
const EPSILON: f64 = 1e-6;

/// Of a tensor's directional derivative, relative to the norm of its gradient.
const TOLERANCE: f64 = 1e-4;

fn config(feed_forward: FeedForward) -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 22,
        layers: 2,
        heads: 6,
        kv_heads: 3,
        head_dim: 6,
        intermediate_size: 13,
        feed_forward,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_llama3: None,
        tie_word_embeddings: matches!(feed_forward, FeedForward::Dense),
        shared_expert: None,
        qkv_bias: false,
        context: TIME,
    }
}

fn mixture(router: RouterOrder) -> ModelConfig {
    config(FeedForward::Moe { experts: 5, top_k: 3, router })
}

/// Qwen2-MoE's additions: biases of queries, keys and values, and a shared expert of another width.
fn with_shared_expert(router: RouterOrder) -> ModelConfig {
    ModelConfig { qkv_bias: true, shared_expert: Some(9), ..mixture(router) }
}

/// Parameters large enough for every path to matter.
fn parameters(layout: &Layout) -> Vec<f32> {
    let mut rng = stream(5, Purpose::Parameters, 0);
    (0..layout.len()).map(|_| (0.3 * normal_pair(&mut rng).0) as f32).collect()
}

fn tokens(index: u64, vocab: usize) -> Vec<Vec<u32>> {
    let mut rng = stream(5, Purpose::Batch, index);
    let mut sequence = || (0..TIME).map(|_| (uniform(&mut rng) * vocab as f64) as u32).collect();
    (0..SEQUENCES).map(|_| sequence()).collect()
}

fn array(tokens: &[Vec<u32>]) -> Array2<u32> {
    Array2::from_shape_fn((SEQUENCES, TIME), |(row, column)| tokens[row][column])
}

struct Case {
    config: ModelConfig,
    layout: Layout,
    params: Vec<f32>,
    inputs: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    balancing: Balancing,
}

impl Case {
    fn new(config: ModelConfig, auxiliary: f32) -> Self {
        let layout = config.layout().unwrap();
        let (inputs, targets) = (tokens(0, config.vocab_size), tokens(1, config.vocab_size));
        let balancing = Balancing { auxiliary, capacity: None };
        Self { params: parameters(&layout), layout, inputs, targets, balancing, config }
    }

    /// With experts that drop what is over this many times their share of the tokens.
    fn with_capacity(mut self, factor: f64) -> Self {
        self.balancing.capacity = Some(Capacity { factor, convention: CapacityConvention::Tokens });
        self
    }

    fn gradient(&self, kernels: Cpu) -> (StepLoss, Vec<f32>) {
        let mut model = Model::new(self.config.clone(), kernels).unwrap();
        let mut grad = vec![f32::NAN; self.layout.len()];
        let (inputs, targets) = (array(&self.inputs), array(&self.targets));
        let loss = model
            .loss_and_grad(&self.params, inputs.view(), targets.view(), self.balancing, &mut grad)
            .unwrap();
        (loss, grad)
    }

    fn reference<'a>(&'a self, params: &'a [f64]) -> Reference<'a> {
        let aux_coefficient = f64::from(self.balancing.auxiliary);
        let factor = self.balancing.capacity.map(|capacity| capacity.factor);
        Reference { config: &self.config, layout: &self.layout, params, aux_coefficient, factor }
    }

    /// The derivative of the objective along `direction`, which is zero outside one tensor.
    fn derivative(&self, direction: &[f64]) -> f64 {
        let at = |step: f64| {
            let moved = self.params.iter().zip(direction).map(|(&p, d)| f64::from(p) + step * d);
            let moved: Vec<f64> = moved.collect();
            self.reference(&moved).objective(&self.inputs, &self.targets)
        };
        (at(EPSILON) - at(-EPSILON)) / (2.0 * EPSILON)
    }

    fn check(&self, name: &str, kernels: Cpu) {
        let (loss, grad) = self.gradient(kernels);
        let exact: Vec<f64> = self.params.iter().copied().map(f64::from).collect();
        let losses = self.reference(&exact).losses(&self.inputs, &self.targets);
        assert!((loss.cross_entropy - losses.cross_entropy).abs() < 1e-5, "{name}: {loss:?}, {losses:?}");
        assert!((loss.auxiliary - losses.auxiliary).abs() < 1e-5, "{name}: {loss:?}, {losses:?}");
        assert!((loss.dropped - losses.dropped).abs() < 1e-12, "{name}: {loss:?}, {losses:?}");
        assert_eq!(loss.dropped > 0.0, self.balancing.capacity.is_some(), "{name}: {loss:?}");
        let mut rng = stream(7, Purpose::Parameters, 1);
        let mut worst = (0.0, String::new());
        for tensor in self.layout.tensors() {
            let mut direction = vec![0.0; self.layout.len()];
            direction[tensor.range()].iter_mut().for_each(|d| *d = normal_pair(&mut rng).0);
            let ours: f64 = grad.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
            let norm = grad[tensor.range()].iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let deviation = (ours - self.derivative(&direction)).abs() / norm.max(1e-6);
            if deviation > worst.0 {
                worst = (deviation, tensor.name.clone());
            }
        }
        println!(
            "{name}: largest deviation of {} gradients {:.1e} ({})",
            self.layout.tensors().len(),
            worst.0,
            worst.1
        );
        assert!(worst.0 < TOLERANCE, "{name}: {worst:?}");
    }

    fn check_both(&self, name: &str) {
        self.check(name, Cpu::new());
        self.check(&format!("{name}, scalar"), Cpu::scalar());
    }
}

#[test]
fn dense() {
    Case::new(config(FeedForward::Dense), 0.0).check_both("dense");
}

#[test]
fn topk_then_softmax() {
    Case::new(mixture(RouterOrder::TopkThenSoftmax), 0.0).check_both("topk-then-softmax");
}

#[test]
fn softmax_then_topk() {
    Case::new(mixture(RouterOrder::SoftmaxThenTopk), 0.0).check_both("softmax-then-topk");
}

#[test]
fn biases() {
    let config = ModelConfig { qkv_bias: true, ..config(FeedForward::Dense) };
    Case::new(config, 0.0).check_both("dense, biases");
}

#[test]
fn biases_and_a_shared_expert() {
    for router in [RouterOrder::TopkThenSoftmax, RouterOrder::SoftmaxThenTopk] {
        Case::new(with_shared_expert(router), 0.1).check_both(&format!("{router:?}, biases, shared expert"));
    }
}

/// A large coefficient, so that the auxiliary loss dominates the router's gradient.
#[test]
fn load_balancing_loss() {
    Case::new(mixture(RouterOrder::TopkThenSoftmax), 10.0).check_both("topk-then-softmax, auxiliary");
    Case::new(mixture(RouterOrder::SoftmaxThenTopk), 10.0).check_both("softmax-then-topk, auxiliary");
}

/// Some tokens lose one expert, some all of them.
#[test]
fn dropped_tokens() {
    for router in [RouterOrder::TopkThenSoftmax, RouterOrder::SoftmaxThenTopk] {
        Case::new(mixture(router), 0.1).with_capacity(2.0).check_both(&format!("{router:?}, capacity 2"));
        Case::new(mixture(router), 10.0).with_capacity(0.3).check_both(&format!("{router:?}, capacity 0.3"));
        let case = Case::new(with_shared_expert(router), 0.0).with_capacity(0.0);
        case.check_both(&format!("{router:?}, shared expert, one token per expert"));
    }
}

/// A capacity that no expert reaches changes no bit.
#[test]
fn room_enough_drops_nothing() {
    let config = mixture(RouterOrder::TopkThenSoftmax);
    let case = Case::new(config.clone(), 0.1).with_capacity(5.0);
    assert_eq!(case.gradient(Cpu::new()), Case::new(config, 0.1).gradient(Cpu::new()));
}

/// Vector and scalar code differ by rounding alone, in every element.
#[test]
fn vector_code_agrees_with_scalar_code() {
    for config in [
        mixture(RouterOrder::TopkThenSoftmax),
        mixture(RouterOrder::SoftmaxThenTopk),
        with_shared_expert(RouterOrder::SoftmaxThenTopk),
    ] {
        let case = Case::new(config, 0.1);
        let (vector, scalar) = (case.gradient(Cpu::new()).1, case.gradient(Cpu::scalar()).1);
        let largest = scalar.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
        for (index, (v, s)) in vector.iter().zip(&scalar).enumerate() {
            assert!((v - s).abs() <= 1e-5 * largest, "element {index}: {v} and {s}");
        }
    }
}
