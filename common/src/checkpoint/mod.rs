//! Checkpoints: directories that Hugging Face's `transformers` reads and writes.
//!
//! A directory holds `config.json` and `model.safetensors`. Dense models are `LlamaForCausalLM`; mixtures of experts
//! are `MixtralForCausalLM` (top-k, then softmax) or `Qwen2MoeForCausalLM` (softmax, then top-k, not renormalised;
//! its query, key and value biases and its shared expert are written as zeros, which leaves the function as it is).
//! Parameters are read into, and written from, the flat vector of [`ModelConfig::layout`].

mod config;
mod tensors;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

pub use self::config::{Architecture, parse_config};
use crate::model_config::{ModelConfig, ModelConfigError};

/// The model's description.
pub const CONFIG_FILE: &str = "config.json";
/// The model's parameters.
pub const TENSORS_FILE: &str = "model.safetensors";

/// Why a checkpoint could not be read or written; every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// `config.json` is not the JSON of a model.
    #[error("{path} is not a model configuration")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A setting that the model needs is missing.
    #[error("{path} does not set {key}")]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
    },
    /// A setting that this decoder cannot follow.
    #[error("{path} sets {key} to {value}, which is not supported")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// The settings contradict one another.
    #[error("{path} describes a model that cannot be built")]
    Model {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        source: ModelConfigError,
    },
    /// The tensor file's header is broken, or its length is wrong.
    #[error("{path} is not a valid safetensors file")]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// What is broken.
        source: safetensors::SafeTensorError,
    },
    /// A tensor of the model is not in the file.
    #[error("{path} has no tensor {name}")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file's architecture.
        name: String,
    },
    /// A tensor that the described model does not have.
    #[error("{path} has a tensor {name}, which the model does not have")]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of the wrong shape.
    #[error("{path}: tensor {name} has the shape {found:?}, the model needs {expected:?}")]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The model's shape.
        expected: Vec<usize>,
        /// The file's shape.
        found: Vec<usize>,
    },
    /// A tensor in a number format that is not read.
    #[error("{path}: tensor {name} is stored as {found:?}, only F32 is read")]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The file's number format.
        found: safetensors::Dtype,
    },
    /// A tensor that must be zero for this decoder to compute the same function.
    #[error("{path}: tensor {name} is not zero, but this model has no such part")]
    NotZero {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
}

/// Writes a checkpoint and any further files into a directory, which is created if need be.
///
/// Each file is written under a temporary name, synced and renamed, the configuration last: a crash leaves the old
/// file or the new one, never half of one.
///
/// # Errors
/// [`CheckpointError::Io`], or [`CheckpointError::Model`] for a configuration without a layout.
///
/// # Panics
/// If `params` is not as long as the configuration's layout.
pub fn save(
    directory: &Path,
    config: &ModelConfig,
    params: &[f32],
    extra: &[(&str, &[u8])],
) -> Result<(), CheckpointError> {
    fs::create_dir_all(directory).map_err(at(directory))?;
    let config_path = directory.join(CONFIG_FILE);
    let layout =
        config.layout().map_err(|source| CheckpointError::Model { path: config_path.clone(), source })?;
    assert_eq!(params.len(), layout.len(), "parameters do not fit the model's layout");
    replace(&directory.join(TENSORS_FILE), |path| tensors::write(path, config, &layout, params))?;
    for (name, bytes) in extra {
        write_file(&directory.join(name), bytes)?;
    }
    write_file(&config_path, config::to_json(config).as_bytes())?;
    sync_directory(directory)
}

/// Reads a checkpoint: its configuration and the flat parameter vector in the configuration's layout.
///
/// # Errors
/// A [`CheckpointError`] naming the file, and the setting or tensor, that could not be used.
pub fn load(directory: &Path) -> Result<(ModelConfig, Vec<f32>), CheckpointError> {
    let path = directory.join(CONFIG_FILE);
    let text = fs::read(&path).map_err(at(&path))?;
    let (architecture, config) = config::parse_config(&path, &text)?;
    let layout = config.layout().map_err(|source| CheckpointError::Model { path, source })?;
    let params = tensors::read(&directory.join(TENSORS_FILE), architecture, &config, &layout)?;
    Ok((config, params))
}

/// Turns an IO error into one that names the file.
fn at(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}

/// Writes, syncs and renames a file.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    replace(path, |temporary| {
        let mut file = File::create(temporary).map_err(at(temporary))?;
        file.write_all(bytes).map_err(at(temporary))
    })
}

/// Lets `write` fill a temporary file, syncs it and puts it in the place of `path`.
fn replace(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    let result = write(&temporary)
        .and_then(|()| File::open(&temporary).and_then(|file| file.sync_all()).map_err(at(&temporary)))
        .and_then(|()| fs::rename(&temporary, path).map_err(at(path)));
    if result.is_err() {
        // The error above is what matters; a left-over file is only untidy.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Makes the renames durable, where directories can be opened at all.
fn sync_directory(directory: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        File::open(directory).and_then(|file| file.sync_all()).map_err(at(directory))?;
    }
    Ok(())
}
