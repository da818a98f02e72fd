//! An upcycled model computes what the dense one did, where theory says that it should.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints the deviations it found")]

use std::path::Path;

use ndarray::{Array2, s};
use sanderling_common::checkpoint::Checkpoint;
use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::model_config::{ModelConfig, RouterOrder};
use sanderling_common::origin::Dense;
use sanderling_common::upcycle::{Recipe, Scaling};
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::Model;

fn loss(config: &ModelConfig, parameters: &[f32]) -> f64 {
    let mut rng = stream(8, Purpose::Batch, 0);
    let vocabulary = config.vocab_size as f64;
    let ids = Array2::from_shape_simple_fn((6, 41), || (uniform(&mut rng) * vocabulary) as u32);
    let mut model = Model::new(config.clone(), Cpu::new()).unwrap();
    model.evaluate(parameters, ids.slice(s![.., ..-1]), ids.slice(s![.., 1..])).unwrap().loss()
}

#[test]
fn the_loss_at_the_start_is_that_of_the_dense_model() {
    for fixture in ["llama-gqa", "llama3-rope-tied"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(fixture);
        let dense = Dense::load(&Checkpoint::open(&directory).unwrap()).unwrap();
        let expected = loss(&dense.config, &dense.parameters);
        for (experts, granularity, top_k, scaling) in [
            (8, 1, 2, Scaling::Exact),
            (8, 1, 2, Scaling::None),
            (8, 1, 1, Scaling::Paper),
            (4, 1, 4, Scaling::Exact),
            (8, 2, 4, Scaling::Exact),
            (16, 4, 4, Scaling::Exact),
            (32, 8, 16, Scaling::Exact),
        ] {
            let router = RouterOrder::TopkThenSoftmax;
            let recipe = Recipe { experts, top_k, granularity, router, scaling, seed: 3 };
            let (config, parameters) = dense.upcycle(&recipe).unwrap();
            let deviation = (loss(&config, &parameters) - expected).abs();
            println!("{fixture}, E{experts} G{granularity} T{top_k}, {scaling:?}: {deviation:.1e}");
            assert!(deviation < 1e-5, "{fixture}, {recipe:?}: {deviation}");
        }
        // What the test would see: without scaling, the mixture of halves computes another function.
        let recipe = Recipe {
            experts: 8,
            top_k: 4,
            granularity: 2,
            router: RouterOrder::TopkThenSoftmax,
            scaling: Scaling::None,
            seed: 3,
        };
        let (config, parameters) = dense.upcycle(&recipe).unwrap();
        assert!((loss(&config, &parameters) - expected).abs() > 1e-3);
    }
}
