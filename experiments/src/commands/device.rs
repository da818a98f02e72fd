//! Where a command that reads a checkpoint computes.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cuda::{Buffer, Cuda, CudaError, Precision};
use sanderling_worker::model::ModelError;
use sanderling_worker::site::{Device, DeviceOptions, Gpu, Place};

/// A model's parameters in a GPU's memory.
pub(super) struct OnGpu {
    gpu: Arc<Gpu>,
    /// Flat, with the copy that products multiply.
    pub(super) parameters: Box<Buffer>,
}

impl OnGpu {
    /// Copies them there.
    ///
    /// # Errors
    /// A [`ModelError`] if there are no kernels for the model, or the GPU has no room for it.
    fn new(gpu: Arc<Gpu>, config: &ModelConfig, parameters: &[f32]) -> Result<Self, ModelError> {
        let mut cuda = gpu.kernels();
        cuda.supports(config).map_err(ModelError::unsupported)?;
        let mut held = cuda.allocate_factors(parameters.len()).map_err(ModelError::device)?;
        cuda.upload(parameters, &mut held);
        cuda.wait().map_err(ModelError::device)?;
        Ok(Self { gpu, parameters: held })
    }

    /// Kernels of one's own there.
    pub(super) fn kernels(&self) -> Cuda {
        self.gpu.kernels()
    }
}

/// A model's parameters where a command computes.
pub(super) enum Held {
    /// In the host's memory.
    Cpu(Vec<f32>),
    /// In a GPU's.
    Gpu(OnGpu),
}

/// What computed, for people and programs.
pub(super) struct ComputedOn {
    /// `cpu`, or what the GPU calls itself.
    pub(super) device: String,
    /// What products multiplied.
    pub(super) precision: Precision,
}

impl fmt::Display for ComputedOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.device, self.precision)
    }
}

/// Opens the place that was asked for, and says on standard error which it is unless the CPU was asked for.
///
/// # Errors
/// A sentence on what is missing.
pub(super) fn open(options: DeviceOptions) -> anyhow::Result<(Place, ComputedOn)> {
    let (place, said) = options.open()?;
    if options.device != Device::Cpu {
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(std::io::stderr(), "{said}");
    }
    let (device, precision) = match &place {
        Place::Cpu => ("cpu".to_owned(), Precision::F32),
        Place::Gpu(gpu) => {
            let cuda = gpu.kernels();
            (cuda.properties().name.clone(), cuda.precision())
        }
    };
    Ok((place, ComputedOn { device, precision }))
}

/// Has the parameters where the place computes.
///
/// # Errors
/// A [`ModelError`] if the GPU cannot take the model.
pub(super) fn hold(place: Place, config: &ModelConfig, parameters: Vec<f32>) -> Result<Held, ModelError> {
    Ok(match place {
        Place::Cpu => Held::Cpu(parameters),
        Place::Gpu(gpu) => Held::Gpu(OnGpu::new(gpu, config, &parameters)?),
    })
}

/// The words of a GPU whose memory ran out, where that is what failed.
pub(crate) fn ran_out(error: &anyhow::Error) -> Option<&CudaError> {
    let in_model = || match error.downcast_ref() {
        Some(ModelError::Device(source)) => source.downcast_ref(),
        _ => None,
    };
    error.downcast_ref().or_else(in_model).filter(|error| matches!(error, CudaError::OutOfMemory { .. }))
}
