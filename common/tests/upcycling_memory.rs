//! Upcycling needs the memory of a tensor, not of a model. A test binary of its own, because its allocator counts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints what it measured")]

use std::ops::ControlFlow;

use peak_alloc::PeakAlloc;
use sanderling_common::checkpoint::{self, Checkpoint, WriteOptions, stored_bytes};
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_common::upcycle::{Recipe, Scaling, Upcycled};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

#[test]
fn the_peak_stays_far_below_one_layers_output() {
    let folder = tempfile::tempdir().unwrap();
    let (dense_path, out) = (folder.path().join("dense"), folder.path().join("out"));
    let config = ModelConfig {
        vocab_size: 512,
        hidden_size: 128,
        layers: 6,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        intermediate_size: 1024,
        feed_forward: FeedForward::Dense,
        shared_expert: None,
        qkv_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_llama3: None,
        tie_word_embeddings: true,
        context: 64,
    };
    checkpoint::save(&dense_path, &config, &initial_parameters(&config, 1).unwrap(), &[]).unwrap();
    let recipe = Recipe {
        experts: 16,
        top_k: 2,
        granularity: 1,
        router: RouterOrder::TopkThenSoftmax,
        scaling: Scaling::Exact,
        seed: 1,
    };

    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    let dense = Checkpoint::open(&dense_path).unwrap();
    let upcycled = Upcycled::new(&recipe, dense.config(), &dense).unwrap();
    let options = WriteOptions { shard_bytes_max: 8 << 20, ..WriteOptions::default() };
    let mut keep_going = |_| ControlFlow::Continue(());
    checkpoint::write(&out, upcycled.config(), &options, &upcycled, &mut keep_going).unwrap();
    let peak = HEAP.peak_usage() - before;

    let tensor = 4 * config.hidden_size * config.intermediate_size;
    let layer = 3 * recipe.experts * tensor;
    let whole = stored_bytes(upcycled.config(), options.stored_type) as usize;
    // The largest tensor as it is stored, the writer's buffer of a megabyte, names and headers.
    let bound = tensor + (2 << 20);
    println!("heap {peak} of at most {bound} bytes; a layer has {layer}, the model {whole}");
    assert!(peak < bound && bound < layer && 5 * layer < whole, "{peak} of {bound}, {layer}, {whole}");
    assert_eq!(checkpoint::load(&out).unwrap().1, upcycled.parameters().unwrap());
}
