//! The CUDA implementation: our kernels compiled when they are first used, and cuBLASLt's products.
//!
//! Building needs no CUDA, and a machine without it learns what is missing from [`Cuda::new`]. All operations go into one
//! queue of the device. The first one that fails is remembered, those after it are left out, and the next operation that
//! waits reports it.
//!
//! Parameters, the residual stream and all statistics are `f32`. With [`Precision::Bf16`] what passes between operations
//! is bfloat16, and so are the factors of products, whose sums are `f32`.
//!
//! The `.cu` files say above each kernel how it is launched; the modules here do so.

#![allow(unsafe_code, reason = "CUDA is a C interface; each block says why it is right")]

mod attention;
mod buffer;
mod driver;
mod error;
mod experts;
mod graphs;
mod implementation;
mod memory;
mod method;
mod pointwise;
mod products;
mod router;
mod routing;
mod scratch;
mod source;
mod timing;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sanderling_common::model_config::{FeedForward, ModelConfig};

pub use self::buffer::{Buffer, Tokens};
#[cfg(feature = "emulator")]
pub use self::driver::Emulated;
use self::driver::{Argument, Driver, Kernel, Launch, Module, Operation, Scalar};
pub use self::driver::{
    CompileError, Compiled, Library, LibraryError, Properties, architecture, compile_to_cubin,
    compile_to_ptx, compiler_version, require,
};
pub use self::error::CudaError;
pub use self::graphs::GraphCounts;
use self::graphs::Graphs;
pub use self::memory::{MemoryNeeded, RESERVE_BYTES, smaller_batch};
pub use self::method::{Entries, selection_bytes};
pub use self::routing::Routing;
use self::scratch::Scratch;
pub use self::source::{Source, Target, Unit};
use self::timing::Timing;

/// Names, separated by commas, what is not to be used: the kernels for Hopper of `experts` and of `attention`, and `graphs`. For
/// comparisons, and for the day when one of them is wrong.
pub const WITHOUT_VARIABLE: &str = "SANDERLING_CUDA_WITHOUT";

/// What products multiply. Sums are `f32` always, and so are the parameters that are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Precision {
    /// Single precision.
    F32,
    /// Single precision rounded to 10 bits of mantissa, on tensor cores.
    Tf32,
    /// bfloat16, on tensor cores, and between the operations too.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        })
    }
}

/// What is not to be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct LeftOut {
    experts: bool,
    attention: bool,
    graphs: bool,
}

impl LeftOut {
    /// What [`WITHOUT_VARIABLE`] names.
    fn from_environment() -> Result<Self, CudaError> {
        Self::parse(&std::env::var(WITHOUT_VARIABLE).unwrap_or_default())
    }

    fn parse(names: &str) -> Result<Self, CudaError> {
        let mut left_out = Self::default();
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "experts" => left_out.experts = true,
                "attention" => left_out.attention = true,
                "graphs" => left_out.graphs = true,
                _ => return Err(CudaError::UnknownKernels(name.to_owned())),
            }
        }
        Ok(left_out)
    }
}

/// [`Kernels`](super::Kernels) on an NVIDIA GPU.
#[derive(Debug)]
pub struct Cuda {
    driver: Arc<dyn Driver>,
    precision: Precision,
    left_out: LeftOut,
    target: Target,
    modules: HashMap<Unit, Module>,
    kernels: HashMap<(Unit, &'static str), Kernel>,
    scratch: Scratch,
    /// The first failure since the last wait.
    failure: Option<CudaError>,
    timing: Option<Timing>,
    experts: experts::Tensors,
    bounds: products::Bounds,
    graphs: Graphs,
}

impl Cuda {
    /// The GPU of that number, counted from 0.
    ///
    /// # Errors
    /// In one sentence, what is missing.
    pub fn new(ordinal: usize, precision: Precision) -> Result<Self, CudaError> {
        let left_out = LeftOut::from_environment()?;
        let mut cuda = Self::with_driver(Arc::new(driver::Device::new(ordinal)?), precision, left_out);
        // That kernels can be compiled and loaded is found out now, not when a run has begun.
        cuda.kernel(Unit::Pointwise, "sum_parts")?;
        Ok(cuda)
    }

    /// The kernels on the CPU, compiled by the C++ compiler that `$CXX` names, or `c++`; for tests.
    ///
    /// # Errors
    /// If there is no such compiler.
    #[cfg(feature = "emulator")]
    pub fn emulated(precision: Precision) -> Result<Self, CudaError> {
        Self::emulated_as(precision, Emulated::default())
    }

    /// The same in a GPU's place that has not more than that.
    ///
    /// # Errors
    /// If there is no such compiler.
    #[cfg(feature = "emulator")]
    pub fn emulated_as(precision: Precision, emulated: Emulated) -> Result<Self, CudaError> {
        let left_out = LeftOut { experts: true, ..LeftOut::default() };
        Ok(Self::with_driver(Arc::new(driver::Emulator::new(emulated)?), precision, left_out))
    }

    fn with_driver(driver: Arc<dyn Driver>, precision: Precision, left_out: LeftOut) -> Self {
        let Properties { architecture, shared_bytes, .. } = *driver.properties();
        let mut target = Target::of(architecture, shared_bytes);
        target.hopper_experts &= !left_out.experts;
        target.hopper_attention &= !left_out.attention;
        Self {
            driver,
            precision,
            left_out,
            target,
            modules: HashMap::new(),
            kernels: HashMap::new(),
            scratch: Scratch::default(),
            failure: None,
            timing: None,
            experts: experts::Tensors::default(),
            bounds: products::Bounds::default(),
            graphs: Graphs::default(),
        }
    }

    /// What is known of the device.
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// What its products multiply.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Memory that it and its buffers hold, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.driver.held_bytes().load(Ordering::Relaxed)
    }

    /// Memory that is free, in bytes.
    ///
    /// # Errors
    /// If the device failed.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.driver.free_bytes()
    }

    /// Whether there are kernels for a model on this device.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`], which says what there are none for.
    pub fn supports(&self, config: &ModelConfig) -> Result<(), CudaError> {
        let experts = match config.feed_forward {
            FeedForward::Dense => 0,
            FeedForward::Moe { experts, .. } => experts,
        };
        let attended = config.heads.saturating_add(config.kv_heads.saturating_mul(2));
        let biases = if config.qkv_bias { attended.saturating_mul(config.head_dim) } else { 0 };
        let limits = [
            ("elements a head", config.head_dim, self.head_dim_max()),
            ("experts", experts, router::EXPERTS_MAX),
            ("heads", config.heads, BLOCKS_ACROSS_MAX),
            ("elements a token", config.hidden_size, pointwise::EMBEDDING_WIDTH_MAX),
            ("biases of queries, keys and values", biases, pointwise::BIASES_MAX),
        ];
        for (what, asked, most) in limits {
            if asked > most {
                return Err(CudaError::Unsupported { what, asked, most });
            }
        }
        Ok(())
    }

    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// The first failure since the last wait.
    pub fn wait(&mut self) -> Result<(), CudaError> {
        self.settle();
        self.driver.wait().and(Ok(())).map_err(|error| self.failure.take().unwrap_or(error))?;
        self.failure.take().map_or(Ok(()), Err)
    }

    /// The type of activations and of the factors of products.
    fn activation(&self) -> Scalar {
        match self.precision {
            Precision::F32 | Precision::Tf32 => Scalar::Float,
            Precision::Bf16 => Scalar::Bf16,
        }
    }

    fn target(&self) -> Target {
        self.target
    }

    /// Remembers a failure, and gives what there is otherwise.
    fn attempt<T>(&mut self, outcome: Result<T, CudaError>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.failure.get_or_insert(error);
                None
            }
        }
    }

    /// Marks the twin of a buffer as up to date after a kernel that wrote both; it did not if something has failed.
    fn refresh_twin(&self, buffer: &Buffer, len: usize) {
        if self.failure.is_none() {
            buffer.refresh_twin(len);
        }
    }

    fn kernel(&mut self, unit: Unit, name: &'static str) -> Result<Kernel, CudaError> {
        if let Some(&kernel) = self.kernels.get(&(unit, name)) {
            return Ok(kernel);
        }
        let module = match self.modules.get(&unit) {
            Some(&module) => module,
            None => {
                let module = self.driver.load(&unit.source(self.precision, self.target))?;
                self.modules.insert(unit, module);
                module
            }
        };
        let kernel = self.driver.kernel(module, name)?;
        self.kernels.insert((unit, name), kernel);
        Ok(kernel)
    }

    /// Queues a kernel. A launch without blocks is none.
    fn launch(&mut self, unit: Unit, name: &'static str, launch: Launch, arguments: &[Argument]) {
        if self.failure.is_some() || launch.grid.contains(&0) {
            return;
        }
        let kernel = self.kernel(unit, name);
        let Some(kernel) = self.attempt(kernel) else { return };
        self.operate(name, Operation::Launch { kernel, launch, arguments });
    }
}

/// A launch along one direction.
fn flat(blocks: usize, threads: usize) -> Launch {
    grid([blocks, 1, 1], [threads, 1, 1], 0)
}

/// The most blocks in the second and in the third direction of a launch.
const BLOCKS_ACROSS_MAX: usize = 65_535;

/// A launch in three directions, with dynamic shared memory.
///
/// # Panics
/// If there are more blocks than CUDA takes: what is many goes along the first direction.
fn grid(blocks: [usize; 3], threads: [usize; 3], shared_bytes: usize) -> Launch {
    assert!(blocks[1..].iter().all(|&across| across <= BLOCKS_ACROSS_MAX), "{blocks:?} blocks in a launch");
    let narrow = |value: usize| u32::try_from(value).expect("a launch has fewer than 2³² blocks");
    Launch { grid: blocks.map(narrow), block: threads.map(narrow), shared_bytes: narrow(shared_bytes) }
}

/// A count as kernels take it.
fn int(value: usize) -> i32 {
    i32::try_from(value).expect("a kernel's rows, widths and counts fit 31 bits")
}

/// A count that may pass 31 bits.
fn long(value: usize) -> i64 {
    i64::try_from(value).expect("memory has fewer than 2⁶³ elements")
}

/// Arguments in the order of a kernel's parameters.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$($crate::kernels::cuda::driver::Argument::from($argument)),*] };
}
use arguments;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_left_out_by_name() {
        let left_out = |names| LeftOut::parse(names).map_err(|error| error.to_string());
        assert_eq!(left_out(""), Ok(LeftOut::default()));
        assert_eq!(left_out(" attention, "), Ok(LeftOut { attention: true, ..LeftOut::default() }));
        let all = LeftOut { experts: true, attention: true, graphs: true };
        assert_eq!(left_out("experts,attention,graphs"), Ok(all));
        assert!(left_out("attntion").unwrap_err().starts_with("\"attntion\" in SANDERLING_CUDA_WITHOUT"));
    }
}
