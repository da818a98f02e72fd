//! The model against `transformers`: logits, loss, every gradient and the auxiliary loss of four tiny checkpoints.
//!
//! `reference.safetensors` was computed by transformers 5.23 in float32. `cargo test -- --nocapture` prints the
//! largest deviations.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

mod fixture;

use ndarray::{Array3, s};
use sanderling_common::capacity::{Capacity, CapacityConvention};
use sanderling_common::model_config::FeedForward;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::{Balancing, EvalSums, Model};

use fixture::Fixture;

const TOLERANCE: f64 = 1e-4;

/// The model of a fixture.
fn model_of(fixture: &Fixture, kernels: Cpu) -> Model<Cpu> {
    Model::new(fixture.config.clone(), kernels).unwrap()
}

/// |a − b| / |b| in the Euclidean norm.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

fn check(name: &'static str, kernels: fn() -> Cpu) {
    let fixture = Fixture::load(name);
    let mut model = model_of(&fixture, kernels());
    let ids = fixture.input_ids();
    let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));

    let logits = model.logits(&fixture.params, ids.view()).unwrap();
    let expected = Array3::from_shape_vec(logits.dim(), fixture.reference("logits")).unwrap();
    let logits = (&logits - &expected).iter().fold(0.0f32, |worst, value| worst.max(value.abs()));

    // Twice, so that nothing of one step may be left over for the next, what was dropped included.
    let capacity = Some(Capacity { factor: 0.5, convention: CapacityConvention::Slots });
    let balanced = Balancing { auxiliary: 1.0, capacity };
    let mut grad = vec![f32::NAN; model.parameters()];
    model.loss_and_grad(&fixture.params, inputs, targets, balanced, &mut grad).unwrap();
    let loss =
        model.loss_and_grad(&fixture.params, inputs, targets, Balancing::default(), &mut grad).unwrap();
    let loss = (loss.cross_entropy - f64::from(fixture.reference("loss")[0])).abs();

    let layout = fixture.config.layout().unwrap();
    let gradients = layout.tensors().iter().map(|tensor| {
        (relative(&grad[tensor.range()], &fixture.gradient(&tensor.name)), tensor.name.as_str())
    });
    let (gradient, tensor) = gradients.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();

    println!(
        "{}: largest deviation of logits {logits:.1e}, loss {loss:.1e}, of {} gradients {gradient:.1e} ({tensor})",
        fixture.name,
        layout.tensors().len()
    );
    assert!(f64::from(logits) < TOLERANCE, "logits differ by {logits}");
    assert!(loss < TOLERANCE, "the loss differs by {loss}");
    assert!(gradient < TOLERANCE, "the gradient of {tensor} differs by {gradient}");
}

/// The loss over blocks of tokens, one of them not full, is that over all; and whoever wants all logits gets them still.
#[test]
fn losses_in_blocks() {
    for name in ["llama-gqa", "llama3-rope-tied", "mixtral-e8t2"] {
        let fixture = Fixture::load(name);
        let (mut whole, mut model) = (model_of(&fixture, Cpu::new()), model_of(&fixture, Cpu::new()));
        let ids = fixture.input_ids();
        let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));
        let (params, plain) = (&fixture.params, Balancing::default());
        assert_ne!(inputs.len() % 5, 0);
        model.limit_logits(5 * fixture.config.vocab_size);
        let mut gradients = [vec![f32::NAN; model.parameters()], vec![f32::NAN; model.parameters()]];
        let [expected, grad] = &mut gradients;
        let loss = whole.loss_and_grad(params, inputs, targets, plain, expected).unwrap();
        for _ in 0..2 {
            let found = model.loss_and_grad(params, inputs, targets, plain, grad).unwrap();
            // A row's loss is computed alone.
            assert_eq!(found, loss, "{name}");
            let deviation = relative(grad, expected);
            assert!(deviation < 1e-6, "{name}: {deviation}");
            let (found, expected) =
                (model.logits(params, inputs).unwrap(), whole.logits(params, inputs).unwrap());
            assert_eq!(found, expected, "{name}");
        }
        let losses = |model: &mut Model<Cpu>| model.token_losses(params, inputs, targets).unwrap().to_owned();
        assert_eq!(losses(&mut model), losses(&mut whole), "{name}");
        assert_eq!(
            model.evaluate(params, inputs, targets).unwrap(),
            whole.evaluate(params, inputs, targets).unwrap()
        );
    }
}

#[test]
fn llama_with_grouped_queries() {
    check("llama-gqa", Cpu::new);
    check("llama-gqa", Cpu::scalar);
}

#[test]
fn llama3_rope_with_tied_embeddings() {
    check("llama3-rope-tied", Cpu::new);
    check("llama3-rope-tied", Cpu::scalar);
}

#[test]
fn mixtral() {
    check("mixtral-e8t2", Cpu::new);
    check("mixtral-e8t2", Cpu::scalar);
}

/// With biases, a shared expert, and weights that are not renormalised.
#[test]
fn qwen2_moe() {
    check("qwen2moe-e16t4", Cpu::new);
    check("qwen2moe-e16t4", Cpu::scalar);
}

/// Hugging Face's loss is k·N·Σ f̄_i·p̄_i with shares and probabilities averaged over the layers first, k at perfect
/// balance: no factor makes it of ours, so it is computed anew from the counts.
fn hugging_face_auxiliary(sums: &EvalSums, experts: usize) -> f64 {
    let mean = |of: &dyn Fn(usize) -> Vec<f64>| -> Vec<f64> {
        let layers = (0..sums.layers.len()).map(of);
        let total = layers.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
        total.iter().map(|sum| sum / sums.layers.len() as f64 / sums.tokens as f64).collect()
    };
    let per_token = mean(&|layer| {
        sums.layers[layer].statistics.expert_tokens.iter().map(|&tokens| tokens as f64).collect()
    });
    let probabilities = mean(&|layer| sums.layers[layer].statistics.probability_sums.clone());
    let dot: f64 = per_token.iter().zip(&probabilities).map(|(f, p)| f * p).sum();
    experts as f64 * dot
}

#[test]
fn mixtral_auxiliary_loss() {
    check_auxiliary_loss("mixtral-e8t2");
}

#[test]
fn qwen2_moe_auxiliary_loss() {
    check_auxiliary_loss("qwen2moe-e16t4");
}

fn check_auxiliary_loss(name: &'static str) {
    let fixture = Fixture::load(name);
    let FeedForward::Moe { experts, top_k, .. } = fixture.config.feed_forward else { panic!("a mixture") };
    let mut model = model_of(&fixture, Cpu::new());
    let ids = fixture.input_ids();
    // The targets do not matter to the router.
    let sums = model.evaluate(&fixture.params, ids.view(), ids.view()).unwrap();
    for layer in &sums.layers {
        assert_eq!(layer.statistics.expert_tokens.iter().sum::<u64>(), sums.tokens * top_k as u64);
        let entropy = layer.entropy_sum / sums.tokens as f64;
        assert!(entropy > 0.0 && entropy < (experts as f64).ln(), "{entropy} nats");
    }
    let deviation =
        (hugging_face_auxiliary(&sums, experts) - f64::from(fixture.reference("aux_loss")[0])).abs();
    println!("{name}: deviation of aux_loss {deviation:.1e}");
    assert!(deviation < 1e-5, "{deviation}");
}

#[test]
fn evaluation_agrees_with_training() {
    for name in ["llama-gqa", "mixtral-e8t2"] {
        let fixture = Fixture::load(name);
        let mut model = model_of(&fixture, Cpu::new());
        let ids = fixture.input_ids();
        let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));
        let mut grad = vec![0.0; model.parameters()];
        let step =
            model.loss_and_grad(&fixture.params, inputs, targets, Balancing::default(), &mut grad).unwrap();
        // What training drops, evaluation does not.
        let capacity = Some(Capacity { factor: 0.5, convention: CapacityConvention::Slots });
        let tight = Balancing { auxiliary: 0.0, capacity };
        let tight = model.loss_and_grad(&fixture.params, inputs, targets, tight, &mut grad).unwrap();
        assert_eq!(tight.dropped > 0.0, name == "mixtral-e8t2");
        let mut sums = EvalSums::default();
        // One sequence at a time: smaller batches in the same memory, and causal, so the sum is the same.
        for sequence in 0..ids.nrows() {
            let rows = s![sequence..sequence + 1, ..];
            sums.merge(&model.evaluate(&fixture.params, inputs.slice(rows), targets.slice(rows)).unwrap());
        }
        assert_eq!(sums.tokens as usize, inputs.len());
        assert!(sums.layers.iter().all(|layer| layer.statistics.dropped == 0));
        assert!((sums.loss() - step.cross_entropy).abs() < 1e-6, "{} {}", sums.loss(), step.cross_entropy);
    }
}

/// The parts of a pass that evaluation asks for are those of the whole.
#[test]
fn single_losses_and_logits_are_those_of_the_batch() {
    for name in ["llama-gqa", "mixtral-e8t2"] {
        let fixture = Fixture::load(name);
        let mut model = model_of(&fixture, Cpu::new());
        let ids = fixture.input_ids();
        let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));
        let sums = model.evaluate(&fixture.params, inputs, targets).unwrap();
        let losses = model.token_losses(&fixture.params, inputs, targets).unwrap().to_owned();
        assert_eq!(losses.dim(), inputs.dim());
        let sum = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        assert!((sum - sums.loss_sum).abs() < 1e-9 * sum, "{sum} {}", sums.loss_sum);

        let whole = model.logits(&fixture.params, ids.view()).unwrap().to_owned();
        let places = [(2, 0), (0, ids.ncols() - 1), (1, 3)];
        let some = model.logits_at(&fixture.params, ids.view(), &places).unwrap();
        for (row, (sequence, position)) in some.outer_iter().zip(places) {
            let expected = whole.slice(s![sequence, position, ..]);
            let worst = (&row - &expected).iter().fold(0.0f32, |worst, value| worst.max(value.abs()));
            assert!(worst < 1e-5, "{name}: {worst}");
            // The loss of a token is that of its logits.
            if position + 1 < ids.ncols() {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let log_sum = row.iter().map(|&logit| f64::from(logit - largest).exp()).sum::<f64>().ln();
                let target = ids[(sequence, position + 1)] as usize;
                let loss = f64::from(largest - row[target]) + log_sum;
                assert!((loss - f64::from(losses[(sequence, position)])).abs() < 1e-5, "{name}: {loss}");
            }
        }
    }
}
