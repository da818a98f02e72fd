//! Runs that start from a checkpoint: gone on from, or upcycled by server and workers each.

use std::path::Path;

use sanderling_common::checkpoint::{self, Checkpoint, TOKENIZER_FILE};
use sanderling_common::corpus::{Characters, SHAKESPEARE};
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_common::upcycle::{Recipe, Scaling, Upcycled};
use sanderling_server::net::{Server, ServerError};
use sanderling_worker::net::WorkerOptions;

use crate::support::{Scene, Serving, options, worker, worker_with};

/// A dense model for the scene's text, with a vocabulary that is padded, as many are.
fn dense(directory: &Path) -> ModelConfig {
    let config = ModelConfig {
        vocab_size: 80,
        hidden_size: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        intermediate_size: 64,
        feed_forward: FeedForward::Dense,
        shared_expert: None,
        qkv_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_llama3: None,
        tie_word_embeddings: false,
        context: 64,
    };
    let parameters = initial_parameters(&config, 5).unwrap();
    let tokenizer = tokenizer(SHAKESPEARE);
    checkpoint::save(directory, &config, &parameters, &[(TOKENIZER_FILE, &tokenizer)]).unwrap();
    config
}

fn tokenizer(text: &str) -> Vec<u8> {
    serde_json::to_vec(&Characters::of(text).tokenizer_json()).unwrap()
}

/// The scene without the shape that its run states.
fn scene(steps: u64, settings: impl FnOnce(&Path) -> String) -> (Scene, ModelConfig) {
    let scene = Scene::shapeless(steps);
    let directory = scene.path("dense");
    let config = dense(&directory);
    let settings = settings(&directory);
    (scene.with(&settings), config)
}

fn upcycled(granularity: usize) -> impl FnOnce(&Path) -> String {
    move |dense| {
        format!(
            "[model]\nexperts = 4\ntop_k = 2\n[upcycle]\ndense = '{}'\ngranularity = {granularity}\n\
             [training]\neval_every = 300\n[server]\nshards = 2",
            dense.display()
        )
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_from_a_checkpoint() {
    // The checkpoint has learnt nothing yet, and takes the rate of a run from scratch.
    let settings =
        |dense: &Path| format!("[model]\ninit = '{}'\n[training]\nlearning_rate = 2e-3", dense.display());
    let (scene, config) = scene(30, settings);
    let serving = Serving::start(&scene);
    let workers: Vec<_> = (0..2).map(|_| worker(&serving.join)).collect();
    let outcome = serving.outcome().await;
    assert_eq!(outcome.model, config);
    assert!(outcome.summary.val_loss.unwrap() < 4.3, "{:?}", outcome.summary.val_loss);
    assert_eq!(Checkpoint::open(&outcome.checkpoint).unwrap().config(), &config);
    for worker in workers {
        worker.await.unwrap().unwrap();
    }
}

/// Server, a worker that finds the dense model where the run says, one that has it elsewhere, and one that joins late
/// and has to fetch it: all make the same mixture, and their models stay what the server takes them for (checked every
/// five pushes).
#[tokio::test(flavor = "multi_thread")]
async fn everyone_upcycles_to_the_same_bits() {
    // Enough that the run is not over before the second worker is there.
    let (scene, config) = scene(1200, upcycled(2));
    let mut serving = Serving::start(&scene);
    let elsewhere = scene.path("elsewhere");
    std::fs::rename(scene.path("dense"), &elsewhere).unwrap();
    let has_it = worker_with(&serving.join, WorkerOptions { dense: Some(elsewhere), ..options() });
    serving.reach(40).await;
    let has_it_not = worker(&serving.join);
    let outcome = serving.outcome().await;
    assert_eq!(outcome.model.intermediate_size, config.intermediate_size / 2);
    assert_eq!((outcome.summary.steps, outcome.summary.sessions), (1200, 2));
    assert!(outcome.summary.val_loss.unwrap() < 4.3, "{:?}", outcome.summary.val_loss);
    assert_eq!(has_it.await.unwrap().unwrap().reconnects, 0);
    let late = has_it_not.await.unwrap().unwrap();
    assert_eq!((late.reconnects, late.sessions), (0, 1));
    let resolved = std::fs::read_to_string(scene.results().join("run.toml")).unwrap();
    assert!(
        resolved.contains("dense_sha256 = \"") && !resolved.contains("dense_sha256 = \"\""),
        "{resolved}"
    );
}

/// A worker that makes the mixture itself is never sent the whole of it, also not to evaluate it twice and to test it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_downloads_the_mixture() {
    let (scene, _) = scene(6, upcycled(1));
    let scene = scene.with("[training]\neval_every = 3");
    let serving = Serving::start(&scene);
    let has_it = worker(&serving.join);
    let summary = serving.outcome().await.summary;
    has_it.await.unwrap().unwrap();
    assert!(summary.test_loss.is_some(), "{summary:?}");
    let (sent_bytes, mixture_bytes) = (summary.traffic.bytes_down, 4 * summary.subject.parameters);
    assert!(sent_bytes < mixture_bytes, "{sent_bytes} of {mixture_bytes} bytes");
}

/// The run's first model is the one that `upcycle` writes for the same recipe.
#[tokio::test(flavor = "multi_thread")]
async fn online_and_offline_upcycling_agree() {
    let (scene, config) = scene(1, upcycled(1));
    let checkpoint = Checkpoint::open(&scene.path("dense")).unwrap();
    let recipe = Recipe {
        experts: 4,
        top_k: 2,
        granularity: 1,
        router: RouterOrder::TopkThenSoftmax,
        scaling: Scaling::Exact,
        seed: 1337,
    };
    let offline = Upcycled::new(&recipe, &config, &checkpoint).unwrap().parameters().unwrap();
    let serving = Serving::start(&scene);
    serving.stop.send_replace(true);
    let outcome = serving.outcome().await;
    assert_eq!(outcome.summary.steps, 0);
    assert!(outcome.parameters.iter().zip(&offline).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_dense_model_and_tokens_that_the_model_does_not_know_are_refused() {
    let (scene_of_other, _) = scene(1, |dense| {
        upcycled(1)(dense).replace("granularity = 1\n", "granularity = 1\ndense_sha256 = 'abcd'\n")
    });
    let refused = Server::start(scene_of_other.resolved(), None).err().expect("it is another model");
    assert!(matches!(refused, ServerError::Origin(_)) && refused.to_string().contains("abcd"), "{refused}");

    let (scene, _) = scene(1, |dense| format!("[model]\ninit = '{}'", dense.display()));
    let file = scene.path("dense").join(TOKENIZER_FILE);
    let characters: String = (0..200).map(|i| char::from_u32(0x400 + i).unwrap()).collect();
    std::fs::write(&file, tokenizer(&characters)).unwrap();
    let refused = Server::start(scene.resolved(), None).err().expect("there are too many tokens").to_string();
    assert!([TOKENIZER_FILE, "200", "80"].iter().all(|part| refused.contains(part)), "{refused}");
    std::fs::remove_file(&file).unwrap();
    let refused = Server::start(scene.resolved(), None).err().expect("there is no tokenizer").to_string();
    assert!(refused.contains(TOKENIZER_FILE) && refused.contains("token file"), "{refused}");
}
