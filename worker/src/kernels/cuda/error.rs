//! What can go wrong on a GPU.

use super::driver::{CompileError, Library};

/// Why a GPU cannot be used, or what it failed at.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// A library of CUDA's cannot be loaded.
    #[error("{0} is not there: {remedy}", remedy = .0.remedy())]
    MissingLibrary(Library),
    /// There is no such GPU.
    #[error("there is no GPU {ordinal}: the driver knows of {count}")]
    NoDevice {
        /// The one asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// A GPU without what the kernels need.
    #[error("{name} has compute capability {major}.{minor}, and the kernels need 8.0 or later")]
    TooOld {
        /// What it calls itself.
        name: String,
        /// Compute capability.
        major: u32,
        /// Its second part.
        minor: u32,
    },
    /// A kernel does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// Memory ran out.
    #[error(
        "the GPU has not {asked} more bytes of memory: {free} of {total} are free; a smaller batch needs less"
    )]
    OutOfMemory {
        /// Bytes asked for at once.
        asked: usize,
        /// Bytes that were free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// The driver refused something, or an operation before it failed.
    #[error("{operation} failed: {reason}")]
    Driver {
        /// What was being done.
        operation: &'static str,
        /// The driver's name for it, and its words.
        reason: String,
    },
    /// cuBLASLt refused something.
    #[error("cuBLASLt failed at {operation}: {status}")]
    Blas {
        /// What was being done.
        operation: &'static str,
        /// Its name for what went wrong.
        status: String,
    },
    /// A kernel that a module should have.
    #[error("there is no kernel {name}: {reason}")]
    NoKernel {
        /// Its name.
        name: String,
        /// The driver's words.
        reason: String,
    },
}
