//! `model.safetensors`: the flat parameter vector as named tensors, and back.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensorError, SafeTensors, View};

use super::config::NEUTRAL_SHARED_EXPERT;
use super::{Architecture, CheckpointError, at};
use crate::layout::Layout;
use crate::model_config::ModelConfig;

/// A tensor to write; its bytes are made when the writer asks, so the file never lies in memory as a whole.
struct Stored<'a> {
    shape: Vec<usize>,
    /// `None` for zeros.
    values: Option<&'a [f32]>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.values {
            Some(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            None => vec![0; self.data_len()].into(),
        }
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}

/// Writes all tensors of a model in float32.
pub(super) fn write(
    path: &Path,
    config: &ModelConfig,
    layout: &Layout,
    params: &[f32],
) -> Result<(), CheckpointError> {
    let architecture = Architecture::of(config);
    let own = layout.tensors().iter().map(|tensor| {
        let values = Some(&params[tensor.range()]);
        (stored_name(architecture, &tensor.name), Stored { shape: tensor.shape.clone(), values })
    });
    let neutral = neutral_tensors(architecture, config)
        .into_iter()
        .map(|(name, shape)| (name, Stored { shape, values: None }));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // The writer of safetensors puts a private file (mode 0600) in the place of whatever is there; a checkpoint is to
    // have the permissions of any other new file.
    let created = fs::File::create(path).and_then(|file| file.metadata()).map_err(at(path))?;
    safetensors::serialize_to_file(own.chain(neutral), Some(metadata), path).map_err(
        |error| match error {
            SafeTensorError::IoError(source) => at(path)(source),
            source => CheckpointError::SafeTensors { path: path.to_owned(), source },
        },
    )?;
    fs::set_permissions(path, created.permissions()).map_err(at(path))
}

/// Reads all tensors of a model into its flat vector.
pub(super) fn read(
    path: &Path,
    architecture: Architecture,
    config: &ModelConfig,
    layout: &Layout,
) -> Result<Vec<f32>, CheckpointError> {
    let bytes = fs::read(path).map_err(at(path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|source| CheckpointError::SafeTensors { path: path.to_owned(), source })?;
    let mut params = vec![0.0; layout.len()];
    let mut known = HashSet::new();
    for tensor in layout.tensors() {
        let name = stored_name(architecture, &tensor.name);
        let values = find(path, &file, &name, Some(&tensor.shape))?;
        params[tensor.range()].iter_mut().zip(floats(values)).for_each(|(param, value)| *param = value);
        known.insert(name);
    }
    for (name, _) in neutral_tensors(architecture, config) {
        // Only what multiplies or is added to the rest must vanish; a neutral expert's inner parts may be anything.
        let decides = name.ends_with(".bias") || name.ends_with("down_proj.weight");
        if decides && floats(find(path, &file, &name, None)?).any(|value| value != 0.0) {
            return Err(CheckpointError::NotZero { path: path.to_owned(), name });
        }
        known.insert(name);
    }
    let unexpected =
        file.names().into_iter().find(|name| !known.contains(*name) && !is_derived(config, name));
    match unexpected {
        Some(name) => Err(CheckpointError::UnexpectedTensor { path: path.to_owned(), name: name.to_owned() }),
        None => Ok(params),
    }
}

/// The bytes of one float32 tensor.
fn find<'a>(
    path: &Path,
    file: &SafeTensors<'a>,
    name: &str,
    shape: Option<&[usize]>,
) -> Result<&'a [u8], CheckpointError> {
    let missing = |_| CheckpointError::MissingTensor { path: path.to_owned(), name: name.to_owned() };
    let tensor = file.tensor(name).map_err(missing)?;
    if tensor.dtype() != Dtype::F32 {
        let (path, name, found) = (path.to_owned(), name.to_owned(), tensor.dtype());
        return Err(CheckpointError::TensorType { path, name, found });
    }
    if let Some(expected) = shape.filter(|&shape| shape != tensor.shape()) {
        let (path, name) = (path.to_owned(), name.to_owned());
        let (expected, found) = (expected.to_vec(), tensor.shape().to_vec());
        return Err(CheckpointError::TensorShape { path, name, expected, found });
    }
    Ok(tensor.data())
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("chunks of four bytes")))
}

/// Tensors that some writers add though they follow from the others.
fn is_derived(config: &ModelConfig, name: &str) -> bool {
    (config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
}

/// The name of one of our tensors in an architecture's files.
fn stored_name(architecture: Architecture, name: &str) -> String {
    match architecture {
        Architecture::Llama | Architecture::Mixtral => name.to_owned(),
        Architecture::Qwen2Moe => name
            .replace(".block_sparse_moe.", ".mlp.")
            .replace(".w1.", ".gate_proj.")
            .replace(".w3.", ".up_proj.")
            .replace(".w2.", ".down_proj."),
    }
}

/// Names and shapes of the tensors that an architecture demands and that our model does not have.
fn neutral_tensors(architecture: Architecture, config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    if architecture != Architecture::Qwen2Moe {
        return Vec::new();
    }
    let (d, shared) = (config.hidden_size, NEUTRAL_SHARED_EXPERT);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let per_layer = |layer: usize| {
        [
            ("self_attn.q_proj.bias", vec![q]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("mlp.shared_expert.gate_proj.weight", vec![shared, d]),
            ("mlp.shared_expert.up_proj.weight", vec![shared, d]),
            ("mlp.shared_expert.down_proj.weight", vec![d, shared]),
            ("mlp.shared_expert_gate.weight", vec![1, d]),
        ]
        .map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape))
    };
    (0..config.layers).flat_map(per_layer).collect()
}
