//! Upcycling against the reference weights, bit for bit, and what a recipe refuses.
//!
//! The fixtures were made in Python from the dense model `llama-gqa`: products in float64, rounded once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

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
