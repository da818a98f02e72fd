//! A GPU, and whether a run fits its memory.

use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::layout::Layout;
use sanderling_common::method::{Method, MethodSettings};
use sanderling_common::model_config::{ModelConfig, ModelConfigError};
use tracing::info;

use super::Site;
use crate::device::DeviceReplica;
use crate::engine::Engine;
use crate::kernels::cuda::{Cuda, CudaError, MemoryNeeded, selection_bytes};
use crate::model::{GB, ModelError, TooLarge};

/// Memory that scratch, cuBLASLt's workspace and the kernels themselves take, in bytes.
const RESERVE_BYTES: usize = 1 << 30;

/// An NVIDIA GPU and its memory. Workers that share one share its queue.
#[derive(Debug)]
pub struct Gpu {
    cuda: Cuda,
}

impl Gpu {
    /// Where these kernels are.
    pub fn new(cuda: Cuda) -> Self {
        Self { cuda }
    }

    /// Kernels of one's own there.
    pub fn kernels(&self) -> Cuda {
        self.cuda.beside()
    }

    /// What a run takes with batches of so many sequences, in bytes.
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
        Ok(of_model.bytes() + of_method + evaluated + RESERVE_BYTES)
    }

    /// Says what a run needs, and refuses it if there is less.
    fn check(&self, run: &RunConfig, config: &ModelConfig) -> Result<(), ModelError> {
        let batch = run.data.batch_size as usize;
        let free_bytes = self.cuda.free_bytes().map_err(ModelError::device)?;
        let needed_bytes = self.needed(run, config, batch)?;
        let (needed, free) = (needed_bytes as f64 / GB, free_bytes as f64 / GB);
        if needed_bytes <= free_bytes {
            info!("the run needs about {needed:.1} GB of the GPU's memory, of which {free:.1} GB are free");
            return Ok(());
        }
        let mut fits = None;
        for fewer in (1..batch).rev() {
            if self.needed(run, config, fewer)? <= free_bytes {
                fits = Some(fewer);
                break;
            }
        }
        Err(TooLarge { needed_bytes, free_bytes, batch, fits }.into())
    }
}

impl Site for Gpu {
    type Engine = Engine<Cuda>;
    type Replica = DeviceReplica<Cuda>;

    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<Engine<Cuda>, ModelError> {
        self.check(run, &config)?;
        Engine::with(self.cuda.beside(), run, config, corpus)
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
