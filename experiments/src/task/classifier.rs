//! A small classifier of images with mixtures of experts, over the same kernels as the decoder.
//!
//! With x the pixels of an image, d the width, f that of an expert:
//!
//! | step | equation |
//! | --- | --- |
//! | input | h ← W_in·x + b_in |
//! | each layer | h ← h + MoE(RMSNorm(h)), SwiGLU experts chosen as the decoder's are |
//! | output | logits = W_out·RMSNorm(h) |

use std::sync::Arc;

use sanderling_common::init::{Purpose, normal_pair, stream};
use sanderling_common::layout::Layout;
use sanderling_common::model_config::RouterOrder;
use sanderling_worker::kernels::cpu::{Cpu, Routing};
use sanderling_worker::kernels::{
    ExpertWeights, Kernels, RmsNorm, RouterShape, RowScale, RowScaleGradient, Weights, Write,
};

/// The ε of every RMSNorm.
const NORM_EPS: f32 = 1e-5;

/// The sizes of a classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ClassifierShape {
    /// Pixels of an image.
    pub pixels: usize,
    /// Classes.
    pub classes: usize,
    /// d.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Experts per layer.
    pub experts: usize,
    /// Experts active per image.
    pub top_k: usize,
    /// f.
    pub expert_width: usize,
}

/// Where a layer's tensors lie.
#[derive(Clone, Copy, Debug)]
struct LayerPlan {
    norm: usize,
    router: Weights,
    gate_up: ExpertWeights,
    down: ExpertWeights,
}

/// Where everything lies.
#[derive(Clone, Debug)]
struct Plan {
    input: Weights,
    input_bias: usize,
    layers: Vec<LayerPlan>,
    norm: usize,
    output: Weights,
}

/// What a layer's forward pass leaves for its backward pass.
struct LayerActivations {
    /// (rows, d), before and after the norm; its statistics (rows).
    input: Vec<f32>,
    normed: Vec<f32>,
    inverse_rms: Vec<f32>,
    /// (rows, experts).
    logits: Vec<f32>,
    routing: Routing,
    /// In slot order: inputs (slots, d), gates and ups (slots, 2·f), SwiGLU's output (slots, f).
    sorted: Vec<f32>,
    gate_up: Vec<f32>,
    hidden: Vec<f32>,
}

/// The memory of a pass over `rows` images.
struct Workspace {
    rows: usize,
    layers: Vec<LayerActivations>,
    /// After the last layer (rows, d), its norm and the norm's statistics (rows).
    residual: Vec<f32>,
    normed: Vec<f32>,
    inverse_rms: Vec<f32>,
    /// (rows, classes), later its gradient; (rows).
    logits: Vec<f32>,
    losses: Vec<f32>,
    targets: Vec<u32>,
    /// (rows, d), (slots, d).
    delta: Vec<f32>,
    slots: Vec<f32>,
    /// Gradients: of the residual stream and of a norm's output (rows, d), of SwiGLU's output (slots, f), of the router's
    /// logits (rows, experts).
    d_residual: Vec<f32>,
    d_normed: Vec<f32>,
    d_hidden: Vec<f32>,
    d_logits: Vec<f32>,
}

/// The classifier: everything but its parameters.
pub struct Classifier {
    shape: ClassifierShape,
    layout: Arc<Layout>,
    plan: Plan,
    kernels: Cpu,
    workspace: Option<Workspace>,
}

impl Classifier {
    /// Prepares a classifier.
    ///
    /// # Panics
    /// If a size is zero, or more experts are active than there are.
    pub fn new(shape: ClassifierShape) -> Self {
        assert!(
            shape.top_k <= shape.experts,
            "{} of {} experts cannot be active",
            shape.top_k,
            shape.experts
        );
        let layout = Arc::new(layout(&shape));
        let plan = Plan::new(&shape, &layout);
        Self { shape, layout, plan, kernels: Cpu::default(), workspace: None }
    }

    /// The layout of its parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// θ0: norm weights one, biases zero, matrices normal with standard deviation 1/√inputs.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut parameters = vec![0.0; self.layout.len()];
        for (number, tensor) in self.layout.tensors().iter().enumerate() {
            let values = &mut parameters[tensor.range()];
            let &[_, inputs] = tensor.shape.as_slice() else {
                values.fill(if tensor.name.ends_with("bias") { 0.0 } else { 1.0 });
                continue;
            };
            let std = 1.0 / libm::sqrt(inputs as f64);
            let mut rng = stream(seed, Purpose::Parameters, number as u64);
            values.iter_mut().for_each(|value| *value = (std * normal_pair(&mut rng).0) as f32);
        }
        parameters
    }

    /// The mean cross-entropy of a batch, `pixels` (rows, pixels) with the class of each row, and in `grad`, which is
    /// overwritten, the gradient of it + `auxiliary` · mean over layers of the load-balancing loss.
    ///
    /// # Panics
    /// If the slices are of other lengths.
    pub fn loss_and_grad(
        &mut self,
        params: &[f32],
        pixels: &[f32],
        classes: &[u32],
        auxiliary: f32,
        grad: &mut [f32],
    ) -> f64 {
        let rows = classes.len();
        self.forward(params, pixels, classes);
        let shape = (rows, self.shape.classes);
        let Self { kernels, workspace, .. } = self;
        let work = workspace.as_mut().expect("the forward pass made it");
        kernels.cross_entropy(
            shape,
            &work.targets,
            Some(1.0 / rows as f32),
            &mut work.logits,
            &mut work.losses,
        );
        let loss = mean(&work.losses);
        self.backward(params, pixels, auxiliary, grad);
        loss
    }

    /// The sum of the cross-entropy over a batch and how many of its images are classified rightly.
    ///
    /// # Panics
    /// As [`loss_and_grad`](Self::loss_and_grad).
    pub fn evaluate(&mut self, params: &[f32], pixels: &[f32], classes: &[u32]) -> (f64, usize) {
        self.forward(params, pixels, classes);
        let width = self.shape.classes;
        let Self { kernels, workspace, .. } = self;
        let work = workspace.as_mut().expect("the forward pass made it");
        let is_right = |(logits, &class): (&[f32], &u32)| {
            // The first of equals, so that it is one class.
            let best = (1..width).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            best == class as usize
        };
        let right = work.logits.chunks(width).zip(classes).filter(|&image| is_right(image)).count();
        kernels.cross_entropy(
            (classes.len(), width),
            &work.targets,
            None,
            &mut work.logits,
            &mut work.losses,
        );
        (mean(&work.losses) * classes.len() as f64, right)
    }

    /// From the pixels to the logits.
    fn forward(&mut self, params: &[f32], pixels: &[f32], classes: &[u32]) {
        let (shape, rows) = (self.shape, classes.len());
        assert_eq!(pixels.len(), rows * shape.pixels, "{rows} images of {} pixels", shape.pixels);
        assert_eq!(params.len(), self.layout.len(), "the parameters are of another layout");
        if self.workspace.as_ref().is_none_or(|work| work.rows != rows) {
            self.workspace = Some(Workspace::new(&shape, rows));
        }
        let Self { kernels, plan, workspace, .. } = self;
        let work = workspace.as_mut().expect("it was just made");
        work.targets.copy_from_slice(classes);
        let first = &mut work.layers[0].input;
        kernels.product(params, plan.input, rows, pixels, first, Write::Replace);
        kernels.add_bias(params, plan.input_bias..plan.input_bias + shape.width, rows, first);
        for number in 0..shape.layers {
            let (layers, after) = work.layers.split_at_mut(number + 1);
            let layer = &mut layers[number];
            forward_layer(
                kernels,
                &shape,
                rows,
                &plan.layers[number],
                params,
                layer,
                (&mut work.slots, &mut work.delta),
            );
            let next = after.first_mut().map_or(&mut work.residual, |next| &mut next.input);
            kernels.add(rows * shape.width, &layer.input, &work.delta, next);
        }
        let norm = norm(plan.norm, rows, shape.width);
        kernels.rms_norm(norm, params, &work.residual, &mut work.normed, &mut work.inverse_rms);
        kernels.product(params, plan.output, rows, &work.normed, &mut work.logits, Write::Replace);
    }

    /// From the gradient of the logits to that of every parameter.
    fn backward(&mut self, params: &[f32], pixels: &[f32], auxiliary: f32, grad: &mut [f32]) {
        let shape = self.shape;
        let Self { kernels, plan, workspace, .. } = self;
        let work = workspace.as_mut().expect("a forward pass came before");
        let rows = work.rows;
        kernels.product_weight_gradient(grad, plan.output, rows, &work.logits, &work.normed);
        kernels.product_input_gradient(
            params,
            plan.output,
            rows,
            &work.logits,
            &mut work.d_normed,
            Write::Replace,
        );
        work.d_residual.fill(0.0);
        kernels.rms_norm_backward(
            norm(plan.norm, rows, shape.width),
            params,
            (&work.residual, &work.inverse_rms),
            &work.d_normed,
            &mut work.d_residual,
            grad,
        );
        let per_layer = auxiliary / shape.layers as f32;
        for number in (0..shape.layers).rev() {
            backward_layer(kernels, &shape, &plan.layers[number], params, (work, number), per_layer, grad);
        }
        let bias = plan.input_bias..plan.input_bias + shape.width;
        kernels.bias_gradient(grad, bias, rows, &work.d_residual);
        kernels.product_weight_gradient(grad, plan.input, rows, &work.d_residual, pixels);
    }
}

/// What a layer adds to the residual stream, to `delta`; `slots` is room for the experts' outputs.
fn forward_layer(
    kernels: &mut Cpu,
    shape: &ClassifierShape,
    rows: usize,
    plan: &LayerPlan,
    params: &[f32],
    layer: &mut LayerActivations,
    (slots, delta): (&mut [f32], &mut [f32]),
) {
    let (d, f) = (shape.width, shape.expert_width);
    let norm = norm(plan.norm, rows, d);
    kernels.rms_norm(norm, params, &layer.input, &mut layer.normed, &mut layer.inverse_rms);
    kernels.product(params, plan.router, rows, &layer.normed, &mut layer.logits, Write::Replace);
    kernels.route(shape.router(rows), &layer.logits, &mut layer.routing);
    kernels.permute(&layer.routing, d, &layer.normed, &mut layer.sorted);
    kernels.expert_product(params, plan.gate_up, &layer.routing, &layer.sorted, &mut layer.gate_up);
    let scale = RowScale::Router(&layer.routing);
    kernels.swiglu(rows * shape.top_k, f, scale, &layer.gate_up, &mut layer.hidden);
    kernels.expert_product(params, plan.down, &layer.routing, &layer.hidden, slots);
    kernels.unpermute(&layer.routing, d, slots, delta);
}

/// Adds to the residual stream's gradient what comes back through a layer.
fn backward_layer(
    kernels: &mut Cpu,
    shape: &ClassifierShape,
    plan: &LayerPlan,
    params: &[f32],
    (work, number): (&mut Workspace, usize),
    auxiliary: f32,
    grad: &mut [f32],
) {
    let (rows, d, f) = (work.rows, shape.width, shape.expert_width);
    let Workspace { layers, slots, d_residual, d_normed, d_hidden, d_logits, .. } = work;
    let LayerActivations { input, normed, inverse_rms, routing, sorted, gate_up, hidden, .. } =
        &mut layers[number];
    kernels.permute(routing, d, d_residual, slots);
    kernels.expert_product_weight_gradient(grad, plan.down, routing, slots, hidden);
    kernels.expert_product_input_gradient(params, plan.down, routing, slots, d_hidden);
    kernels.swiglu_backward(rows * shape.top_k, f, RowScaleGradient::Router(routing), d_hidden, gate_up);
    kernels.expert_product_weight_gradient(grad, plan.gate_up, routing, gate_up, sorted);
    kernels.expert_product_input_gradient(params, plan.gate_up, routing, gate_up, slots);
    kernels.unpermute(routing, d, slots, d_normed);
    kernels.router_backward(auxiliary, routing, d_logits);
    kernels.product_weight_gradient(grad, plan.router, rows, d_logits, normed);
    kernels.product_input_gradient(params, plan.router, rows, d_logits, d_normed, Write::Add);
    let norm = norm(plan.norm, rows, d);
    kernels.rms_norm_backward(norm, params, (input, inverse_rms), d_normed, d_residual, grad);
}

impl ClassifierShape {
    fn router(&self, rows: usize) -> RouterShape {
        let order = RouterOrder::TopkThenSoftmax;
        RouterShape { rows, experts: self.experts, top_k: self.top_k, order, capacity: None }
    }
}

impl Workspace {
    fn new(shape: &ClassifierShape, rows: usize) -> Self {
        let &ClassifierShape { classes, width: d, layers, experts, top_k, expert_width: f, .. } = shape;
        let slots = rows * top_k;
        let zeros = |len: usize| vec![0.0; len];
        let layer = || LayerActivations {
            input: zeros(rows * d),
            normed: zeros(rows * d),
            inverse_rms: zeros(rows),
            logits: zeros(rows * experts),
            routing: Cpu::default()
                .allocate_routing(shape.router(rows))
                .unwrap_or_else(|never| match never {}),
            sorted: zeros(slots * d),
            gate_up: zeros(slots * 2 * f),
            hidden: zeros(slots * f),
        };
        Self {
            rows,
            layers: (0..layers).map(|_| layer()).collect(),
            residual: zeros(rows * d),
            normed: zeros(rows * d),
            inverse_rms: zeros(rows),
            logits: zeros(rows * classes),
            losses: zeros(rows),
            targets: vec![0; rows],
            delta: zeros(rows * d),
            slots: zeros(slots * d),
            d_residual: zeros(rows * d),
            d_normed: zeros(rows * d),
            d_hidden: zeros(slots * f),
            d_logits: zeros(rows * experts),
        }
    }
}

impl Plan {
    fn new(shape: &ClassifierShape, layout: &Layout) -> Self {
        let at = |name: &str| layout.find(name).expect("the layout has the tensors of the plan").offset;
        let (d, f) = (shape.width, shape.expert_width);
        let layer = |number: usize| {
            let expert =
                |expert: usize, part: &str| at(&format!("layers.{number}.experts.{expert}.{part}.weight"));
            let experts = |part: &str, outputs, inputs| ExpertWeights {
                first: Weights { offset: expert(0, part), outputs, inputs },
                stride: if shape.experts > 1 { expert(1, part) - expert(0, part) } else { 0 },
            };
            LayerPlan {
                norm: at(&format!("layers.{number}.norm.weight")),
                router: Weights {
                    offset: at(&format!("layers.{number}.router.weight")),
                    outputs: shape.experts,
                    inputs: d,
                },
                gate_up: experts("gate_up", 2 * f, d),
                down: experts("down", d, f),
            }
        };
        Self {
            input: Weights { offset: at("input.weight"), outputs: d, inputs: shape.pixels },
            input_bias: at("input.bias"),
            layers: (0..shape.layers).map(layer).collect(),
            norm: at("norm.weight"),
            output: Weights { offset: at("output.weight"), outputs: shape.classes, inputs: d },
        }
    }
}

fn layout(shape: &ClassifierShape) -> Layout {
    let &ClassifierShape { pixels, classes, width, layers, experts, expert_width, .. } = shape;
    let mut tensors =
        vec![("input.weight".to_owned(), vec![width, pixels]), ("input.bias".to_owned(), vec![width])];
    for layer in 0..layers {
        tensors.push((format!("layers.{layer}.norm.weight"), vec![width]));
        tensors.push((format!("layers.{layer}.router.weight"), vec![experts, width]));
        for expert in 0..experts {
            let name = |part: &str| format!("layers.{layer}.experts.{expert}.{part}.weight");
            tensors.push((name("gate_up"), vec![2 * expert_width, width]));
            tensors.push((name("down"), vec![width, expert_width]));
        }
    }
    tensors.push(("norm.weight".to_owned(), vec![width]));
    tensors.push(("output.weight".to_owned(), vec![classes, width]));
    Layout::new(tensors).expect("the sizes are positive and the names differ")
}

fn norm(offset: usize, rows: usize, width: usize) -> RmsNorm {
    RmsNorm { offset, rows, width, eps: NORM_EPS }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ClassifierShape =
        ClassifierShape { pixels: 5, classes: 3, width: 8, layers: 2, experts: 4, top_k: 2, expert_width: 6 };

    fn batch(rows: usize) -> (Vec<f32>, Vec<u32>) {
        let mut rng = stream(3, Purpose::Batch, 0);
        let pixels = (0..rows * SHAPE.pixels).map(|_| normal_pair(&mut rng).0 as f32).collect();
        (pixels, (0..rows as u32).map(|row| row % 3).collect())
    }

    /// The loss in float64, written out image by image.
    fn reference(layout: &Layout, params: &[f32], pixels: &[f32], classes: &[u32]) -> f64 {
        let tensor = |name: &str| {
            let spec = layout.find(name).unwrap();
            params[spec.range()].iter().map(|&value| f64::from(value)).collect::<Vec<f64>>()
        };
        let product = |name: &str, x: &[f64]| -> Vec<f64> {
            tensor(name).chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let norm = |name: &str, x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            x.iter().zip(tensor(name)).map(|(x, w)| w * x / (mean + f64::from(NORM_EPS)).sqrt()).collect()
        };
        let image = |pixels: &[f32], class: u32| {
            let pixels: Vec<f64> = pixels.iter().map(|&pixel| f64::from(pixel)).collect();
            let mut h = product("input.weight", &pixels);
            h.iter_mut().zip(tensor("input.bias")).for_each(|(h, bias)| *h += bias);
            for layer in 0..SHAPE.layers {
                let x = norm(&format!("layers.{layer}.norm.weight"), &h);
                let logits = product(&format!("layers.{layer}.router.weight"), &x);
                let mut order: Vec<usize> = (0..SHAPE.experts).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                let chosen = &order[..SHAPE.top_k];
                let total: f64 = chosen.iter().map(|&expert| logits[expert].exp()).sum();
                for &expert in chosen {
                    let name = |part: &str| format!("layers.{layer}.experts.{expert}.{part}.weight");
                    let gate_up = product(&name("gate_up"), &x);
                    let (gate, up) = gate_up.split_at(SHAPE.expert_width);
                    let hidden: Vec<f64> =
                        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
                    let weight = logits[expert].exp() / total;
                    let out = product(&name("down"), &hidden);
                    h.iter_mut().zip(out).for_each(|(h, out)| *h += weight * out);
                }
            }
            let logits = product("output.weight", &norm("norm.weight", &h));
            logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[class as usize]
        };
        let losses = pixels.chunks(SHAPE.pixels).zip(classes).map(|(pixels, &class)| image(pixels, class));
        losses.sum::<f64>() / classes.len() as f64
    }

    #[test]
    fn the_loss_is_the_formula_written_out() {
        let mut classifier = Classifier::new(SHAPE);
        let params = classifier.initial(1);
        let (pixels, classes) = batch(7);
        let mut grad = vec![0.0; params.len()];
        let loss = classifier.loss_and_grad(&params, &pixels, &classes, 0.0, &mut grad);
        let expected = reference(&classifier.layout, &params, &pixels, &classes);
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
        let (sum, right) = classifier.evaluate(&params, &pixels, &classes);
        assert!((sum / 7.0 - expected).abs() < 1e-5 && right <= 7, "{sum} {right}");
    }

    /// Central differences of the reference, for a few elements of every tensor.
    #[test]
    fn the_gradient_is_that_of_the_formula() {
        let mut classifier = Classifier::new(SHAPE);
        let params = classifier.initial(2);
        let (pixels, classes) = batch(9);
        let mut grad = vec![0.0; params.len()];
        classifier.loss_and_grad(&params, &pixels, &classes, 0.0, &mut grad);
        let layout = classifier.layout.clone();
        for tensor in layout.tensors() {
            for at in [tensor.offset, tensor.offset + tensor.len / 2, tensor.offset + tensor.len - 1] {
                let moved = |by: f32| {
                    let mut params = params.clone();
                    params[at] += by;
                    (f64::from(params[at]), reference(&layout, &params, &pixels, &classes))
                };
                let ((high, above), (low, below)) = (moved(1e-3), moved(-1e-3));
                let expected = (above - below) / (high - low);
                let error = (f64::from(grad[at]) - expected).abs();
                assert!(
                    error < 1e-4 * (1.0 + expected.abs()),
                    "{} {at}: {} {expected}",
                    tensor.name,
                    grad[at]
                );
            }
        }
    }

    #[test]
    fn the_auxiliary_loss_has_a_gradient_of_its_own() {
        let mut classifier = Classifier::new(SHAPE);
        let params = classifier.initial(2);
        let (pixels, classes) = batch(9);
        let (mut with, mut without) = (vec![0.0; params.len()], vec![0.0; params.len()]);
        classifier.loss_and_grad(&params, &pixels, &classes, 1.0, &mut with);
        classifier.loss_and_grad(&params, &pixels, &classes, 0.0, &mut without);
        let router = classifier.layout.find("layers.1.router.weight").unwrap().range();
        assert_ne!(with[router.clone()], without[router]);
        let output = classifier.layout.find("output.weight").unwrap().range();
        assert_eq!(with[output.clone()], without[output]);
    }
}
