//! The options of a command line that say where a worker computes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::Gpu;
use crate::kernels::cuda::{Cuda, CudaError, Precision};

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
    #[error("{device} cannot be used: {source}; --device cpu needs none of it")]
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

impl PlaceError {
    /// Whether what people said is to be mended, and not the machine.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Precision | Self::Cuda { source: CudaError::UnknownKernels(_), .. })
    }
}

/// Where a worker computes and how precisely, as options of a command line.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct DeviceOptions {
    /// Where to compute: cpu, cuda (an NVIDIA GPU, cuda:1 for the second), or auto: the first GPU if it can be opened, else
    /// the CPU
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
            Device::Auto => match gpu(0, precision) {
                Ok(found) => Ok(found),
                // That is nothing that the machine lacks.
                Err(source @ CudaError::UnknownKernels(_)) => {
                    Err(PlaceError::Cuda { device: self.device, source })
                }
                Err(error) => {
                    let ignored = self.precision.map(|asked| format!("; it computes in f32, not in {asked}"));
                    let ignored = ignored.unwrap_or_default();
                    let why = format!("computing on the CPU, since no GPU can be used: {error}{ignored}");
                    Ok((Place::Cpu, why))
                }
            },
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
