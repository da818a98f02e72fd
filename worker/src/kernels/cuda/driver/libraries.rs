//! Whether CUDA's libraries are there.
//!
//! cudarc loads each when it is first used and panics if it cannot, so it is asked before.

use std::fmt;

/// A library of CUDA's that is loaded at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver's, `libcuda`.
    Driver,
    /// The run-time compiler's, `libnvrtc`.
    Nvrtc,
    /// The matrix products', `libcublasLt`.
    CublasLt,
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "NVIDIA's driver (libcuda)",
            Self::Nvrtc => "CUDA's run-time compiler (libnvrtc)",
            Self::CublasLt => "CUDA's matrix products (libcublasLt)",
        })
    }
}

impl Library {
    /// What somebody who wants it has to do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver, version 580 or later, or use the CPU",
            Self::Nvrtc | Self::CublasLt => {
                "install the CUDA toolkit 13, or Python's nvidia-cuda-nvrtc and nvidia-cublas, and name their folder in \
                 LD_LIBRARY_PATH, or use the CPU"
            }
        }
    }

    fn is_present(self) -> bool {
        // SAFETY: the calls open the library and close it again; NVIDIA's libraries may be loaded at any time.
        unsafe {
            match self {
                Self::Driver => cudarc::driver::sys::is_culib_present(),
                Self::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Self::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
            }
        }
    }
}

/// The first of some libraries that cannot be loaded.
pub fn missing_library(wanted: &[Library]) -> Option<Library> {
    wanted.iter().copied().find(|library| !library.is_present())
}
