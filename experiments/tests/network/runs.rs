//! Whole runs.

use std::fs;
use std::time::Duration;

use sanderling_common::checkpoint;
use sanderling_common::corpus::{Corpus, SHAKESPEARE};
use sanderling_common::tokenizer::{Tokenizer, pieces};
use sanderling_server::results::Evaluation;

use crate::support::{PATIENCE, Scene, Serving, worker};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_and_several_workers_train_to_the_end() {
    let scene = Scene::new(60).with("[training]\neval_every = 20\n[server]\nshards = 2");
    let serving = Serving::start(&scene);
    let workers: Vec<_> = (0..3).map(|_| worker(&serving.join)).collect();
    let outcome = serving.outcome().await;

    let summary = &outcome.summary;
    assert!(summary.completed);
    assert_eq!((summary.steps, summary.skipped, summary.tokens), (60, 0, 60 * 2 * 32));
    assert_eq!(summary.subject.workers, 3);
    assert!(summary.best_val_loss.unwrap() <= summary.val_loss.unwrap());
    assert!(summary.test_loss.unwrap() < 5.0);
    assert!(summary.traffic.bytes_up > 0 && summary.traffic.bytes_down > 0);
    assert_eq!(summary.traffic.dense_bytes_up, 4 * summary.subject.parameters * 60);

    let mut exchanges = 0;
    for worker in workers {
        let report = worker.await.unwrap().unwrap();
        assert_eq!((report.sessions, report.reconnects, report.stopped), (1, 0, false));
        exchanges += report.exchanges;
    }
    assert_eq!(exchanges, 60);

    let curve = fs::read_to_string(scene.results().join("metrics.jsonl")).unwrap();
    let curve: Vec<Evaluation> = curve.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(curve.iter().map(|line| line.steps).collect::<Vec<_>>(), [20, 40, 60]);
    for line in &curve {
        assert_eq!((line.expert_share.len(), line.expert_share[0].len()), (1, 4));
        assert!((line.expert_share[0].iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
    assert!(curve[2].val_loss < curve[0].val_loss, "{curve:?}");
    let (config, parameters) = checkpoint::load(&outcome.checkpoint).unwrap();
    assert_eq!((config, parameters), (outcome.model, outcome.parameters));
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_workers_do_every_batch_once_too() {
    let scene = Scene::new(40).with("[training]\noverlap = true");
    let serving = Serving::start(&scene);
    let workers: Vec<_> = (0..2).map(|_| worker(&serving.join)).collect();
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.completed), (40, true));
    for worker in workers {
        worker.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_runs() {
    for method in ["asgd", "gd-async", "dgc-async", "dgs", "msgd", "dgs-adam"] {
        let scene = Scene::new(12).with(&format!("[run]\nworkers = 1\n[training]\nmethod = '{method}'"));
        let serving = Serving::start(&scene);
        let worker = worker(&serving.join);
        let summary = serving.outcome().await.summary;
        assert_eq!((summary.steps, summary.subject.method.as_str()), (12, method));
        assert!(summary.val_loss.unwrap() < 5.0, "{method}: {:?}", summary.val_loss);
        worker.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_stopped_leaves_a_checkpoint_and_workers_go_home() {
    let scene = Scene::new(100_000);
    let mut serving = Serving::start(&scene);
    let workers: Vec<_> = (0..2).map(|_| worker(&serving.join)).collect();
    serving.reach(30).await;
    serving.stop.send_replace(true);
    let outcome = serving.outcome().await;
    let summary = &outcome.summary;
    assert!(!summary.completed && summary.steps >= 30, "{summary:?}");
    // What was trained until then was still evaluated.
    assert_eq!((summary.best_step, summary.skipped), (summary.steps, 0));
    assert!(summary.val_loss.is_some() && summary.test_loss.is_some(), "{summary:?}");
    checkpoint::load(&outcome.checkpoint).unwrap();
    assert!(scene.results().join("summary.json").exists());
    for worker in workers {
        worker.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_train_on_a_token_file_that_only_the_server_has() {
    let text = &SHAKESPEARE[..60_000];
    let tokenizer = Tokenizer::train(pieces(text, 1 << 12).map(str::to_owned), 320).unwrap();
    // The vocabulary of the model is padded, and tells a token file from a text.
    let corpus = Corpus::with_tokenizer(text.as_bytes(), &tokenizer, 333).unwrap();
    let scene = Scene::new(30).with_text("plays.tok", corpus.bytes());
    let serving = Serving::start(&scene);
    let workers: Vec<_> = (0..2).map(|_| worker(&serving.join)).collect();
    let outcome = serving.outcome().await;
    assert_eq!((outcome.summary.steps, outcome.summary.completed), (30, true));
    assert_eq!(outcome.model.vocab_size, 333);
    assert!(outcome.summary.val_loss.unwrap() < 333f64.ln() + 0.2, "{:?}", outcome.summary.val_loss);
    assert_eq!(outcome.corpus.sha256(), corpus.sha256());
    assert_eq!(fs::read(outcome.checkpoint.join("tokenizer.json")).unwrap(), tokenizer.json());
    for worker in workers {
        let report = worker.await.unwrap().unwrap();
        assert_eq!((report.sessions, report.reconnects), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_leaves_the_best_model_so_far() {
    let scene = Scene::new(100_000).with("[training]\neval_every = 5");
    let mut serving = Serving::start(&scene);
    let worker = worker(&serving.join);
    serving.reach(50).await;
    let folder = scene.results().join("checkpoint");
    // It is away for a moment whenever a better one takes its place.
    let saved = async || {
        let loaded = async {
            loop {
                match checkpoint::load(&folder) {
                    Ok(loaded) => return loaded,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, loaded).await.expect("a model is saved while the run goes on")
    };
    saved().await;
    assert!(!scene.results().join("summary.json").exists());
    serving.kill().await;
    let (config, parameters) = saved().await;
    assert_eq!(parameters.len(), config.layout().unwrap().len());
    worker.abort();
}
