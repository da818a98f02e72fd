//! Upcycling against the reference weights, bit for bit, and what a recipe refuses.
//!
//! The fixtures were made in Python from the dense model `llama-gqa`: products in float64, rounded once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use sanderling_common::checkpoint::Checkpoint;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_common::upcycle::{Recipe, Scaling, UpcycleError, Upcycled, repeat_group_rows, scales};

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The dense model that all fixtures are made of; it lies with the tests of the model itself.
fn dense() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/tests/fixtures/hf/llama-gqa"))
        .unwrap()
}

fn recipe(experts: usize, granularity: usize, top_k: usize, router: RouterOrder) -> Recipe {
    Recipe { experts, top_k, granularity, router, scaling: Scaling::Paper, seed: 7 }
}

struct Reference {
    bytes: Vec<u8>,
    weight_scale: f64,
}

impl Reference {
    fn load(name: &str) -> Self {
        let path = |ending: &str| fixtures("upcycling").join(format!("{name}.{ending}"));
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path("json")).unwrap()).unwrap();
        let weight_scale = json["weight_scale"].as_f64().unwrap();
        Self { bytes: std::fs::read(path("safetensors")).unwrap(), weight_scale }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let bytes = file.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn check(name: &str, recipe: Recipe) {
    let (dense, reference) = (dense(), Reference::load(name));
    let scale = scales(&recipe).gate;
    assert!((scale / reference.weight_scale - 1.0).abs() <= f64::EPSILON, "{name}: the scale is {scale}");
    let upcycled = Upcycled::new(&recipe, dense.config(), &dense).unwrap();
    let parameters = upcycled.parameters().unwrap();
    let tensor = |name: &str| &parameters[upcycled.layout().find(name).unwrap().range()];
    let dense_parameters = dense.load().unwrap();
    for layer in 0..dense.config().layers {
        for expert in 0..recipe.experts {
            for (ours, theirs) in [("w1", "gate"), ("w3", "up"), ("w2", "down")] {
                let ours =
                    tensor(&format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"));
                let theirs = reference.tensor(&format!("layers.{layer}.experts.{expert}.{theirs}"));
                assert!(same_bits(ours, &theirs), "{name}: layer {layer}, expert {expert}");
            }
        }
        // The fixture's rows are random; what is to be met is how they are repeated.
        let rows = reference.tensor(&format!("layers.{layer}.router_rows"));
        let repeated = repeat_group_rows(&rows, dense.config().hidden_size, recipe.granularity);
        assert!(same_bits(&repeated, &reference.tensor(&format!("layers.{layer}.router"))), "{name}: router");
    }
    for spec in upcycled.layout().tensors().iter().filter(|spec| !spec.name.contains("block_sparse_moe")) {
        let original = &dense_parameters[dense.layout().find(&spec.name).unwrap().range()];
        assert!(same_bits(tensor(&spec.name), original), "{name}: {} is copied", spec.name);
    }
}

#[test]
fn weights_are_those_of_the_reference_bit_for_bit() {
    use RouterOrder::{SoftmaxThenTopk, TopkThenSoftmax};
    check("e8g1t2-topk-then-softmax", recipe(8, 1, 2, TopkThenSoftmax));
    check("e8g1t2-softmax-then-topk", recipe(8, 1, 2, SoftmaxThenTopk));
    check("e8g2t4-topk-then-softmax", recipe(8, 2, 4, TopkThenSoftmax));
    check("e16g4t4-softmax-then-topk", recipe(16, 4, 4, SoftmaxThenTopk));
}

#[test]
fn routers_are_seeded_and_equal_within_a_virtual_group() {
    let dense = dense();
    let d = dense.config().hidden_size;
    let router = |seed: u64, layer: usize| {
        let recipe = Recipe { seed, ..recipe(16, 4, 4, RouterOrder::TopkThenSoftmax) };
        let upcycled = Upcycled::new(&recipe, dense.config(), &dense).unwrap();
        let name = format!("model.layers.{layer}.block_sparse_moe.gate.weight");
        upcycled.parameters().unwrap()[upcycled.layout().find(&name).unwrap().range()].to_vec()
    };
    assert!(same_bits(&router(1, 0), &router(1, 0)));
    assert_ne!(router(1, 0), router(2, 0));
    assert_ne!(router(1, 0), router(1, 1));
    let rows = router(1, 0);
    let rows: Vec<&[f32]> = rows.chunks_exact(d).collect();
    for expert in 0..16 {
        assert_eq!(rows[expert], rows[expert / 4 * 4]);
    }
    assert_ne!(rows[0], rows[4]);
    let spread = (rows.iter().step_by(4).flat_map(|row| row.iter()))
        .map(|value| f64::from(*value).powi(2))
        .sum::<f64>()
        / (4 * d) as f64;
    assert!((spread.sqrt() - 0.02).abs() < 0.005, "{}", spread.sqrt());
}

#[test]
fn what_does_not_fit_is_refused() {
    let dense = dense().config().clone();
    let moe = ModelConfig {
        feed_forward: FeedForward::Moe { experts: 2, top_k: 1, router: RouterOrder::TopkThenSoftmax },
        ..dense.clone()
    };
    let order = RouterOrder::TopkThenSoftmax;
    assert_eq!(recipe(8, 1, 2, order).config(&moe), Err(UpcycleError::NotDense));
    for (experts, granularity, top_k, expected) in [
        (0, 1, 2, UpcycleError::Zero("experts")),
        (8, 0, 2, UpcycleError::Zero("granularity")),
        (9, 2, 2, UpcycleError::ExpertsNotGrouped { experts: 9, granularity: 2 }),
        (8, 2, 3, UpcycleError::TopKNotGrouped { top_k: 3, granularity: 2 }),
        (10, 5, 5, UpcycleError::WidthNotDivided { width: dense.intermediate_size, granularity: 5 }),
    ] {
        assert_eq!(recipe(experts, granularity, top_k, order).config(&dense), Err(expected));
    }
    let error = recipe(4, 1, 5, order).config(&dense).unwrap_err().to_string();
    assert!(error.contains("top_k is 5"), "{error}");
}

/// A feed-forward layer in float64: the dense network, and the mixture that is to compute the same.
struct FeedForwardLayer<'a> {
    width: usize,
    hidden: usize,
    tensor: &'a dyn Fn(&str) -> Vec<f64>,
}

impl FeedForwardLayer<'_> {
    fn linear(weights: &[f64], x: &[f64]) -> Vec<f64> {
        weights.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn swiglu(&self, x: &[f64], names: [&str; 3]) -> Vec<f64> {
        let [gate, up, down] = names.map(|name| (self.tensor)(name));
        let (gate, up) = (Self::linear(&gate, x), Self::linear(&up, x));
        let hidden: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        assert_eq!((x.len(), hidden.len()), (self.width, self.hidden));
        Self::linear(&down, &hidden)
    }

    fn mixture(&self, x: &[f64], recipe: &Recipe) -> Vec<f64> {
        let logits = Self::linear(&(self.tensor)("block_sparse_moe.gate.weight"), x);
        let mut order: Vec<usize> = (0..recipe.experts).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let chosen = &order[..recipe.top_k];
        let over = |experts: &[usize]| experts.iter().map(|&e| logits[e].exp()).sum::<f64>();
        let total = match recipe.router {
            RouterOrder::TopkThenSoftmax => over(chosen),
            RouterOrder::SoftmaxThenTopk => over(&order),
        };
        let mut sum = vec![0.0; x.len()];
        for &expert in chosen {
            let name = |part: &str| format!("block_sparse_moe.experts.{expert}.{part}.weight");
            let out = self.swiglu(x, [&name("w1"), &name("w3"), &name("w2")]);
            let weight = logits[expert].exp() / total;
            sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += weight * out);
        }
        sum
    }
}

/// |mixture − dense| / |dense| of the first layer's output over inputs of unit variance.
fn output_error(recipe: &Recipe) -> f64 {
    use sanderling_common::init::{Purpose, normal_pair, stream};
    let dense = dense();
    let upcycled = Upcycled::new(recipe, dense.config(), &dense).unwrap();
    let of = |layout: &sanderling_common::layout::Layout, values: &[f32], name: &str| {
        let range = layout.find(&format!("model.layers.0.{name}")).unwrap().range();
        values[range].iter().map(|&value| f64::from(value)).collect::<Vec<_>>()
    };
    let (before, after) = (dense.load().unwrap(), upcycled.parameters().unwrap());
    let dense_tensor = |name: &str| of(dense.layout(), &before, name);
    let moe_tensor = |name: &str| of(upcycled.layout(), &after, name);
    let width = dense.config().hidden_size;
    let layer = |hidden, tensor| FeedForwardLayer { width, hidden, tensor };
    let reference = layer(dense.config().intermediate_size, &dense_tensor);
    let mixture = layer(upcycled.config().intermediate_size, &moe_tensor);
    let mut rng = stream(3, Purpose::Batch, 0);
    let (mut error, mut norm) = (0.0, 0.0);
    for _ in 0..200 {
        let x: Vec<f64> = (0..width / 2).flat_map(|_| <[f64; 2]>::from(normal_pair(&mut rng))).collect();
        let expected =
            reference.swiglu(&x, ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]);
        for (out, expected) in mixture.mixture(&x, recipe).iter().zip(&expected) {
            error += (out - expected).powi(2);
            norm += expected.powi(2);
        }
    }
    f64::sqrt(error / norm)
}

/// What the weight scalings leave of the dense network's output at the start.
#[test]
fn output_errors_are_those_known_of_the_scalings() {
    use RouterOrder::{SoftmaxThenTopk, TopkThenSoftmax};
    let check = |(experts, granularity, top_k), router, scaling, expected: std::ops::Range<f64>| {
        let recipe = Recipe { scaling, ..recipe(experts, granularity, top_k, router) };
        let error = output_error(&recipe);
        println!("{recipe:?}: {error:.1e}");
        assert!(expected.contains(&error), "{recipe:?}: {error}, expected {expected:?}");
    };
    check((8, 1, 2), TopkThenSoftmax, Scaling::None, 0.0..1e-6);
    for scaling in [Scaling::Paper, Scaling::Exact] {
        check((8, 1, 2), TopkThenSoftmax, scaling, 0.0..1e-6);
    }
    check((16, 4, 4), TopkThenSoftmax, Scaling::Exact, 0.0..1e-6);
    check((16, 4, 4), TopkThenSoftmax, Scaling::Paper, 0.1..0.3);
    check((16, 4, 4), TopkThenSoftmax, Scaling::None, 0.7..0.8);
    check((8, 1, 2), SoftmaxThenTopk, Scaling::None, 0.6..0.8);
    check((8, 1, 2), SoftmaxThenTopk, Scaling::Exact, 0.05..0.3);
    check((8, 1, 2), SoftmaxThenTopk, Scaling::Paper, 0.15..0.45);
    check((16, 4, 4), SoftmaxThenTopk, Scaling::Exact, 0.02..0.2);
    check((16, 4, 4), SoftmaxThenTopk, Scaling::Paper, 0.25..0.55);
    check((16, 4, 4), SoftmaxThenTopk, Scaling::None, 0.85..0.97);
}
