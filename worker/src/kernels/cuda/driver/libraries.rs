//! Whether CUDA's libraries are there, and have what is called of them.
//!
//! cudarc loads a library, and looks a function up, when it is first used, and panics if it cannot. So both are asked for before.

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

/// Why libraries cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// They are not there, or no libraries for this machine.
    #[error("{} cannot be loaded: {}", listed(.0), remedy(.0))]
    NotLoaded(Vec<Library>),
    /// One lacks what is called of it.
    #[error(
        "{of} has no function {function}, so it is too old or something else of that name: {}",
        remedy(&[*.of])
    )]
    Incomplete {
        /// Which.
        of: Library,
        /// What it lacks.
        function: &'static str,
    },
}

/// "a", "a and b", "a, b and c".
fn listed(libraries: &[Library]) -> String {
    let names: Vec<String> = libraries.iter().map(Library::to_string).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

/// What somebody who wants them has to do.
fn remedy(libraries: &[Library]) -> String {
    let driver = libraries.contains(&Library::Driver).then_some("the NVIDIA driver, version 580 or later");
    let toolkit = libraries.iter().any(|&library| library != Library::Driver).then_some(
        "the CUDA toolkit 13 (or Python's nvidia-cuda-nvrtc and nvidia-cublas, with their folder in LD_LIBRARY_PATH)",
    );
    let all: Vec<&str> = driver.into_iter().chain(toolkit).collect();
    format!("install {}", all.join(", and "))
}

impl Library {
    /// What is called to learn its version. The driver's words for an error are asked for too.
    fn first_functions(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["cuInit", "cuGetErrorString", "cuDriverGetVersion"],
            Self::Nvrtc => &["nvrtcVersion"],
            Self::CublasLt => &["cublasLtGetVersion"],
        }
    }

    /// What else is called, by `device`, `compile` and `blas`.
    fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &[
                "cuCtxSetCurrent",
                "cuDeviceGet",
                "cuDeviceGetAttribute",
                "cuDeviceGetCount",
                "cuDeviceGetName",
                "cuDevicePrimaryCtxRelease_v2",
                "cuDevicePrimaryCtxRetain",
                "cuDeviceTotalMem_v2",
                "cuEventCreate",
                "cuEventDestroy_v2",
                "cuEventElapsedTime_v2",
                "cuEventRecord",
                "cuEventSynchronize",
                "cuFuncSetAttribute",
                "cuGraphDestroy",
                "cuGraphExecDestroy",
                "cuGraphInstantiateWithFlags",
                "cuGraphLaunch",
                "cuLaunchKernel",
                "cuMemAlloc_v2",
                "cuMemFree_v2",
                "cuMemGetInfo_v2",
                "cuMemcpyDtoDAsync_v2",
                "cuMemcpyDtoHAsync_v2",
                "cuMemcpyHtoDAsync_v2",
                "cuMemsetD8Async",
                "cuModuleGetFunction",
                "cuModuleLoadData",
                "cuModuleUnload",
                "cuStreamBeginCapture_v2",
                "cuStreamCreate",
                "cuStreamDestroy_v2",
                "cuStreamEndCapture",
                "cuStreamSynchronize",
                "cuTensorMapEncodeTiled",
            ],
            Self::Nvrtc => &[
                "nvrtcCompileProgram",
                "nvrtcCreateProgram",
                "nvrtcDestroyProgram",
                "nvrtcGetCUBIN",
                "nvrtcGetCUBINSize",
                "nvrtcGetPTX",
                "nvrtcGetPTXSize",
                "nvrtcGetProgramLog",
                "nvrtcGetProgramLogSize",
            ],
            Self::CublasLt => &[
                "cublasLtCreate",
                "cublasLtDestroy",
                "cublasLtMatmul",
                "cublasLtMatmulAlgoGetHeuristic",
                "cublasLtMatmulDescCreate",
                "cublasLtMatmulDescDestroy",
                "cublasLtMatmulDescSetAttribute",
                "cublasLtMatmulPreferenceCreate",
                "cublasLtMatmulPreferenceDestroy",
                "cublasLtMatmulPreferenceSetAttribute",
                "cublasLtMatrixLayoutCreate",
                "cublasLtMatrixLayoutDestroy",
            ],
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

    /// Whether it has all of these; it can be loaded.
    fn has(self, functions: &[&'static str]) -> Result<(), LibraryError> {
        // SAFETY: the library was found to be present, and is opened for good. Nothing that is looked up is called here.
        let lacks = unsafe {
            let library = match self {
                Self::Driver => cudarc::driver::sys::culib(),
                Self::Nvrtc => cudarc::nvrtc::sys::culib(),
                Self::CublasLt => cudarc::cublaslt::sys::culib(),
            };
            functions
                .iter()
                .find(|function| library.get::<unsafe extern "C" fn()>(function.as_bytes()).is_err())
        };
        lacks.map_or(Ok(()), |&function| Err(LibraryError::Incomplete { of: self, function }))
    }
}

/// Whether some libraries can be loaded and asked for their versions.
pub(super) fn loaded(wanted: &[Library]) -> Result<(), LibraryError> {
    let missing: Vec<Library> = wanted.iter().copied().filter(|library| !library.is_present()).collect();
    if !missing.is_empty() {
        return Err(LibraryError::NotLoaded(missing));
    }
    wanted.iter().try_for_each(|library| library.has(library.first_functions()))
}

/// Whether some libraries, which are [`loaded`], have everything that is called of them.
pub(super) fn complete(wanted: &[Library]) -> Result<(), LibraryError> {
    wanted.iter().try_for_each(|library| library.has(library.functions()))
}

/// Whether some libraries can be used.
///
/// # Errors
/// What is missing.
pub fn require(wanted: &[Library]) -> Result<(), LibraryError> {
    loaded(wanted).and_then(|()| complete(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The libraries that stand in for CUDA's in tests have what is called, or those tests fail.
    #[test]
    fn what_is_called_is_asked_for() {
        let standin = include_str!("../../../../tests/standin/cuda.cpp");
        let declared = standin.lines().filter_map(|line| {
            line.strip_prefix("API ")?
                .split(['(', ' '])
                .find(|word| ["cu", "nvrtc"].iter().any(|start| word.starts_with(start)))
        });
        let libraries = [Library::Driver, Library::Nvrtc, Library::CublasLt];
        let asked =
            libraries.iter().flat_map(|library| library.first_functions().iter().chain(library.functions()));
        let (mut declared, mut asked): (Vec<&str>, Vec<&str>) =
            (declared.collect(), asked.copied().collect());
        declared.sort_unstable();
        asked.sort_unstable();
        assert_eq!(declared, asked);
    }

    #[test]
    fn everything_that_is_missing_is_told_at_once() {
        let told = |libraries: &[Library]| LibraryError::NotLoaded(libraries.to_vec()).to_string();
        assert_eq!(
            told(&[Library::Driver]),
            "NVIDIA's driver (libcuda) cannot be loaded: install the NVIDIA driver, version 580 or later"
        );
        assert_eq!(
            told(&[Library::Driver, Library::Nvrtc, Library::CublasLt]),
            "NVIDIA's driver (libcuda), CUDA's run-time compiler (libnvrtc) and CUDA's matrix products (libcublasLt) cannot be \
             loaded: install the NVIDIA driver, version 580 or later, and the CUDA toolkit 13 (or Python's nvidia-cuda-nvrtc and \
             nvidia-cublas, with their folder in LD_LIBRARY_PATH)"
        );
    }
}
