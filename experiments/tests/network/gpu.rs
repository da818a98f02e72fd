//! Many workers that share one GPU, emulated by a C++ compiler, or real where there is one; and one whose memory another program
//! takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sanderling_worker::kernels::cuda::{Cuda, CudaError, Emulated, Precision};
use sanderling_worker::model::ModelError;
use sanderling_worker::net::{WorkerError, WorkerOptions, work};
use sanderling_worker::site::{Gpu, Place};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::skip;
use crate::support::{PATIENCE, Scene, Serving, options};

/// As many as computed at once where a GPU was seen to stop.
const WORKERS: u64 = 16;

/// Steps of each.
const STEPS: u64 = 3;

/// A run of a model that an emulated GPU steps through in milliseconds.
fn scene(workers: u64, steps: u64) -> Scene {
    let scene = Scene::new(steps).with(&format!(
        "[run]\nworkers = {workers}\n[data]\nbatch_size = 1\n\
         [model]\nhidden_size = 16\nheads = 2\nkv_heads = 1\nintermediate_size = 16\nexperts = 3\ncontext = 8\n\
         [server]\nlease_ms = 60000\n"
    ));
    // A held-out tenth of a short text is soon evaluated.
    scene.with_text("short.txt", &sanderling_common::corpus::Corpus::bundled().bytes()[..1500])
}

/// Workers with more blocking threads than cores train to the end on one device, and say goodbye.
async fn train(made: Result<Cuda, CudaError>, steps: u64) {
    let Some(cuda) = skip::kernels(made) else { return };
    let steps = steps * WORKERS;
    let scene = scene(WORKERS, steps);
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

/// Between two evaluations, for which a worker needs a model beside its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_gpu_another_program_fills_ends_with_what_it_needs() {
    static OTHERS: AtomicUsize = AtomicUsize::new(0);
    let emulated = Emulated { memory_bytes: 2 << 30, others_bytes: &OTHERS, ..Emulated::default() };
    let Some(cuda) = skip::kernels(Cuda::emulated_as(Precision::F32, emulated)) else { return };
    let observer = cuda.beside();
    let scene = scene(1, 100_000).with("[training]\neval_every = 10");
    let mut serving = Serving::start(&scene);
    let options = WorkerOptions { place: Place::Gpu(Arc::new(Gpu::new(cuda))), ..options() };
    let (join, (_running, stop)) = (serving.join.clone(), watch::channel(false));
    let worker = tokio::spawn(async move { work(&join, &options, stop).await });
    serving.reach(1).await;
    OTHERS.store(observer.free_bytes().unwrap(), Ordering::Relaxed);
    let ended = tokio::time::timeout(PATIENCE, worker).await.expect("the worker ends").unwrap();
    let error = ended.expect_err("it has no memory to evaluate with");
    let WorkerError::Compute(ModelError::TooLarge(told)) = error else { panic!("{error:?}") };
    assert_eq!((told.workers, told.batch), (1, 1));
    assert!(told.needed_bytes > told.free_bytes, "{told:?}");
    serving.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_workers_share_a_gpu() {
    for precision in [Precision::F32, Precision::Bf16] {
        train(Cuda::new(0, precision), 1000).await;
    }
}
