//! Checkpoints: directories that Hugging Face's `transformers` reads and writes.
//!
//! A directory holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the shards that it
//! names. Dense models are `LlamaForCausalLM`; mixtures of experts are `MixtralForCausalLM` (top-k, then softmax) or
//! `Qwen2MoeForCausalLM` (softmax, then top-k, or anything with a shared expert or biases of queries, keys and values).
//!
//! [`Checkpoint::open`] reads and checks everything but the values; those are mapped from the files a tensor at a time
//! ([`TensorSource`]) or read into the flat vector of
//! [`ModelConfig::layout`](crate::model_config::ModelConfig::layout). [`write()`] takes values from any source and
//! writes shard after shard, so that neither way needs the memory of a whole model.

mod config;
mod error;
mod names;
mod reader;
mod staged;
mod writer;

use std::ops::Range;
use std::path::Path;

pub use self::config::{Architecture, SpecialTokens, parse_config};
pub use self::error::CheckpointError;
pub(crate) use self::reader::read_small;
pub use self::reader::{Checkpoint, StoredTensors};
pub use self::staged::StagedDirectory;
pub use self::writer::{SHARD_BYTES_DEFAULT, StoredType, WriteOptions, stored_bytes, write};
use crate::layout::Layout;
use crate::model_config::ModelConfig;

/// The model's description.
pub const CONFIG_FILE: &str = "config.json";
/// The model's parameters, where they are in one file.
pub const TENSORS_FILE: &str = "model.safetensors";
/// Which tensor is in which file, where there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// What `transformers` generates with.
pub const GENERATION_FILE: &str = "generation_config.json";

/// Files that describe the text side of a model and stay true when its weights change.
pub const CARRIED_FILES: [&str; 9] = [
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_FILE,
    "vocab.json",
    "merges.txt",
];

/// The values of a model's tensors, by the names of its layout.
pub trait TensorSource {
    /// Hands `sink` the rows of a tensor, one at a time and in order. A tensor of one axis is one row; a matrix
    /// (outputs, inputs) has rows of `inputs` values.
    ///
    /// # Errors
    /// A [`CheckpointError`] if the values cannot be read.
    ///
    /// # Panics
    /// If there is no such tensor, or it has fewer rows.
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError>;
}

/// The rows of a tensor, and the values in each.
pub fn row_shape(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [width] => (1, *width),
        [rows @ .., width] => (rows.iter().product(), *width),
    }
}

/// The largest magnitude of a parameter that is read, 2¹⁰⁰: far above any that a model computes with, and what a server
/// begins with so that no number of updates makes a model infinite.
pub const PARAMETER_MAGNITUDE_MAX: f32 = (1_u128 << 100) as f32;

/// A flat parameter vector as a source.
#[derive(Clone, Copy, Debug)]
pub struct FlatParameters<'a> {
    /// Where each tensor lies.
    pub layout: &'a Layout,
    /// All values.
    pub values: &'a [f32],
}

impl TensorSource for FlatParameters<'_> {
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let tensor = self.layout.find(name).unwrap_or_else(|| panic!("the layout has no tensor {name}"));
        let (_, width) = row_shape(&tensor.shape);
        let values = &self.values[tensor.range()][rows.start * width..rows.end * width];
        values.chunks_exact(width).for_each(sink);
        Ok(())
    }
}

/// All values of a source as the flat vector of `layout`.
///
/// # Errors
/// A [`CheckpointError`] if the values cannot be read.
///
/// # Panics
/// If the source lacks a tensor of the layout.
pub fn flatten(layout: &Layout, source: &dyn TensorSource) -> Result<Vec<f32>, CheckpointError> {
    let mut values = Vec::with_capacity(layout.len());
    for tensor in layout.tensors() {
        let (rows, _) = row_shape(&tensor.shape);
        source.rows(&tensor.name, 0..rows, &mut |row| values.extend_from_slice(row))?;
    }
    assert_eq!(values.len(), layout.len(), "a source hands out every value once");
    Ok(values)
}

/// Writes a float32 checkpoint and any further files into a directory, in the place of one that is there.
///
/// # Errors
/// As [`write()`].
///
/// # Panics
/// If `params` is not as long as the configuration's layout.
pub fn save(
    directory: &Path,
    config: &ModelConfig,
    params: &[f32],
    extra: &[(&str, &[u8])],
) -> Result<(), CheckpointError> {
    let layout = config
        .layout()
        .map_err(|source| CheckpointError::Model { path: directory.join(CONFIG_FILE), source })?;
    assert_eq!(params.len(), layout.len(), "parameters do not fit the model's layout");
    let options = WriteOptions {
        files: extra.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect(),
        ..WriteOptions::default()
    };
    let source = FlatParameters { layout: &layout, values: params };
    write(directory, config, &options, &source, &mut |_| std::ops::ControlFlow::Continue(()))
}

/// Reads a checkpoint: its configuration and the flat parameter vector in the configuration's layout.
///
/// # Errors
/// A [`CheckpointError`] naming the file, and the setting or tensor, that could not be used.
pub fn load(directory: &Path) -> Result<(ModelConfig, Vec<f32>), CheckpointError> {
    let checkpoint = Checkpoint::open(directory)?;
    let parameters = checkpoint.load()?;
    Ok((checkpoint.config().clone(), parameters))
}
