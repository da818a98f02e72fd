//! A GPU, and whether a run fits its memory.

use std::sync::{Arc, Mutex, PoisonError};

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::BatchId;
use sanderling_common::layout::Layout;
use sanderling_common::method::{Method, MethodSettings};
use sanderling_common::model_config::{ModelConfig, ModelConfigError};
use sanderling_common::wire::EvaluationJob;
use sanderling_common::wire::control::EvaluationReport;
use tracing::info;

use super::Site;
use crate::data::Batch;
use crate::device::{DeviceReplica, piece_bytes};
use crate::engine::{Compute, Engine};
use crate::kernels::cuda::{
    Buffer, Cuda, CudaError, MemoryNeeded, RESERVE_BYTES, selection_bytes, smaller_batch,
};
use crate::model::{ModelError, StepLoss, TooLarge, bytes_text, who_needs};

/// An NVIDIA GPU and its memory. Workers that share one share its queue.
#[derive(Debug)]
pub struct Gpu {
    cuda: Cuda,
    /// Bytes that the engines made here were promised, for themselves and their replicas. Each takes its memory bit by bit, so
    /// that what is free says little of what is left for another.
    promised: Arc<Mutex<usize>>,
}

impl Gpu {
    /// Where these kernels are.
    pub fn new(cuda: Cuda) -> Self {
        Self { cuda, promised: Arc::default() }
    }

    /// The same GPU, with kernels of its own.
    fn beside(&self) -> Self {
        Self { cuda: self.kernels(), promised: Arc::clone(&self.promised) }
    }

    /// Kernels of one's own there.
    pub fn kernels(&self) -> Cuda {
        self.cuda.beside()
    }

    /// What a worker takes with batches of so many sequences, in bytes; [`RESERVE_BYTES`] come on top, once for all workers.
    fn needed(&self, run: &RunConfig, config: &ModelConfig, batch: usize) -> Result<usize, ModelConfigError> {
        let of_model = MemoryNeeded::new(config, self.cuda.precision(), batch * run.model.context)?;
        let layout = config.layout()?;
        let method = MethodSettings::from(run);
        // The model that gradients are taken at is counted already.
        let beside = match method.method {
            Method::DgsAdam => 3,
            Method::DgcAsync => 2,
            Method::Asgd | Method::GdAsync | Method::Dgs | Method::Msgd => 1,
        };
        let of_method = beside * 4 * layout.len() + selection_bytes(&layout, method.compression);
        // While it evaluates, it has the evaluated model beside its own.
        let evaluated = of_model.model - 4 * layout.len();
        Ok(of_model.bytes() + of_method + evaluated + piece_bytes(&layout))
    }

    /// What is free for workers beside those that were promised so much, in bytes.
    fn available(&self, promised: usize) -> Result<usize, CudaError> {
        let ours = self.cuda.free_bytes()?.saturating_add(self.cuda.held_bytes());
        Ok(ours.saturating_sub(promised))
    }

    /// Whether so many more workers fit: what they need together and what is free for them, in bytes.
    fn fit(
        &self,
        run: &RunConfig,
        config: &ModelConfig,
        workers: u32,
        promised: usize,
    ) -> Result<(usize, usize), ModelError> {
        self.cuda.supports(config).map_err(ModelError::unsupported)?;
        let free_bytes = self.available(promised).map_err(ModelError::device)?;
        let needed = |batch: usize| {
            let of_one = self.needed(run, config, batch)?;
            Ok::<_, ModelConfigError>(of_one.saturating_mul(workers as usize).saturating_add(RESERVE_BYTES))
        };
        let batch = run.data.batch_size as usize;
        let needed_bytes = needed(batch)?;
        if needed_bytes <= free_bytes {
            return Ok((needed_bytes, free_bytes));
        }
        let (mut fits, mut exceeds) = (0, batch);
        while fits + 1 < exceeds {
            let between = fits + (exceeds - fits) / 2;
            *(if needed(between)? <= free_bytes { &mut fits } else { &mut exceeds }) = between;
        }
        let fits = (fits > 0).then_some(fits);
        Err(TooLarge { needed_bytes, free_bytes, workers, batch, fits }.into())
    }

    /// Says what so many more workers of a run need, in a sentence.
    ///
    /// # Errors
    /// [`ModelError::TooLarge`] if it is more than there is, or another [`ModelError`] if there are no kernels for the model, or the
    /// device fails.
    pub fn estimate(
        &self,
        run: &RunConfig,
        config: &ModelConfig,
        workers: u32,
    ) -> Result<String, ModelError> {
        let promised = *self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let (needed, free) = self.fit(run, config, workers, promised)?;
        let (who, needed, free) = (who_needs(workers), bytes_text(needed), bytes_text(free));
        Ok(format!("{who} about {needed} of the GPU's memory, of which {free} are free"))
    }

    /// Sets aside what a worker needs, if there is that much.
    fn promise(&self, run: &RunConfig, config: &ModelConfig) -> Result<Promise, ModelError> {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let (needed, _) = self.fit(run, config, 1, *promised)?;
        let bytes = needed - RESERVE_BYTES;
        *promised += bytes;
        Ok(Promise { bytes, promised: Arc::clone(&self.promised) })
    }

    /// What became of a worker whose memory ran out all the same, since somebody else took it.
    fn explained(
        &self,
        error: ModelError,
        run: &RunConfig,
        config: &ModelConfig,
        own: &Promise,
    ) -> ModelError {
        let ModelError::Device(source) = &error else { return error };
        let Some(ran_out @ &CudaError::OutOfMemory { asked, .. }) = source.downcast_ref() else {
            return error;
        };
        let promised = *self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        match self.fit(run, config, 1, promised - own.bytes) {
            Err(too_large @ ModelError::TooLarge(_)) => too_large,
            Ok(_) => {
                let needed = |batch| self.needed(run, config, batch).ok();
                match smaller_batch(run.data.batch_size as usize, asked.unwrap_or(0), needed) {
                    Some((batch, less_bytes)) => {
                        ModelError::device(Underestimated { ran_out: ran_out.clone(), batch, less_bytes })
                    }
                    None => error,
                }
            }
            // The device is in no state to be asked: what it said first says most.
            Err(_) => error,
        }
    }
}

/// Memory ran out of a run that fits by its estimate.
#[derive(Debug, thiserror::Error)]
#[error("{ran_out}; a batch_size of {batch} needs about {less} less", less = bytes_text(*.less_bytes))]
struct Underestimated {
    /// What the device said.
    ran_out: CudaError,
    /// Sequences of batches to try.
    batch: usize,
    /// What they need less.
    less_bytes: usize,
}

/// Memory that is set aside, until this is dropped.
#[derive(Debug)]
struct Promise {
    bytes: usize,
    promised: Arc<Mutex<usize>>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        *self.promised.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
    }
}

/// An engine on a GPU, with memory set aside for it and its replica.
pub struct GpuEngine {
    engine: Engine<Cuda>,
    run: RunConfig,
    config: ModelConfig,
    gpu: Gpu,
    promise: Promise,
}

impl Compute for GpuEngine {
    type Vector = Buffer;

    fn layout(&self) -> &Arc<Layout> {
        self.engine.layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        self.engine.batch(id)
    }

    fn take_gradient(&mut self, parameters: &Buffer, batch: &Batch) -> Result<StepLoss, ModelError> {
        let loss = self.engine.take_gradient(parameters, batch);
        loss.map_err(|error| self.explained(error))
    }

    fn gradient(&self) -> &Buffer {
        self.engine.gradient()
    }

    fn evaluate_while(
        &mut self,
        parameters: &Buffer,
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        let report = self.engine.evaluate_while(parameters, job, keep_going);
        report.map_err(|error| self.explained(error))
    }

    /// Memory that was set aside is the replica's too.
    fn explained(&self, error: ModelError) -> ModelError {
        self.gpu.explained(error, &self.run, &self.config, &self.promise)
    }
}

impl Site for Gpu {
    type Engine = GpuEngine;
    type Replica = DeviceReplica<Cuda>;

    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<GpuEngine, ModelError> {
        info!("{}", self.estimate(run, &config, 1)?);
        let promise = self.promise(run, &config)?;
        let made = Engine::with(self.cuda.beside(), run, config.clone(), corpus).and_then(|mut engine| {
            // At once, so that other programs on the GPU see what is left.
            engine.make_room()?;
            Ok(engine)
        });
        let engine = made.map_err(|error| self.explained(error, run, &config, &promise))?;
        Ok(GpuEngine { engine, run: run.clone(), config, gpu: self.beside(), promise })
    }

    fn replica(
        &self,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: Vec<f32>,
    ) -> Result<DeviceReplica<Cuda>, CudaError> {
        DeviceReplica::new(self.cuda.beside(), layout, settings, &theta)
    }
}
