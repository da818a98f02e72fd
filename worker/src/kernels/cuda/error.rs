//! What can go wrong on a GPU.

use super::driver::{CompileError, LibraryError};
use crate::model::bytes_text;

/// Why a GPU cannot be used, or what it failed at.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// Libraries of CUDA's cannot be used.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The compiler lacks a file of its own.
    #[error(
        "CUDA's run-time compiler (libnvrtc) finds no libnvrtc-builtins, which belongs beside it in the same version: name their \
         folder in LD_LIBRARY_PATH"
    )]
    NoBuiltins,
    /// There is no such GPU.
    #[error(
        "there is no GPU {ordinal}, counted from 0: the driver knows of {count}, which CUDA_VISIBLE_DEVICES and a container's options \
         (docker run --gpus all) decide too"
    )]
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
    /// The driver is older than the libraries.
    #[error(
        "NVIDIA's driver is for CUDA {}.{}, and CUDA {} is needed: install a newer driver",
        .driver / 1000, .driver % 1000 / 10, .needed
    )]
    OldDriver {
        /// The driver's version of CUDA, as CUDA writes it: 1000 times the major one and 10 times the minor one.
        driver: i32,
        /// The major version that the kernels and their compiler need.
        needed: i32,
    },
    /// A library is older than what is called of it.
    #[error(
        "the first {library} that the loader finds is of CUDA {major}, and CUDA {needed} is needed: name the folder of CUDA \
         {needed}'s first in LD_LIBRARY_PATH, with a link {library}.so to {library}.so.{needed} in it (the name without a \
         version is looked for before the one with it, in all folders)"
    )]
    OldLibrary {
        /// Which, by the beginning of its file's name.
        library: &'static str,
        /// Its major version.
        major: i32,
        /// The one that is needed.
        needed: i32,
    },
    /// There is nothing to emulate a GPU with.
    #[error("there is no C++ compiler {0:?} to emulate a GPU with")]
    NoCompiler(String),
    /// A model that the kernels have no room for.
    #[error(
        "the kernels for this GPU take at most {most} {what}, and the model has {asked}; the CPU takes it (--device cpu)"
    )]
    Unsupported {
        /// Of what.
        what: &'static str,
        /// What the model has.
        asked: usize,
        /// The most that they take.
        most: usize,
    },
    /// What [`WITHOUT_VARIABLE`](super::WITHOUT_VARIABLE) names is nothing that can be left out.
    #[error("{0:?} in {variable} is nothing that can be left out: experts, attention, graphs", variable = super::WITHOUT_VARIABLE)]
    UnknownKernels(String),
    /// Memory ran out.
    #[error(
        "the GPU has no {} for {operation}: {} of {} are free",
        asked.map_or("memory left".to_owned(), |asked| format!("{} more of memory", bytes_text(asked))),
        bytes_text(*.free), bytes_text(*.total)
    )]
    OutOfMemory {
        /// What needs it.
        operation: &'static str,
        /// Bytes asked for at once, where that is known: the driver and its libraries take memory of their own.
        asked: Option<usize>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_ran_out_is_told_with_its_numbers() {
        let told = |operation, asked| {
            let (free, total) = (64_000_000, 80_000_000_000);
            CudaError::OutOfMemory { operation, asked, free, total }.to_string()
        };
        assert_eq!(
            told("a buffer", Some(1_500_000_000)),
            "the GPU has no 1.5 GB more of memory for a buffer: 64.0 MB of 80.0 GB are free"
        );
        assert_eq!(
            told("loading kernels", None),
            "the GPU has no memory left for loading kernels: 64.0 MB of 80.0 GB are free"
        );
    }
}
