//! A step of training, made again and again over any kernels.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::bail;
use ndarray::Array2;
use sanderling_common::model_config::{ModelConfig, RouterOrder};
use sanderling_worker::kernels::timed::{Clocked, SpentByKernel};
use sanderling_worker::kernels::{ExpertWeights, RouterShape, RowScale, RowScaleGradient, Weights};
use sanderling_worker::model::{Balancing, Model};

use super::shape::LayerShape;
use crate::work::{Unit, Work};

/// Floats of the block that parameters are made of, again and again: odd, so that it falls differently into every matrix.
const BLOCK: usize = (1 << 22) + 17;

/// Steps before those that count: kernels are compiled and memory is taken in them.
const STEPS_BEFORE: u64 = 2;

/// Steps whose kernels are timed one by one, after those that count.
const STEPS_TIMED: u64 = 2;

/// Coefficient of the load-balancing loss, as `train` has it.
const AUXILIARY: f32 = 0.01;

/// What the steps took.
pub(super) struct Measured {
    /// Seconds of every step, ascending.
    pub(super) seconds: Vec<f64>,
    /// Of one step, on average.
    pub(super) kernels: SpentByKernel,
    /// Of the last step; `None` where there is no loss.
    pub(super) loss: Option<f64>,
}

impl Measured {
    pub(super) fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
}

/// Makes steps, some that do not count, those that do, and some with a clock around every kernel.
fn measure<S, K: Clocked>(
    subject: &mut S,
    kernels: impl Fn(&mut S) -> &mut K,
    steps: u64,
    mut step: impl FnMut(&mut S) -> anyhow::Result<()>,
) -> anyhow::Result<(Vec<f64>, SpentByKernel)> {
    let mut work = Work::begin("measuring", STEPS_BEFORE + steps + STEPS_TIMED, Unit::Count("steps"))?;
    let mut seconds = Vec::new();
    for number in 0..STEPS_BEFORE + steps + STEPS_TIMED {
        if number == STEPS_BEFORE + steps {
            kernels(subject).start_timing();
        }
        let start = Instant::now();
        step(subject)?;
        kernels(subject).wait()?;
        if (STEPS_BEFORE..STEPS_BEFORE + steps).contains(&number) {
            seconds.push(start.elapsed().as_secs_f64());
        }
        if let ControlFlow::Break(()) = work.at(number + 1) {
            bail!("stopped");
        }
    }
    work.end();
    let mut spent = kernels(subject).stop_timing()?;
    for spent in spent.values_mut() {
        spent.ms /= STEPS_TIMED as f64;
        spent.calls /= STEPS_TIMED;
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds, spent))
}

/// About normal, of standard deviation 0.02, from a small block.
fn fill<K: Clocked>(kernels: &mut K, buffer: &mut K::Buffer, len: usize) -> Result<(), K::Error> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let block: Vec<f32> = (0..BLOCK.min(len)).map(|_| 0.04 * (uniform() + uniform() + uniform())).collect();
    let mut first = 0;
    while first < len {
        let count = block.len().min(len - first);
        kernels.upload_at(&block[..count], buffer, first);
        first += count;
    }
    kernels.wait()
}

/// Forward and backward pass of a model on `batch` sequences, with the gradient of every parameter. The step of a method is not
/// part of it.
pub(super) fn measure_model<K: Clocked>(
    mut kernels: K,
    config: &ModelConfig,
    batch: usize,
    steps: u64,
) -> anyhow::Result<Measured> {
    let layout = config.layout()?;
    let mut params = kernels.allocate_factors(layout.len())?;
    fill(&mut kernels, &mut params, layout.len())?;
    for tensor in layout.tensors().iter().filter(|tensor| tensor.name.ends_with("norm.weight")) {
        kernels.upload_at(&vec![1.0; tensor.len], &mut params, tensor.offset);
    }
    let mut grad = kernels.allocate(layout.len())?;
    let vocabulary = config.vocab_size;
    let ids = Array2::from_shape_fn((batch, config.context + 1), |(b, t)| {
        ((b * 7919 + t * t * 31 + t * 1299 + b * t) % vocabulary) as u32
    });
    let (inputs, targets) = (ids.slice(ndarray::s![.., ..-1]), ids.slice(ndarray::s![.., 1..]));
    let mut model = Model::new(config.clone(), kernels)?;
    let balancing = Balancing { auxiliary: AUXILIARY, capacity: None };
    let mut loss = f64::NAN;
    let (seconds, kernels) = measure(&mut model, Model::kernels_mut, steps, |model| {
        // A method's step would have changed them, so that products read them anew.
        model.kernels_mut().upload_at(&[0.01], &mut params, 0);
        loss = model.loss_and_grad(&params, inputs, targets, balancing, &mut grad)?.cross_entropy;
        Ok(())
    })?;
    Ok(Measured { seconds, kernels, loss: Some(loss) })
}

/// The expert layer alone, from the normed tokens to the gradient of them.
pub(super) fn measure_layer<K: Clocked>(
    mut kernels: K,
    layer: LayerShape,
    steps: u64,
) -> anyhow::Result<Measured> {
    let LayerShape { hidden_size: d, intermediate_size: f, experts, top_k, rows } = layer;
    let (slots, stride) = (layer.slots(), layer.stride());
    let shape = RouterShape { rows, experts, top_k, order: RouterOrder::TopkThenSoftmax, capacity: None };
    let gate_up = ExpertWeights { first: Weights { offset: 0, outputs: 2 * f, inputs: d }, stride };
    let down = ExpertWeights { first: Weights { offset: 2 * f * d, outputs: d, inputs: f }, stride };
    let mut params = kernels.allocate_factors(experts * stride)?;
    fill(&mut kernels, &mut params, experts * stride)?;
    let mut grad = kernels.allocate(experts * stride)?;
    let mut routing = kernels.allocate_routing(shape)?;
    let (mut logits, mut dlogits) = (kernels.allocate(rows * experts)?, kernels.allocate(rows * experts)?);
    fill(&mut kernels, &mut logits, rows * experts)?;
    let mut x = kernels.allocate_activations(rows * d)?;
    fill(&mut kernels, &mut x, rows * d)?;
    let mut dy = kernels.allocate_factors(rows * d)?;
    fill(&mut kernels, &mut dy, rows * d)?;
    let mut y = kernels.allocate_activations(rows * d)?;
    let mut sorted = kernels.allocate_activations(slots * d)?;
    let mut wide = kernels.allocate_activations(slots * 2 * f)?;
    let mut hidden = kernels.allocate_activations(slots * f)?;
    let mut outputs = kernels.allocate_activations(slots * d)?;
    let mut dhidden = kernels.allocate_activations(slots * f)?;
    let (seconds, kernels) = measure(
        &mut kernels,
        |kernels| kernels,
        steps,
        |kernels| {
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
            kernels.router_backward(AUXILIARY, &routing, &mut dlogits);
            Ok(())
        },
    )?;
    Ok(Measured { seconds, kernels, loss: None })
}

#[cfg(test)]
#[path = "../../../worker/tests/skip/mod.rs"]
mod skip;

#[cfg(test)]
mod tests {
    use sanderling_worker::kernels::cuda::{Cuda, Precision};
    use sanderling_worker::kernels::timed::TimedCpu;

    use super::super::shape::Shape;
    use super::*;

    #[test]
    fn every_step_and_every_kernel_is_timed() {
        let config = Shape::Default.config(Some(1), 16).unwrap();
        let measured = measure_model(TimedCpu::default(), &config, 2, 3).unwrap();
        assert_eq!(measured.seconds.len(), 3);
        assert!(measured.seconds.is_sorted() && measured.median() > 0.0);
        // Parameters of nothing in particular know nothing of the text.
        let loss = measured.loss.unwrap();
        assert!((loss - (config.vocab_size as f64).ln()).abs() < 1.0, "{loss}");
        assert_eq!(measured.kernels["attention"].calls, 1);
        assert_eq!(measured.kernels["expert_product"].calls, 2);
        let in_kernels: f64 = measured.kernels.values().map(|spent| spent.ms).sum();
        assert!(in_kernels > 0.0);
    }

    /// A GPU's half of the command: its kernels are timed by name, and come to the loss that the CPU's do.
    #[test]
    fn an_emulated_gpu_is_measured_like_the_cpu() {
        let Some(cuda) = skip::kernels(Cuda::emulated(Precision::Bf16)) else { return };
        let config = Shape::Default.config(Some(1), 8).unwrap();
        let on_cpu = measure_model(TimedCpu::default(), &config, 1, 1).unwrap().loss.unwrap();
        let measured = measure_model(cuda.beside(), &config, 1, 2).unwrap();
        assert_eq!(measured.seconds.len(), 2);
        let loss = measured.loss.unwrap();
        assert!((loss / on_cpu - 1.0).abs() < 2e-2, "{loss} and {on_cpu}");
        assert_eq!(measured.kernels["attention_forward"].calls, 1);
        let layer = LayerShape { hidden_size: 16, intermediate_size: 24, experts: 4, top_k: 2, rows: 20 };
        let measured = measure_layer(cuda, layer, 1).unwrap();
        assert_eq!(measured.kernels["route_choose"].calls, 1);
    }

    #[test]
    fn the_layer_alone_has_the_layers_products() {
        let layer = LayerShape { hidden_size: 16, intermediate_size: 24, experts: 4, top_k: 2, rows: 20 };
        let measured = measure_layer(TimedCpu::default(), layer, 1).unwrap();
        assert_eq!((measured.seconds.len(), measured.loss), (1, None));
        for (name, calls) in [
            ("expert_product", 2),
            ("expert_product_weight_gradient", 2),
            ("route", 1),
            ("router_backward", 1),
        ] {
            assert_eq!(measured.kernels[name].calls, calls, "{name}");
        }
        assert!(!measured.kernels.contains_key("attention"));
    }
}
