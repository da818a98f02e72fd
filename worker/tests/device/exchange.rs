//! Engine, replica and exchange at one site: what the model computes is what the method takes in, without the host.

use std::sync::Arc;

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{BatchId, SessionId, Step};
use sanderling_common::init::initial_parameters;
use sanderling_common::sparse::{Compression, Compressor, ValueFormat, decode, join_aside};
use sanderling_common::wire::{Answer, BatchRange, EvaluationJob, Split, Work};
use sanderling_worker::core::{WorkerCore, WorkerSettings};
use sanderling_worker::engine::Compute;
use sanderling_worker::kernels::cuda::{Cuda, CudaError, Precision};
use sanderling_worker::site::{Gpu, Host, Site};

use crate::skip::kernels;

const EXCHANGES: u64 = 3;

pub(crate) fn run() -> RunConfig {
    let file = "[run]\nworkers = 1\nseed = 3\n[data]\nbatch_size = 1\n\
                [model]\nhidden_size = 16\nlayers = 1\nheads = 2\nkv_heads = 1\nintermediate_size = 16\nexperts = 3\n\
                context = 8\n\
                [exchange]\nreplica_check_every = 2\ndense_below = 20\n\
                [training]\nsteps = 20\nwarmup_steps = 2\n";
    parse(file).unwrap().resolve().unwrap()
}

/// What can be seen of a worker that exchanges with a server of one worker: losses, the payloads' sizes, θ's hashes and the
/// loss of an evaluation.
pub(crate) struct Seen {
    losses: Vec<f32>,
    bytes: Vec<usize>,
    hashes: Vec<Option<[u8; 32]>>,
    evaluated: f32,
}

/// A short text: the last tenth is for validation, and an evaluation is over soon.
pub(crate) fn corpus() -> Arc<Corpus> {
    Arc::new(Corpus::from_bytes(&Corpus::bundled().bytes()[..1500]).unwrap())
}

/// Calls `at_its_fullest` while the worker holds an evaluated model beside everything else.
pub(crate) fn live<S: Site>(site: &S, at_its_fullest: impl FnOnce()) -> Seen {
    let (run, corpus) = (run(), corpus());
    let config = run.model_config(corpus.vocabulary().len());
    let theta = initial_parameters(&config, 3).unwrap();
    let mut engine = site.engine(&run, config, corpus).unwrap();
    let (layout, settings) = (engine.layout().clone(), WorkerSettings::from(&run));
    let replica = site.replica(layout.clone(), &settings.method, theta).unwrap();
    let mut core = WorkerCore::with(replica, layout.clone(), &settings, SessionId(1), Step(0));
    let batches = Some(BatchRange { first: BatchId(0), count: EXCHANGES as u32 });
    core.add_work(&Work { batches, ..Work::default() }).unwrap();
    let mut seen = Seen { losses: Vec::new(), bytes: Vec::new(), hashes: Vec::new(), evaluated: 0.0 };
    let all = 0..layout.tensors().len();
    while let Some(batch) = core.next_batch() {
        let tokens = engine.batch(batch);
        let loss = engine.take_gradient(core.view(), &tokens).unwrap();
        let pushed = core.handle_gradient(batch, engine.gradient(), loss.cross_entropy as f32, 0.0, 8, 0);
        let push = pushed.unwrap_or_else(|_| panic!("nothing overflows"));
        assert!(!push.skipped);
        seen.losses.push(push.loss);
        seen.bytes.push(push.payload.len());
        seen.hashes.push(push.replica_hash);
        // A server of one worker sends back what it got, the other way round.
        let update = decode(&layout, all.clone(), &push.payload).unwrap();
        let difference: Vec<f32> = update.to_dense(&layout).iter().map(|value| -value).collect();
        let mut payload = Vec::new();
        Compressor::nonzero().compress(&layout, all.clone(), &difference, &mut payload).unwrap();
        let answer =
            Answer { seq: push.seq, step: Step(batch.0 + 1), staleness: 0, work: Work::default(), payload };
        assert!(core.handle_answer(&answer).is_ok());
    }
    let mut nothing = Vec::new();
    let compression = Compression { keep: 0.1, dense_below: 0, format: ValueFormat::F32 };
    let zeros = vec![0.0; layout.len()];
    Compressor::without_zeros(compression).compress(&layout, all, &zeros, &mut nothing).unwrap();
    let model = core.model_aside(&join_aside(&nothing, &nothing)).unwrap_or_else(|_| panic!("it is finite"));
    let job = EvaluationJob { id: 0, step: Step(EXCHANGES), split: Split::Validation };
    seen.evaluated = engine.evaluate_while(&model, job, &|| true).unwrap().unwrap().loss as f32;
    at_its_fullest();
    seen
}

fn assert_near(a: f32, b: f32, tolerance: f32) {
    assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b}");
}

/// Compares a worker at a place with one on the CPU, in each precision that there are kernels of.
fn trains_like_the_cpu(make: impl Fn(Precision) -> Result<Cuda, CudaError>) {
    let host = live(&Host::default(), || ());
    assert!(host.losses[EXCHANGES as usize - 1] != host.losses[0]);
    for (precision, tolerance) in [(Precision::F32, 1e-3), (Precision::Tf32, 5e-3), (Precision::Bf16, 2e-2)] {
        let Some(cuda) = kernels(make(precision)) else { continue };
        let gpu = live(&Gpu::new(cuda), || ());
        assert_eq!(gpu.losses.len(), host.losses.len());
        for (&loss, &expected) in gpu.losses.iter().zip(&host.losses) {
            assert_near(loss, expected, tolerance);
        }
        assert_near(gpu.evaluated, host.evaluated, tolerance);
        // The models differ as the gradients do, and so do their hashes.
        let hashed = |hashes: &[Option<[u8; 32]>]| hashes.iter().map(Option::is_some).collect::<Vec<_>>();
        assert_eq!(hashed(&gpu.hashes), hashed(&host.hashes));
        assert!(gpu.bytes.iter().zip(&host.bytes).all(|(&a, &b)| a.abs_diff(b) * 10 <= b));
    }
}

#[test]
fn a_worker_on_an_emulated_gpu_trains_like_one_on_the_cpu() {
    trains_like_the_cpu(Cuda::emulated);
}

#[test]
fn a_worker_on_a_gpu_trains_like_one_on_the_cpu() {
    trains_like_the_cpu(|precision| Cuda::new(0, precision));
}
