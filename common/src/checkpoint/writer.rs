//! Writing a checkpoint: shard after shard, tensor after tensor, from wherever the values come.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, SafeTensorError, View};
use serde_json::json;

use super::config::to_json;
use super::error::at;
use super::names::{neutral_tensors, stored_name};
use super::{
    Architecture, CONFIG_FILE, CheckpointError, GENERATION_FILE, INDEX_FILE, SpecialTokens, StagedDirectory,
    TENSORS_FILE, TensorSource, row_shape,
};
use crate::model_config::ModelConfig;

/// A tensor file is closed before it outgrows this many bytes, as `transformers` does; a larger tensor has a file of its
/// own.
pub const SHARD_BYTES_DEFAULT: u64 = 5_000_000_000;

/// How values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum StoredType {
    /// 4 bytes, as they are
    #[default]
    Float32,
    /// 2 bytes, rounded to the nearest
    Bfloat16,
}

impl StoredType {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }

    /// The name that `transformers` has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::Float32 => Dtype::F32,
            Self::Bfloat16 => Dtype::BF16,
        }
    }

    fn append(self, values: &[f32], bytes: &mut Vec<u8>) {
        let start = bytes.len();
        // Room first and then slots of a fixed size: pushing value by value is several times slower.
        bytes.resize(start + values.len() * self.bytes(), 0);
        let slots = bytes[start..].chunks_exact_mut(self.bytes()).zip(values);
        match self {
            Self::Float32 => slots.for_each(|(slot, value)| slot.copy_from_slice(&value.to_le_bytes())),
            Self::Bfloat16 => {
                slots.for_each(|(slot, &value)| slot.copy_from_slice(&bf16::from_f32(value).to_le_bytes()));
            }
        }
    }
}

/// How a checkpoint is written.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// How values are stored.
    pub stored_type: StoredType,
    /// Bytes of values in one file; see [`SHARD_BYTES_DEFAULT`].
    pub shard_bytes_max: u64,
    /// Named in `config.json`.
    pub special_tokens: SpecialTokens,
    /// Further files of the directory: name and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// Whether it takes the place of a directory of its name; otherwise that is an error, also when somebody made it
    /// while this one was being written.
    pub replaces: bool,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            stored_type: StoredType::default(),
            shard_bytes_max: SHARD_BYTES_DEFAULT,
            special_tokens: SpecialTokens::default(),
            files: Vec::new(),
            replaces: true,
        }
    }
}

/// A tensor to write, by the names in the file and in the model; the latter is `None` for zeros.
struct Planned {
    stored_name: String,
    name: Option<String>,
    shape: Vec<usize>,
}

impl Planned {
    fn bytes(&self, stored_type: StoredType) -> u64 {
        (self.shape.iter().product::<usize>() * stored_type.bytes()) as u64
    }
}

/// The bytes of values that [`write()`] writes for a model.
///
/// # Panics
/// If the configuration has no layout.
pub fn stored_bytes(config: &ModelConfig, stored_type: StoredType) -> u64 {
    plan(config).iter().map(|tensor| tensor.bytes(stored_type)).sum()
}

/// Writes a checkpoint: the directory appears when it is complete.
///
/// `progress` is told the bytes of values written so far after every tensor, and may call the work off. The memory that
/// is used is that of the largest tensor, as it is stored, and of what `source` needs to make it.
///
/// # Errors
/// A [`CheckpointError`]; nothing is left of the directory then.
///
/// # Panics
/// If `source` lacks a tensor of the model.
pub fn write(
    directory: &Path,
    config: &ModelConfig,
    options: &WriteOptions,
    source: &dyn TensorSource,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), CheckpointError> {
    let config_path = directory.join(CONFIG_FILE);
    config.layout().map_err(|source| CheckpointError::Model { path: config_path, source })?;
    if Architecture::of(config).is_none() {
        return Err(CheckpointError::NoArchitecture { path: directory.to_owned() });
    }
    let staged = StagedDirectory::create(directory)?;
    let shards = cut(plan(config), options);
    let count = shards.len();
    let writing = Writing {
        directory,
        options,
        source,
        state: RefCell::new(State { written: 0, failure: None, progress }),
    };
    let mut weight_map = BTreeMap::new();
    for (number, tensors) in shards.into_iter().enumerate() {
        let file = match count {
            1 => TENSORS_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(tensors.iter().map(|tensor| (tensor.stored_name.clone(), file.clone())));
        writing.write_shard(&staged, &file, &tensors)?;
    }
    if count > 1 {
        let total = stored_bytes(config, options.stored_type);
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        staged.write_file(INDEX_FILE, format!("{index:#}\n").as_bytes())?;
    }
    for (name, bytes) in &options.files {
        staged.write_file(name, bytes)?;
    }
    if !options.files.iter().any(|(name, _)| name == GENERATION_FILE) {
        staged.write_file(GENERATION_FILE, options.special_tokens.generation_config().as_bytes())?;
    }
    staged.write_file(CONFIG_FILE, to_json(config, options).as_bytes())?;
    if options.replaces { staged.commit() } else { staged.commit_new() }
}

/// All tensors of the files, in the order of the layout.
fn plan(config: &ModelConfig) -> Vec<Planned> {
    let architecture = Architecture::of(config).expect("the model can be written");
    let layout = config.layout().expect("the model has a layout");
    let own = layout.tensors().iter().map(|tensor| Planned {
        stored_name: stored_name(architecture, &tensor.name),
        name: Some(tensor.name.clone()),
        shape: tensor.shape.clone(),
    });
    let neutral = neutral_tensors(architecture, config).into_iter();
    own.chain(neutral.map(|(stored_name, shape)| Planned { stored_name, name: None, shape })).collect()
}

/// Runs of tensors of at most `shard_bytes_max`.
fn cut(tensors: Vec<Planned>, options: &WriteOptions) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = Vec::new();
    let mut filled = u64::MAX;
    for tensor in tensors {
        let bytes = tensor.bytes(options.stored_type);
        filled = filled.saturating_add(bytes);
        if filled > options.shard_bytes_max {
            shards.push(Vec::new());
            filled = bytes;
        }
        shards.last_mut().expect("the first tensor opens a shard").push(tensor);
    }
    shards
}

/// A checkpoint that is being written.
struct Writing<'a> {
    directory: &'a Path,
    options: &'a WriteOptions,
    source: &'a dyn TensorSource,
    state: RefCell<State<'a>>,
}

struct State<'a> {
    written: u64,
    /// The library asks for a tensor's bytes by a call that cannot fail, so a failure waits here for the next look.
    failure: Option<CheckpointError>,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

/// One tensor of it.
struct Stored<'w, 'a> {
    writing: &'w Writing<'a>,
    tensor: &'w Planned,
}

impl View for Stored<'_, '_> {
    fn dtype(&self) -> Dtype {
        self.writing.options.stored_type.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.writing.bytes(self.tensor).into()
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes(self.writing.options.stored_type) as usize
    }
}

impl Writing<'_> {
    fn write_shard(
        &self,
        staged: &StagedDirectory,
        file: &str,
        tensors: &[Planned],
    ) -> Result<(), CheckpointError> {
        let path = staged.path().join(file);
        let named = self.directory.join(file);
        // The library puts a private file (mode 0600) in the place of whatever is there; a checkpoint is to have the
        // permissions of any other new file.
        let created = fs::File::create(&path).and_then(|file| file.metadata()).map_err(at(&named))?;
        let views = tensors.iter().map(|tensor| (&tensor.stored_name, Stored { writing: self, tensor }));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let written = safetensors::serialize_to_file(views, Some(metadata), &path);
        if let Some(failure) = self.state.borrow_mut().failure.take() {
            return Err(failure);
        }
        written.map_err(|error| match error {
            SafeTensorError::IoError(source) => at(&named)(source),
            source => CheckpointError::SafeTensors { path: named.clone(), source },
        })?;
        fs::set_permissions(&path, created.permissions()).map_err(at(&named))?;
        fs::File::open(&path).and_then(|file| file.sync_all()).map_err(at(&named))
    }

    /// A tensor as it is stored; nothing after a failure, so that the library comes to its end quickly.
    fn bytes(&self, tensor: &Planned) -> Vec<u8> {
        let mut state = self.state.borrow_mut();
        if state.failure.is_some() {
            return Vec::new();
        }
        let length = tensor.bytes(self.options.stored_type);
        let mut bytes = Vec::with_capacity(length as usize);
        match &tensor.name {
            Some(name) => {
                let (rows, _) = row_shape(&tensor.shape);
                let mut append = |row: &[f32]| self.options.stored_type.append(row, &mut bytes);
                state.failure = self.source.rows(name, 0..rows, &mut append).err();
            }
            None => bytes.resize(length as usize, 0),
        }
        state.written += length;
        let written = state.written;
        if state.failure.is_none() && (state.progress)(written).is_break() {
            state.failure = Some(CheckpointError::Interrupted { path: self.directory.to_owned() });
        }
        bytes
    }
}
