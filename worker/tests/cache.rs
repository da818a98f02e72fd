//! A sequence fed to a cache in pieces of any size has the logits of the whole sequence.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

use ndarray::{Array2, Array3};
use sanderling_common::init::{Purpose, normal_pair, stream, uniform};
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::{Model, ModelError};

/// Longer than what passes through the layers at a time.
const TIME: usize = 300;
const VOCAB: usize = 11;
const TOLERANCE: f32 = 1e-5;

fn config(head_dim: usize, feed_forward: FeedForward) -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        hidden_size: 22,
        layers: 2,
        heads: 6,
        kv_heads: 3,
        head_dim,
        intermediate_size: 13,
        feed_forward,
        shared_expert: None,
        qkv_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_llama3: None,
        tie_word_embeddings: false,
        context: TIME,
    }
}

/// Of every kind, with heads for the widest vectors, for narrower ones and for none.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let mixture = |router| FeedForward::Moe { experts: 5, top_k: 3, router };
    let topk = config(8, mixture(RouterOrder::TopkThenSoftmax));
    let softmax = config(32, mixture(RouterOrder::SoftmaxThenTopk));
    let dense = config(16, FeedForward::Dense);
    vec![
        ("dense", dense.clone()),
        ("dense, odd heads", config(6, FeedForward::Dense)),
        ("dense, a key head per query head", ModelConfig { kv_heads: 6, ..dense }),
        ("topk-then-softmax", topk.clone()),
        ("softmax-then-topk", softmax.clone()),
        ("topk-then-softmax, biases", ModelConfig { qkv_bias: true, ..topk }),
        ("biases, shared expert", ModelConfig { qkv_bias: true, shared_expert: Some(9), ..softmax }),
    ]
}

fn parameters(config: &ModelConfig) -> Vec<f32> {
    let mut rng = stream(5, Purpose::Parameters, 0);
    (0..config.layout().unwrap().len()).map(|_| (0.2 * normal_pair(&mut rng).0) as f32).collect()
}

fn tokens() -> Vec<u32> {
    let mut rng = stream(5, Purpose::Batch, 0);
    (0..TIME).map(|_| (uniform(&mut rng) * VOCAB as f64) as u32).collect()
}

/// Sizes that add up to the whole sequence, many of them 1.
fn pieces(index: u64) -> Vec<usize> {
    let mut rng = stream(6, Purpose::Batch, index);
    let (mut left, mut sizes) = (TIME, Vec::new());
    while left > 0 {
        let largest = if uniform(&mut rng) < 0.5 { 1.0 } else { 60.0 };
        let size = (1 + (uniform(&mut rng) * largest) as usize).min(left);
        sizes.push(size);
        left -= size;
    }
    sizes
}

fn whole(model: &mut Model<Cpu>, params: &[f32], tokens: &[u32]) -> Array3<f32> {
    let ids = Array2::from_shape_vec((1, tokens.len()), tokens.to_vec()).unwrap();
    model.logits(params, ids.view()).unwrap().to_owned()
}

fn check(name: &str, config: &ModelConfig, kernels: Cpu) {
    let (params, tokens) = (parameters(config), tokens());
    let mut model = Model::new(config.clone(), kernels).unwrap();
    let expected = whole(&mut model, &params, &tokens);
    let mut cache = model.new_cache(TIME).unwrap();
    let mut worst = 0.0f32;
    for sizes in [pieces(0), pieces(1), vec![TIME], vec![1; TIME]] {
        cache.clear();
        for size in sizes {
            let fed = cache.len();
            let logits = model.extend(&params, &mut cache, &tokens[fed..fed + size]).unwrap();
            assert_eq!(logits.len(), VOCAB);
            let row = expected.slice(ndarray::s![0, fed + size - 1, ..]);
            worst = logits.iter().zip(row).fold(worst, |worst, (a, b)| worst.max((a - b).abs()));
        }
        assert_eq!((cache.len(), cache.capacity()), (TIME, TIME));
    }
    println!("{name}: largest deviation of logits {worst:.1e}");
    assert!(worst < TOLERANCE, "{name}: logits differ by {worst}");
}

#[test]
fn pieces_have_the_logits_of_the_whole() {
    for (name, config) in configs() {
        check(name, &config, Cpu::new());
        check(&format!("{name}, scalar"), &config, Cpu::scalar());
    }
}

#[test]
fn a_cache_takes_nothing_that_it_refuses() {
    let config = config(8, FeedForward::Dense);
    let (params, tokens) = (parameters(&config), tokens());
    let mut model = Model::new(config, Cpu::new()).unwrap();
    let too_long = model.new_cache(TIME + 1).err();
    assert!(
        matches!(too_long, Some(ModelError::SequenceTooLong { time: 301, context: 300 })),
        "{too_long:?}"
    );

    let mut cache = model.new_cache(5).unwrap();
    assert!(cache.is_empty());
    model.extend(&params, &mut cache, &tokens[..3]).unwrap();
    let full = model.extend(&params, &mut cache, &tokens[3..6]).unwrap_err();
    assert!(matches!(full, ModelError::CacheFull { len: 3, tokens: 3, capacity: 5 }), "{full}");
    let empty = model.extend(&params, &mut cache, &[]).unwrap_err();
    assert!(matches!(empty, ModelError::EmptyBatch { batch: 1, time: 0 }), "{empty}");
    let unknown = model.extend(&params, &mut cache, &[1, VOCAB as u32]).unwrap_err();
    assert!(matches!(unknown, ModelError::TokenOutOfVocabulary { position: 1, .. }), "{unknown}");
    assert_eq!(cache.len(), 3);

    let logits = model.extend(&params, &mut cache, &tokens[3..5]).unwrap().to_vec();
    let expected = whole(&mut model, &params, &tokens[..5]);
    let row = expected.slice(ndarray::s![0, 4, ..]);
    assert!(logits.iter().zip(row).all(|(a, b)| (a - b).abs() < TOLERANCE), "{logits:?} {row}");
}
