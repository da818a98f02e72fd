//! Where a worker computes and keeps its model.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::layout::Layout;
use sanderling_common::method::MethodSettings;
use sanderling_common::model_config::ModelConfig;

use crate::core::replica::{HostReplica, Replica};
use crate::device::DeviceReplica;
use crate::engine::{Compute, Engine};
use crate::kernels::cuda::{Cuda, CudaError, Precision};
use crate::model::ModelError;

/// A place with memory of its own and something that computes in it: engine and replica share the vectors there, so that
/// neither parameters nor gradients leave it.
pub trait Site: Send + Sync + 'static {
    /// What computes gradients there.
    type Engine: Compute + 'static;
    /// What holds the model and the method's accumulators there.
    type Replica: Replica<Vector = <Self::Engine as Compute>::Vector> + 'static;

    /// The model of a run, with its text.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model, or the place fails.
    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<Self::Engine, ModelError>;

    /// A replica of the model `theta`, with empty accumulators.
    ///
    /// # Errors
    /// If the place fails.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or the settings are out of the ranges their types document.
    fn replica(
        &self,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: Vec<f32>,
    ) -> Result<Self::Replica, <Self::Replica as Replica>::Error>;
}

/// The CPU and the host's memory.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// What computes in place of the engine that a run describes.
    pub stand_in: Option<StandIn>,
}

/// Makes what computes of the engine that a run describes.
#[derive(Clone)]
pub struct StandIn(pub Arc<dyn Fn(Engine) -> HostCompute + Send + Sync>);

/// What computes on the host.
pub type HostCompute = Box<dyn Compute<Vector = [f32]>>;

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StandIn")
    }
}

impl Site for Host {
    type Engine = HostCompute;
    type Replica = HostReplica;

    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<HostCompute, ModelError> {
        let engine = Engine::new(run, config, corpus)?;
        Ok(match &self.stand_in {
            None => Box::new(engine),
            Some(StandIn(make)) => make(engine),
        })
    }

    fn replica(
        &self,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: Vec<f32>,
    ) -> Result<HostReplica, Infallible> {
        Ok(HostReplica::new(layout, settings, theta))
    }
}

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

/// Where a worker is to compute, as people name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// On the CPU.
    #[default]
    Cpu,
    /// On the NVIDIA GPU of that number, counted from 0.
    Cuda(usize),
    /// On the first NVIDIA GPU if there is one that can be used, else on the CPU.
    Auto,
}

/// What is no [`Device`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device: cpu, cuda, cuda:1 (the GPU of that number) or auto")]
pub struct UnknownDevice(String);

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice(text.to_owned());
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "auto" => Ok(Self::Auto),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                number.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// A place that was found usable.
#[derive(Clone, Debug, Default)]
pub enum Place {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU.
    Gpu(Arc<Gpu>),
}

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The GPU cannot be used.
    #[error("{device} cannot be used: {source}")]
    Cuda {
        /// What was asked for.
        device: Device,
        /// What is missing.
        source: CudaError,
    },
    /// The CPU knows one precision.
    #[error("the CPU computes in f32; a precision is for --device cuda")]
    Precision,
}

/// Where a worker computes and how precisely, as options of a command line.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct DeviceOptions {
    /// Where to compute: cpu, cuda (an NVIDIA GPU, cuda:1 for the second), or auto: the first GPU if it can be used, else
    /// the CPU. Model, momentum and selection are on the device too; only what is sent leaves it
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: Device,
    /// What products multiply on a GPU, bf16 by default; sums and parameters are float32 always
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<Precision>,
}

impl DeviceOptions {
    /// The place, and a sentence that says which it is and, of [`Device::Auto`], why.
    ///
    /// # Errors
    /// A [`PlaceError`].
    pub fn open(self) -> Result<(Place, String), PlaceError> {
        let precision = self.precision.unwrap_or(Precision::Bf16);
        match self.device {
            Device::Cpu if self.precision.is_some() => Err(PlaceError::Precision),
            Device::Cpu => Ok((Place::Cpu, "computing on the CPU".to_owned())),
            Device::Cuda(number) => {
                let opened = gpu(number, precision);
                opened.map_err(|source| PlaceError::Cuda { device: self.device, source })
            }
            Device::Auto => Ok(gpu(0, precision).unwrap_or_else(|error| {
                (Place::Cpu, format!("computing on the CPU, since no GPU can be used: {error}"))
            })),
        }
    }
}

fn gpu(number: usize, precision: Precision) -> Result<(Place, String), CudaError> {
    let cuda = Cuda::new(number, precision)?;
    let said = format!("computing on cuda:{number}, {}, in {precision}", cuda.properties().name);
    Ok((Place::Gpu(Arc::new(Gpu::new(cuda))), said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_in_one_way() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:13", Device::Cuda(13)),
            ("auto", Device::Auto),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert_eq!(text.parse::<Device>(), Err(UnknownDevice(text.to_owned())));
        }
    }

    #[test]
    fn the_cpu_has_no_precision_to_choose() {
        let options = DeviceOptions { device: Device::Cpu, precision: Some(Precision::Tf32) };
        assert!(matches!(options.open(), Err(PlaceError::Precision)));
        assert!(matches!(DeviceOptions::default().open(), Ok((Place::Cpu, _))));
    }

    /// Whatever this machine has, there is a sentence for it.
    #[test]
    fn auto_always_finds_a_place_and_says_which() {
        let options = DeviceOptions { device: Device::Auto, precision: Some(Precision::F32) };
        let (place, said) = options.open().unwrap();
        assert_eq!(matches!(place, Place::Cpu), said.starts_with("computing on the CPU, since"), "{said}");
        // Nobody has that many.
        let options = DeviceOptions { device: Device::Cuda(10_000), precision: None };
        let refused = options.open().unwrap_err().to_string();
        assert!(refused.starts_with("cuda:10000 cannot be used: "), "{refused}");
    }
}
