//! Compiling kernels with NVRTC, which needs no device.

use std::ffi::{CString, c_char};

use cudarc::nvrtc::{result, sys};

use super::super::source::Source;

/// A kernel that does not compile.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the kernels {name} do not compile for {architecture} ({status}):\n{log}")]
pub struct CompileError {
    /// The translation unit.
    pub name: &'static str,
    /// What it was compiled for.
    pub architecture: String,
    /// NVRTC's name for what went wrong.
    pub status: String,
    /// What the compiler wrote.
    pub log: String,
}

/// What became of a translation unit.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code, or text for a driver to compile further.
    pub code: Vec<u8>,
    /// Warnings.
    pub log: String,
}

/// The compiler's version, which is a part of what names a compiled unit in the cache: zeros if it does not say.
///
/// # Panics
/// If NVRTC cannot be used: ask [`require`](super::require) before.
pub fn compiler_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are valid for the call; a failure leaves the zeros.
    unsafe {
        let _ = sys::nvrtcVersion(&raw mut major, &raw mut minor);
    }
    (major, minor)
}

/// Text that a driver compiles further, for any device from `architecture` on (such as `compute_80`).
///
/// # Errors
/// What the compiler says.
///
/// # Panics
/// If NVRTC cannot be used: ask [`require`](super::require) before.
pub fn compile_to_ptx(source: &Source, architecture: &str) -> Result<Compiled, CompileError> {
    compile(source, architecture, Form::Ptx)
}

/// The architecture that machine code is made for on a device of that compute capability, times ten: on Hopper with the
/// instructions that only Hopper has.
pub fn architecture(capability: u32) -> String {
    match capability {
        90 => "sm_90a".to_owned(),
        capability => format!("sm_{capability}"),
    }
}

/// Machine code for `architecture` (such as `sm_90a`). Only here the instructions that kernels write themselves are read.
///
/// # Errors
/// What the compiler says.
///
/// # Panics
/// If NVRTC cannot be used: ask [`require`](super::require) before.
pub fn compile_to_cubin(source: &Source, architecture: &str) -> Result<Compiled, CompileError> {
    compile(source, architecture, Form::Cubin)
}

#[derive(Clone, Copy)]
enum Form {
    Ptx,
    Cubin,
}

/// All options, which name a compiled unit in the cache too.
pub(super) fn options(source: &Source, architecture: &str) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    options.extend(source.defines.iter().cloned());
    options
}

fn compile(source: &Source, architecture: &str, form: Form) -> Result<Compiled, CompileError> {
    let error = |status: String, log: String| CompileError {
        name: source.name,
        architecture: architecture.to_owned(),
        status,
        log,
    };
    let text = CString::new(source.text.as_str()).map_err(|nul| error(nul.to_string(), String::new()))?;
    let name = CString::new(format!("{}.cu", source.name)).expect("the units' names have no zeros");
    let program = result::create_program(&text, Some(&name))
        .map_err(|status| error(format!("{:?}", status.0), String::new()))?;
    // SAFETY: the program was just created; it is destroyed below, once.
    let compiled = unsafe { result::compile_program(program, &options(source, architecture)) };
    let log = log(program);
    let outcome = match compiled {
        Ok(()) => code(program, form).map_err(|status| (format!("{status:?}"), String::new())),
        Err(status) => Err((format!("{:?}", status.0), log.clone())),
    };
    // SAFETY: nothing uses the program from here on. That it cannot be destroyed would be of no consequence.
    let _ = unsafe { result::destroy_program(program) };
    outcome.map(|code| Compiled { code, log }).map_err(|(status, log)| error(status, log))
}

fn log(program: sys::nvrtcProgram) -> String {
    // SAFETY: the program exists.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    // C's characters are signed on some systems and unsigned on others.
    let bytes: Vec<u8> = log.iter().flat_map(|byte| byte.to_ne_bytes()).filter(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn code(program: sys::nvrtcProgram, form: Form) -> Result<Vec<u8>, sys::nvrtcResult> {
    let mut len = 0;
    // SAFETY: the program was compiled, and each call gets a buffer of the size that the one before it asked for.
    unsafe {
        let status = match form {
            Form::Ptx => sys::nvrtcGetPTXSize(program, &raw mut len),
            Form::Cubin => sys::nvrtcGetCUBINSize(program, &raw mut len),
        };
        status.result().map_err(|error| error.0)?;
        let mut bytes = vec![0u8; len];
        let to = bytes.as_mut_ptr().cast::<c_char>();
        let status = match form {
            Form::Ptx => sys::nvrtcGetPTX(program, to),
            Form::Cubin => sys::nvrtcGetCUBIN(program, to),
        };
        status.result().map_err(|error| error.0)?;
        Ok(bytes)
    }
}
