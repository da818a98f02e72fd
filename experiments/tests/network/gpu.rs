//! Many workers that share one GPU, emulated by a C++ compiler, or real where there is one.

use std::sync::Arc;

use sanderling_worker::kernels::cuda::{Cuda, CudaError, Precision};
use sanderling_worker::net::{WorkerOptions, work};
use sanderling_worker::site::{Gpu, Place};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::skip;
use crate::support::{Scene, Serving, options};

/// As many as computed at once where a GPU was seen to stop.
const WORKERS: u64 = 16;

/// Steps of each.
const STEPS: u64 = 3;

/// Workers with more blocking threads than cores train to the end on one device, and say goodbye.
async fn train(made: Result<Cuda, CudaError>, steps: u64) {
    let Some(cuda) = skip::kernels(made) else { return };
    let steps = steps * WORKERS;
    let scene = Scene::new(steps).with(&format!(
        "[run]\nworkers = {WORKERS}\n[data]\nbatch_size = 1\n\
         [model]\nhidden_size = 16\nheads = 2\nkv_heads = 1\nintermediate_size = 16\nexperts = 3\ncontext = 8\n\
         [server]\nlease_ms = 60000\n"
    ));
    // A held-out tenth of a short text is soon evaluated.
    let scene = scene.with_text("short.txt", &sanderling_common::corpus::Corpus::bundled().bytes()[..1500]);
    let serving = Serving::start(&scene);
    let place = Place::Gpu(Arc::new(Gpu::new(cuda)));
    let options = WorkerOptions { compute_permits: Some(Arc::new(Semaphore::new(8))), place, ..options() };
    let (_running, stop) = watch::channel(false);
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        let (join, options, stop) = (serving.join.clone(), options.clone(), stop.clone());
        workers.spawn(async move { work(&join, &options, stop).await });
    }
    let outcome = serving.outcome().await;
    assert_eq!((outcome.summary.steps, outcome.summary.completed), (steps, true));
    let mut exchanges = 0;
    while let Some(ended) = workers.join_next().await {
        let report = ended.unwrap().unwrap();
        assert_eq!((report.sessions, report.stopped), (1, false));
        exchanges += report.exchanges;
    }
    assert_eq!(exchanges, steps);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_workers_share_an_emulated_gpu() {
    train(Cuda::emulated(Precision::F32), STEPS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_workers_share_a_gpu() {
    for precision in [Precision::F32, Precision::Bf16] {
        train(Cuda::new(0, precision), 1000).await;
    }
}
