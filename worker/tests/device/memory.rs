//! What a GPU's memory is needed for, what is refused before it begins, and what is said when it runs out: on an emulated
//! one that has as little as a test wants.

use std::sync::atomic::{AtomicUsize, Ordering};

use ndarray::Array2;
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{BatchId, SessionId, Step};
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig};
use sanderling_common::wire::{BatchRange, Work};
use sanderling_worker::core::{WorkerCore, WorkerSettings};
use sanderling_worker::data::Batch;
use sanderling_worker::device::DeviceFailure;
use sanderling_worker::engine::Compute;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cuda::{Cuda, CudaError, Emulated, Precision, RESERVE_BYTES};
use sanderling_worker::model::{Balancing, Model, ModelError, TooLarge, bytes_text};
use sanderling_worker::site::{Gpu, Site};

use crate::exchange::{corpus, live, run};
use crate::skip::kernels;

fn emulated(precision: Precision, memory_bytes: usize) -> Option<Cuda> {
    kernels(Cuda::emulated_as(precision, Emulated { memory_bytes, ..Emulated::default() }))
}

fn config(run: &RunConfig, corpus: &Corpus) -> ModelConfig {
    run.model_config(corpus.vocabulary().len())
}

fn too_large<T>(outcome: Result<T, ModelError>) -> TooLarge {
    match outcome {
        Err(ModelError::TooLarge(too_large)) => too_large,
        Err(other) => panic!("refused for another reason: {other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

/// What a run needs, as a GPU without a limit says.
fn needed(run: &RunConfig, corpus: &Corpus) -> Option<usize> {
    let none = Gpu::new(emulated(Precision::Bf16, 0)?);
    Some(too_large(none.estimate(run, &config(run, corpus), 1)).needed_bytes)
}

#[test]
fn a_worker_takes_no_more_than_it_said() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(cuda) = emulated(precision, usize::MAX) else { return };
        let observer = cuda.beside();
        let mut held = 0;
        live(&Gpu::new(cuda), || held = observer.held_bytes());
        let none = Gpu::new(emulated(precision, 0).unwrap());
        let needed = too_large(none.estimate(&run(), &config(&run(), &corpus()), 1)).needed_bytes;
        let said = needed - RESERVE_BYTES;
        assert!(held <= said, "{precision}: {held} of {said} bytes");
        // With a quarter for what real allocations are rounded up to, and a piece of a difference larger than any here.
        assert!(said <= 2 * held, "{precision}: {held} of {said} bytes");
    }
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_a_batch_that_would() {
    let corpus = corpus();
    let mut run = run();
    run.data.batch_size = 40;
    let Some(of_forty) = needed(&run, &corpus) else { return };
    run.data.batch_size = 64;
    let gpu = Gpu::new(emulated(Precision::Bf16, of_forty).unwrap());
    let refused = too_large(gpu.engine(&run, config(&run, &corpus), corpus.clone()));
    assert_eq!((refused.fits, refused.batch, refused.free_bytes), (Some(40), 64, of_forty));
    run.data.batch_size = 40;
    assert!(gpu.engine(&run, config(&run, &corpus), corpus).is_ok());
}

/// Each of them takes its memory bit by bit; nothing of that is there for others.
#[test]
fn workers_that_share_a_gpu_share_its_memory() {
    let (corpus, run) = (corpus(), run());
    let config = config(&run, &corpus);
    let Some(of_one) = needed(&run, &corpus) else { return };
    let each = of_one - RESERVE_BYTES;
    let gpu = Gpu::new(emulated(Precision::Bf16, RESERVE_BYTES + 2 * each + each / 2).unwrap());
    assert!(gpu.estimate(&run, &config, 2).unwrap().starts_with("2 workers need about"));
    assert_eq!(too_large(gpu.estimate(&run, &config, 3)).workers, 3);
    let engine = || gpu.engine(&run, config.clone(), corpus.clone());
    let (first, second) = (engine().unwrap(), engine().unwrap());
    let third = too_large(engine());
    assert_eq!((third.needed_bytes, third.fits), (of_one, None));
    drop(first);
    assert!(engine().is_ok());
    drop(second);
}

#[test]
fn models_without_kernels_are_refused() {
    let (corpus, run) = (corpus(), run());
    let of_run = config(&run, &corpus);
    let Some(cuda) = emulated(Precision::F32, usize::MAX) else { return };
    let gpu = Gpu::new(cuda);
    let refused = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = of_run.clone();
        change(&mut config);
        gpu.engine(&run, config, corpus.clone()).err().map(|error| match error {
            ModelError::Unsupported(error) => error.to_string(),
            other => panic!("{other}"),
        })
    };
    let FeedForward::Moe { experts: 3, top_k, router } = of_run.feed_forward else { panic!("three experts") };
    let experts = |experts| FeedForward::Moe { experts, top_k, router };
    assert_eq!(refused(&|config| config.feed_forward = experts(256)), None);
    let too_many = refused(&|config| config.feed_forward = experts(257)).unwrap();
    assert!(too_many.contains("at most 256 experts, and the model has 257"), "{too_many}");
    let too_wide = refused(&|config| config.head_dim = 258).unwrap();
    assert!(too_wide.contains("at most 256 elements a head, and the model has 258"), "{too_wide}");
}

/// Of some things a launch has a block each, in a direction in which CUDA takes 65 535.
#[test]
fn models_are_refused_for_which_no_launch_has_blocks() {
    let Some(cuda) = emulated(Precision::Bf16, usize::MAX) else { return };
    let of_run = config(&run(), &corpus());
    let refused = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = of_run.clone();
        change(&mut config);
        match cuda.supports(&config) {
            Err(CudaError::Unsupported { what, asked, most }) => Some((what, asked, most)),
            other => other.map(|()| None).unwrap(),
        }
    };
    let heads = |heads| refused(&|config| (config.heads, config.kv_heads) = (heads, 1));
    assert_eq!(heads(65_535), None);
    assert_eq!(heads(65_536), Some(("heads", 65_536, 65_535)));
    let width = |width| refused(&|config| config.hidden_size = width);
    assert_eq!(width(8_388_480), None);
    assert_eq!(width(8_388_481), Some(("elements a token", 8_388_481, 8_388_480)));
    let biases = |qkv_bias| {
        refused(&|config| {
            (config.heads, config.kv_heads, config.head_dim, config.qkv_bias) = (65_000, 1000, 256, qkv_bias);
        })
    };
    assert_eq!(biases(false), None);
    assert_eq!(biases(true), Some(("biases of queries, keys and values", 17_152_000, 16_776_960)));
}

/// Wherever in a step memory runs out, also after its loss is known: nobody takes what is in the gradient for one.
#[test]
fn a_step_without_enough_memory_says_so() {
    let run = run();
    let config = config(&run, &corpus());
    let theta = initial_parameters(&config, 1).unwrap();
    let ids = Array2::from_shape_fn((2, 9), |(row, at)| ((row * 5 + at * 3) % config.vocab_size) as u32);
    let step = |cuda: Cuda| {
        let observer = cuda.beside();
        let mut kernels = cuda;
        let mut params = Kernels::allocate_factors(&mut kernels, theta.len())?;
        kernels.upload(&theta, &mut params);
        let mut grad = Kernels::allocate(&mut kernels, theta.len())?;
        let device = |error: ModelError| match error {
            ModelError::Device(error) => *error.downcast::<CudaError>().unwrap(),
            other => panic!("{other}"),
        };
        let mut model = Model::new(config.clone(), kernels).map_err(device)?;
        let (inputs, targets) = (ids.slice(ndarray::s![.., ..-1]), ids.slice(ndarray::s![.., 1..]));
        model.loss_and_grad(&params, inputs, targets, Balancing::default(), &mut grad).map_err(device)?;
        Ok::<_, CudaError>(observer.held_bytes())
    };
    let Some(cuda) = emulated(Precision::Bf16, usize::MAX) else { return };
    let enough = step(cuda).unwrap();
    assert_eq!(step(emulated(Precision::Bf16, enough).unwrap()).unwrap(), enough);
    for lacking in (1..enough).step_by(enough / 64) {
        let cuda = emulated(Precision::Bf16, enough - lacking).unwrap();
        assert!(matches!(step(cuda), Err(CudaError::OutOfMemory { .. })), "{lacking} bytes too little");
    }
}

/// Kernels of a GPU whose memory is what a run needs at least, in bytes, less what another program takes of it by now.
fn shared_with(
    others_bytes: &'static AtomicUsize,
    precision: Precision,
    (run, corpus): (&RunConfig, &Corpus),
) -> Option<(Cuda, usize)> {
    let memory_bytes = needed(run, corpus)?;
    let emulated = Emulated { memory_bytes, others_bytes, ..Emulated::default() };
    Some((kernels(Cuda::emulated_as(precision, emulated)).unwrap(), memory_bytes))
}

/// Another program takes what was free when the run began; when it gives it back, the worker goes on.
#[test]
fn memory_that_others_take_is_told_and_missed_no_longer_than_it_is() {
    static OTHERS: AtomicUsize = AtomicUsize::new(0);
    let (corpus, run) = (corpus(), run());
    let config = config(&run, &corpus);
    let Some((cuda, of_one)) = shared_with(&OTHERS, Precision::Bf16, (&run, &corpus)) else { return };
    let mut other = cuda.beside();
    let mut engine = Gpu::new(cuda).engine(&run, config.clone(), corpus).unwrap();
    let theta = initial_parameters(&config, 1).unwrap();
    let mut params = Kernels::allocate_factors(&mut other, theta.len()).unwrap();
    other.upload(&theta, &mut params);
    let batch = engine.batch(BatchId(0));
    OTHERS.store(other.free_bytes().unwrap() - 64, Ordering::Relaxed);
    let told = too_large(engine.take_gradient(&params, &batch));
    assert_eq!((told.needed_bytes, told.batch), (of_one, 1));
    assert!(told.free_bytes < of_one, "{told:?}");
    OTHERS.store(0, Ordering::Relaxed);
    let loss = engine.take_gradient(&params, &batch).unwrap();
    assert!(loss.cross_entropy.is_finite());

    // What this process takes is not counted against it, so that the device's own words are told.
    let free = other.free_bytes().unwrap();
    let taken = Kernels::allocate(&mut other, free / 4).unwrap();
    let ids = ndarray::Array2::zeros((4, 8));
    let larger = Batch { inputs: ids.clone(), targets: ids };
    let error = engine.take_gradient(&params, &larger).err().unwrap();
    let ModelError::Device(source) = &error else { panic!("{error:?}") };
    assert!(source.to_string().ends_with(" are free"), "{source}");
    drop(taken);
}

/// What nobody reckoned with, here memory that this process takes beside a larger batch, is told with a batch to try.
#[test]
fn memory_that_runs_out_of_a_run_that_fits_is_told_with_a_batch_that_needs_less() {
    let (corpus, mut run) = (corpus(), run());
    let config = config(&run, &corpus);
    let mut of_batch = |batch| {
        run.data.batch_size = batch;
        needed(&run, &corpus)
    };
    let (Some(of_four), Some(of_eight)) = (of_batch(4), of_batch(8)) else { return };
    let cuda = emulated(Precision::Bf16, of_eight).unwrap();
    let mut other = cuda.beside();
    let mut engine = Gpu::new(cuda).engine(&run, config.clone(), corpus).unwrap();
    let theta = initial_parameters(&config, 1).unwrap();
    let mut params = Kernels::allocate_factors(&mut other, theta.len()).unwrap();
    other.upload(&theta, &mut params);
    let free = other.free_bytes().unwrap();
    let taken = Kernels::allocate(&mut other, free / 4).unwrap();
    let ids = Array2::zeros((16, 8));
    let error = engine.take_gradient(&params, &Batch { inputs: ids.clone(), targets: ids }).err().unwrap();
    let ModelError::Device(source) = &error else { panic!("{error:?}") };
    let told = format!("; a batch_size of 4 needs about {} less", bytes_text(of_eight - of_four));
    assert!(source.to_string().ends_with(&told), "{source}");
    drop(taken);
}

/// What another program takes after the engine has its memory is missed by the replica, which learns so bit by bit.
#[test]
fn memory_that_a_replica_misses_is_told_with_what_the_run_needs() {
    static OTHERS: AtomicUsize = AtomicUsize::new(0);
    let (corpus, run) = (corpus(), run());
    let config = config(&run, &corpus);
    let Some((cuda, _)) = shared_with(&OTHERS, Precision::F32, (&run, &corpus)) else { return };
    let observer = cuda.beside();
    let gpu = Gpu::new(cuda);
    let mut engine = gpu.engine(&run, config.clone(), corpus).unwrap();
    let take = |left: usize| {
        OTHERS.store(0, Ordering::Relaxed);
        OTHERS.store(observer.free_bytes().unwrap() - left, Ordering::Relaxed);
    };
    let (layout, settings) = (engine.layout().clone(), WorkerSettings::from(&run));
    let theta = initial_parameters(&config, 1).unwrap();
    let replica = || gpu.replica(layout.clone(), &settings.method, theta.clone());

    take(64);
    let told = too_large(replica().map_err(|error| engine.explained(ModelError::device(error))));
    assert_eq!(told.batch, 1);
    assert!(told.needed_bytes > told.free_bytes, "{told:?}");

    // What selects has its memory with the first push.
    OTHERS.store(0, Ordering::Relaxed);
    let mut core = WorkerCore::with(replica().unwrap(), layout.clone(), &settings, SessionId(1), Step(0));
    core.add_work(&Work { batches: Some(BatchRange { first: BatchId(0), count: 1 }), ..Work::default() })
        .unwrap();
    let batch = engine.batch(BatchId(0));
    engine.take_gradient(core.view(), &batch).unwrap();
    take(64);
    let pushed = core.handle_gradient(BatchId(0), engine.gradient(), 1.0, 0.0, 8, 0).map(|_| ());
    let Err(DeviceFailure::Device(error)) = pushed else { panic!("{pushed:?}") };
    let told = too_large(Err::<(), _>(engine.explained(ModelError::device(error))));
    assert!(told.needed_bytes > told.free_bytes, "{told:?}");
}
