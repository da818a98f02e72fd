//! Where a command that reads a checkpoint computes.

use std::io::Write;
use std::sync::Arc;

use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cuda::{Buffer, Cuda, CudaError};
use sanderling_worker::model::ModelError;
use sanderling_worker::site::{Device, DeviceOptions, Gpu, Place};

/// A model's parameters in a GPU's memory.
pub(super) struct OnGpu {
    gpu: Arc<Gpu>,
    pub(super) parameters: Box<Buffer>,
}

impl OnGpu {
    /// Copies them there.
    ///
    /// # Errors
    /// A [`ModelError`] if there are no kernels for the model, or the GPU has no room for it.
    fn new(gpu: Arc<Gpu>, config: &ModelConfig, parameters: &[f32]) -> Result<Self, ModelError> {
        let mut cuda = gpu.kernels();
        cuda.supports(config).map_err(ModelError::device)?;
        let mut held = cuda.allocate_factors(parameters.len()).map_err(ModelError::device)?;
        cuda.upload(parameters, &mut held);
        cuda.wait().map_err(ModelError::device)?;
        Ok(Self { gpu, parameters: held })
    }

    pub(super) fn kernels(&self) -> Cuda {
        self.gpu.kernels()
    }
}

/// A model's parameters where a command computes.
pub(super) enum Held {
    Cpu(Vec<f32>),
    Gpu(OnGpu),
}

/// Opens the place that was asked for, and says which it is where it is not the CPU without asking.
///
/// # Errors
/// A sentence on what is missing.
pub(super) fn open(options: DeviceOptions) -> anyhow::Result<(Place, String)> {
    let (place, said) = options.open()?;
    if options.device != Device::Cpu {
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(std::io::stderr(), "{said}");
    }
    let name = match &place {
        Place::Cpu => "cpu".to_owned(),
        Place::Gpu(gpu) => {
            let cuda = gpu.kernels();
            format!("{}, {}", cuda.properties().name, cuda.precision())
        }
    };
    Ok((place, name))
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
