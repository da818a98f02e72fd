//! Reading a checkpoint: everything is checked when it is opened, values are mapped when they are asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::error::at;
use super::names::{decides, is_derived, neutral_tensors, stored_name};
use super::{
    Architecture, CONFIG_FILE, CheckpointError, GENERATION_FILE, INDEX_FILE, PARAMETER_MAGNITUDE_MAX,
    SpecialTokens, TENSORS_FILE, TensorSource, flatten, parse_config, row_shape,
};
use crate::layout::Layout;
use crate::mapped::MappedFile;
use crate::model_config::ModelConfig;

/// The largest `config.json` or index that is read, in bytes.
const JSON_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a tensor that are mapped at a time, unless a single row has more.
const MAPPED_BYTES: usize = 32 << 20;

/// Rows that are looked at together for a value that is not zero.
const ROWS_LOOKED_AT: usize = 64;

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Within the file, in bytes.
    range: Range<usize>,
}

/// A checkpoint whose description and headers have been read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    architecture: Architecture,
    config: ModelConfig,
    layout: Layout,
    special_tokens: SpecialTokens,
    files: Vec<PathBuf>,
    /// By the name in the file.
    places: HashMap<String, Place>,
}

/// What a checkpoint's tensor files hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredTensors {
    /// Files with tensors.
    pub files: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of their values.
    pub bytes: u64,
    /// Values by number format.
    pub values: BTreeMap<String, u64>,
}

impl Checkpoint {
    /// Opens a directory: reads `config.json` and the headers of the tensor files, and checks that every tensor of the
    /// model is there, in a readable format and of the right shape, and no other.
    ///
    /// A shared expert whose down projection is zero in every layer, and biases that are zero in every layer, change
    /// nothing; `Qwen2MoeForCausalLM` demands them, so they are written where a model has none, and left out here.
    ///
    /// # Errors
    /// A [`CheckpointError`] naming the file, and the setting or tensor, that could not be used.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(CONFIG_FILE);
        let (architecture, config, mut special_tokens) = parse_config(&path, &read_small(&path)?)?;
        let generation = directory.join(GENERATION_FILE);
        if generation.is_file() {
            special_tokens.add_ends(&read_small(&generation)?);
        }
        special_tokens.leave_out_from(config.vocab_size);
        let (files, places) = find_tensors(directory)?;
        let layout = config.layout().map_err(|source| CheckpointError::Model { path, source })?;
        let directory = directory.to_owned();
        let mut checkpoint = Self { directory, architecture, config, layout, special_tokens, files, places };
        checkpoint.check_presence()?;
        checkpoint.leave_out_neutral_parts()?;
        Ok(checkpoint)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The architecture it is written as.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layout of the model's parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its special tokens.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// Reads all parameters into a flat vector in the order of [`layout`](Self::layout).
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn load(&self) -> Result<Vec<f32>, CheckpointError> {
        flatten(&self.layout, self)
    }

    /// A file of the directory; `None` if it is not there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or [`CheckpointError::FileTooLarge`].
    pub fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        let path = self.directory.join(name);
        if path.is_file() { read_small(&path).map(Some) } else { Ok(None) }
    }

    /// Those of [`CARRIED_FILES`](super::CARRIED_FILES) that are there, with their content.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    pub fn carried_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let mut found = Vec::new();
        for name in super::CARRIED_FILES {
            if let Some(bytes) = self.read_file(name)? {
                found.push((name.to_owned(), bytes));
            }
        }
        Ok(found)
    }

    /// What the tensor files hold.
    pub fn stored(&self) -> StoredTensors {
        let files: BTreeSet<_> = self.places.values().map(|place| place.file).collect();
        let mut stored =
            StoredTensors { files: files.len(), tensors: self.places.len(), ..StoredTensors::default() };
        for place in self.places.values() {
            stored.bytes += place.range.len() as u64;
            let count = place.shape.iter().product::<usize>() as u64;
            *stored.values.entry(format!("{:?}", place.dtype)).or_default() += count;
        }
        stored
    }

    /// Every tensor of the model, readable and of the right shape, and no other.
    fn check_presence(&self) -> Result<(), CheckpointError> {
        let demanded = neutral_tensors(self.architecture, &self.config);
        let own = self.layout.tensors().iter();
        let own = own.map(|tensor| (stored_name(self.architecture, &tensor.name), tensor.shape.clone()));
        let mut known = HashSet::new();
        for (name, expected) in own.chain(demanded) {
            let place = self.place(&name)?;
            let path = self.files[place.file].clone();
            if !matches!(place.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(CheckpointError::TensorType { path, name, found: place.dtype });
            }
            if place.shape != expected {
                let found = place.shape.clone();
                return Err(CheckpointError::TensorShape { path, name, expected, found });
            }
            known.insert(name);
        }
        let is_known = |name: &&String| known.contains(*name) || is_derived(&self.config, name);
        let unexpected = self.places.keys().filter(|name| !is_known(name)).min();
        match unexpected {
            Some(name) => {
                let path = self.files[self.places[name].file].clone();
                Err(CheckpointError::UnexpectedTensor { path, name: name.clone() })
            }
            None => Ok(()),
        }
    }

    fn place(&self, name: &str) -> Result<&Place, CheckpointError> {
        self.places.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            path: match &self.files[..] {
                [only] => only.clone(),
                _ => self.directory.join(INDEX_FILE),
            },
            name: name.to_owned(),
        })
    }

    fn leave_out_neutral_parts(&mut self) -> Result<(), CheckpointError> {
        let mut config = self.config.clone();
        if config.qkv_bias && self.all_zero("_proj.bias")? {
            config.qkv_bias = false;
        }
        if config.shared_expert.is_some() && self.all_zero("shared_expert.down_proj.weight")? {
            config.shared_expert = None;
        }
        if config != self.config {
            self.layout = config.layout().expect("a model without some of its parts has a layout too");
            self.config = config;
        }
        Ok(())
    }

    fn all_zero(&self, ending: &str) -> Result<bool, CheckpointError> {
        let mut zero = true;
        for tensor in self.layout.tensors().iter().filter(|tensor| tensor.name.ends_with(ending)) {
            debug_assert!(decides(&tensor.name), "{} decides nothing", tensor.name);
            let (rows, _) = row_shape(&tensor.shape);
            // Mostly the first rows tell already.
            for first in (0..rows).step_by(ROWS_LOOKED_AT) {
                let some = first..rows.min(first + ROWS_LOOKED_AT);
                self.rows(&tensor.name, some, &mut |row| zero &= row.iter().all(|&value| value == 0.0))?;
                if !zero {
                    return Ok(false);
                }
            }
        }
        Ok(zero)
    }
}

impl TensorSource for Checkpoint {
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let place = &self.places[&stored_name(self.architecture, name)];
        let (count, width) = row_shape(&place.shape);
        assert!(rows.end <= count, "tensor {name} has {count} rows, not {rows:?}");
        let row_bytes = place.range.len() / count;
        let path = &self.files[place.file];
        let mut values = vec![0.0; width];
        // A piece at a time: pages that were read leave this process's memory with the mapping.
        let piece_rows = (MAPPED_BYTES / row_bytes).max(1);
        for first in rows.clone().step_by(piece_rows) {
            let bytes = piece_rows.min(rows.end - first) * row_bytes;
            let start = place.range.start + first * row_bytes;
            let mapped = MappedFile::open_range(path, start as u64, bytes as u64).map_err(at(path))?;
            for row in mapped.chunks_exact(row_bytes) {
                widen(place.dtype, row, &mut values);
                // What is not a number is not in range either.
                if !values.iter().all(|value| value.abs() <= PARAMETER_MAGNITUDE_MAX) {
                    return Err(CheckpointError::NotFinite { path: path.clone(), name: name.to_owned() });
                }
                sink(&values);
            }
        }
        Ok(())
    }
}

/// Values of any readable format as float32, exactly.
fn widen(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    let short = |bytes: &[u8]| [bytes[0], bytes[1]];
    match dtype {
        Dtype::F32 => values.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(value, bytes)| {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }),
        Dtype::BF16 => (values.iter_mut().zip(bytes.chunks_exact(2)))
            .for_each(|(value, bytes)| *value = bf16::from_le_bytes(short(bytes)).to_f32()),
        Dtype::F16 => (values.iter_mut().zip(bytes.chunks_exact(2)))
            .for_each(|(value, bytes)| *value = f16::from_le_bytes(short(bytes)).to_f32()),
        other => unreachable!("tensors stored as {other:?} are refused when a checkpoint is opened"),
    }
}

fn not_regular() -> std::io::Error {
    std::io::Error::other("it is not a regular file")
}

/// A file that is read whole.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let metadata = fs::metadata(path).map_err(at(path))?;
    if !metadata.is_file() {
        return Err(at(path)(not_regular()));
    }
    let bytes = metadata.len();
    if bytes > JSON_BYTES_MAX {
        let path = path.to_owned();
        return Err(CheckpointError::FileTooLarge { path, bytes, bytes_max: JSON_BYTES_MAX });
    }
    fs::read(path).map_err(at(path))
}

/// The tensor files of a directory and what is where in them.
fn find_tensors(directory: &Path) -> Result<(Vec<PathBuf>, HashMap<String, Place>), CheckpointError> {
    let single = directory.join(TENSORS_FILE);
    let index = directory.join(INDEX_FILE);
    if single.exists() || !index.exists() {
        let places = header(&single, 0)?.into_iter().collect();
        return Ok((vec![single], places));
    }
    let weight_map = read_index(&index)?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    let files: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
    let mut places = HashMap::new();
    for (number, (name, path)) in names.into_iter().zip(&files).enumerate() {
        // The index decides: a tensor that it does not place in this file is not of this checkpoint.
        let mut held = header(path, number)?;
        for (tensor, _) in weight_map.iter().filter(|(_, file)| *file == name) {
            let place = held
                .remove(tensor)
                .ok_or_else(|| CheckpointError::MissingTensor { path: path.clone(), name: tensor.clone() })?;
            places.insert(tensor.clone(), place);
        }
    }
    Ok((files, places))
}

/// Tensor to file.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&read_small(path)?)
        .map_err(|source| CheckpointError::Index { path: path.to_owned(), source })?;
    let is_plain = |file: &String| Path::new(file).file_name() == Some(file.as_ref());
    match index.weight_map.iter().find(|(_, file)| !is_plain(file)) {
        Some((name, file)) => {
            let (path, name, file) = (path.to_owned(), name.clone(), file.clone());
            Err(CheckpointError::IndexPath { path, name, file })
        }
        None => Ok(index.weight_map),
    }
}

/// The tensors that a file's header announces; the length of the file must be what the header says.
fn header(path: &Path, file: usize) -> Result<HashMap<String, Place>, CheckpointError> {
    if !fs::metadata(path).map_err(at(path))?.is_file() {
        return Err(at(path)(not_regular()));
    }
    let mapped = MappedFile::open(path).map_err(at(path))?;
    let (header_bytes, metadata) = SafeTensors::read_metadata(&mapped).map_err(|source| {
        let known = misdescribed(path, &mapped).or_else(|| wrong_length(path, &mapped));
        known.unwrap_or(CheckpointError::SafeTensors { path: path.to_owned(), source })
    })?;
    let start = 8 + header_bytes;
    let place = |info: &safetensors::tensor::TensorInfo| Place {
        file,
        dtype: info.dtype,
        shape: info.shape.clone(),
        range: start + info.data_offsets.0..start + info.data_offsets.1,
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, place(info))).collect())
}

/// What a file's header announces, as far as it can be read.
fn announced(bytes: &[u8]) -> Option<(u64, BTreeMap<String, serde_json::Value>)> {
    let header_bytes = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let start = header_bytes.checked_add(8)?;
    let header = bytes.get(8..usize::try_from(start).ok()?)?;
    let mut announced: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    announced.remove("__metadata__");
    Some((start, announced))
}

/// The first tensor that a header says something impossible of.
fn misdescribed(path: &Path, bytes: &[u8]) -> Option<CheckpointError> {
    let (_, announced) = announced(bytes)?;
    announced.into_iter().find_map(|(name, value)| {
        let what = contradiction(&value)?;
        Some(CheckpointError::Header { path: path.to_owned(), name, what })
    })
}

fn contradiction(value: &serde_json::Value) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Offsets {
        data_offsets: (u64, u64),
    }
    #[derive(serde::Deserialize)]
    struct Shape {
        shape: Vec<u64>,
    }
    let dtype = Dtype::deserialize(&value["dtype"]);
    let (Ok(dtype), Ok(Offsets { data_offsets: (begin, end) }), Ok(Shape { shape })) =
        (dtype, Offsets::deserialize(value), Shape::deserialize(value))
    else {
        return Some(value.to_string());
    };
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |bits, &size| bits.checked_mul(size));
    let fits = bits
        .is_some_and(|bits| end.checked_sub(begin).and_then(|length| length.checked_mul(8)) == Some(bits));
    (!fits).then(|| format!("{shape:?} values of {dtype:?} in bytes {begin} to {end}"))
}

/// Says so if a file has another length than the tensors of its header take, and names the first that is cut off.
fn wrong_length(path: &Path, bytes: &[u8]) -> Option<CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Announced {
        data_offsets: (u64, u64),
    }
    let (start, announced) = announced(bytes)?;
    let ends = announced.into_iter().filter_map(|(name, value)| {
        let Announced { data_offsets: (_, end) } = serde_json::from_value(value).ok()?;
        Some((start.checked_add(end)?, name))
    });
    let mut ends: Vec<(u64, String)> = ends.collect();
    ends.sort();
    let (found, expected) = (bytes.len() as u64, ends.last()?.0);
    let cut_off = ends.into_iter().find(|(end, _)| *end > found).map(|(_, name)| name);
    (expected != found).then(|| CheckpointError::WrongLength {
        path: path.to_owned(),
        expected,
        found,
        cut_off,
    })
}
