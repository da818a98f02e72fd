//! What can be wrong with a checkpoint.

use std::path::{Path, PathBuf};

use crate::model_config::ModelConfigError;

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
    #[error("{path} sets {key} to {value}, which is not supported; {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is, in words.
        supported: &'static str,
    },
    /// A file larger than any of its kind.
    #[error("{path} has {bytes} bytes; at most {bytes_max} are read")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// `model.safetensors.index.json` does not say which tensor is in which file.
    #[error("{path} is not an index of tensor files")]
    Index {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// An index that leads out of its directory.
    #[error("{path} places tensor {name} in {file:?}, which is not a plain file name")]
    IndexPath {
        /// The index.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Where it is said to be.
        file: String,
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
    /// A header that says of a tensor what cannot be.
    #[error("{path} describes tensor {name} wrongly: {what}")]
    Header {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A tensor file is shorter, or longer, than its header says.
    #[error(
        "{path} has {found} bytes, but its header announces {expected}{}",
        .cut_off.as_ref().map(|name| format!("; tensor {name} is cut off")).unwrap_or_default()
    )]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// Bytes by the header.
        expected: u64,
        /// Bytes that there are.
        found: u64,
        /// The first tensor that is not whole.
        cut_off: Option<String>,
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
    #[error("{path}: tensor {name} is stored as {found:?}; only F32, BF16 and F16 are read")]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The file's number format.
        found: safetensors::Dtype,
    },
    /// No Hugging Face architecture computes the model.
    #[error(
        "{path}: no Hugging Face architecture holds a dense model with biases of queries, keys and values"
    )]
    NoArchitecture {
        /// What was to be written.
        path: PathBuf,
    },
    /// The directory to write is there already.
    #[error("{path} exists already; name a directory that does not, or remove it")]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// A place without a name of its own, such as `.` or `/`.
    #[error("{path} is no name that a directory can be given; name one to be made, such as {path}/model")]
    NoName {
        /// The place.
        path: PathBuf,
    },
    /// Values that no model has.
    #[error(
        "{path} holds a value in tensor {name} that is not a number, infinite or above 2^100; the model is damaged"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor, by the model's name.
        name: String,
    },
    /// A directory that another process is filling.
    #[error("another process is writing {path}")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// Whoever asked for the work has called it off.
    #[error("stopped before {path} was complete; nothing of it is left")]
    Interrupted {
        /// What was being written.
        path: PathBuf,
    },
}

/// Turns an IO error into one that names the file.
pub(super) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}
