//! Making and filling a run's folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use sanderling_common::checkpoint::{self, CheckpointError, FlatParameters, TOKENIZER_FILE, WriteOptions};
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::origin::Origin;

use super::{Evaluation, Summary};

/// Folders tried before giving up: `name`, `name-2`, … `name-999`.
const NAMES_TRIED_MAX: u32 = 999;

/// Why results cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// The system refused.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Every name is taken.
    #[error("{0} and its numbered successors all exist; choose another --name")]
    NamesTaken(PathBuf),
    /// The checkpoint cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// The folder of one run, made for it alone.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
}

impl RunFolder {
    /// Makes `runs_dir/name`, or `name-2`, `name-3`, … where that exists: results are never overwritten. Writes the
    /// resolved configuration, under the name that was taken.
    ///
    /// # Errors
    /// A [`ResultsError`] that names the path.
    pub fn create(run: &mut RunConfig) -> Result<Self, ResultsError> {
        let path = Self::make(run)?;
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            name.clone_into(&mut run.run.name);
        }
        // Another run that is made of the file has a state folder of its own, or none.
        let mut resolved = run.without_state();
        resolved.make_paths_absolute();
        write(&path.join("run.toml"), resolved.to_toml().as_bytes())?;
        let metrics = path.join("metrics.jsonl");
        let opened = OpenOptions::new().create(true).append(true).open(&metrics);
        let metrics = opened.map_err(|source| ResultsError::Write { path: metrics, source })?;
        Ok(Self { path, metrics })
    }

    /// The folder of a run that goes on: its curve is written anew.
    ///
    /// # Errors
    /// A [`ResultsError`] that names the path.
    pub fn reopen(path: &Path, run: &mut RunConfig) -> Result<Self, ResultsError> {
        fs::create_dir_all(path).map_err(|source| ResultsError::Write { path: path.to_owned(), source })?;
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            name.clone_into(&mut run.run.name);
        }
        let metrics = path.join("metrics.jsonl");
        let opened = File::create(&metrics);
        let metrics = opened.map_err(|source| ResultsError::Write { path: metrics, source })?;
        Ok(Self { path: path.to_owned(), metrics })
    }

    fn make(run: &RunConfig) -> Result<PathBuf, ResultsError> {
        let parent = Path::new(&run.run.runs_dir);
        fs::create_dir_all(parent)
            .map_err(|source| ResultsError::Write { path: parent.to_owned(), source })?;
        let wanted = parent.join(&run.run.name);
        for number in 1..=NAMES_TRIED_MAX {
            let path = match number {
                1 => wanted.clone(),
                _ => parent.join(format!("{}-{number}", run.run.name)),
            };
            match fs::create_dir(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(ResultsError::Write { path, source }),
            }
        }
        Err(ResultsError::NamesTaken(wanted))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checkpoint in it.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint")
    }

    /// Appends a line to `metrics.jsonl`.
    ///
    /// # Errors
    /// [`ResultsError::Write`].
    pub fn append(&self, evaluation: &Evaluation) -> Result<(), ResultsError> {
        let mut line = serde_json::to_string(evaluation).expect("an evaluation has a JSON form");
        line.push('\n');
        let written = (&self.metrics).write_all(line.as_bytes());
        written.map_err(|source| ResultsError::Write { path: self.path.join("metrics.jsonl"), source })
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// [`ResultsError::Write`].
    pub fn write_summary(&self, summary: &Summary) -> Result<(), ResultsError> {
        let mut json = serde_json::to_vec_pretty(summary).expect("a summary has a JSON form");
        json.push(b'\n');
        write(&self.path.join("summary.json"), &json)
    }

    /// The summary that is there, if it can be read.
    pub fn summary(&self) -> Option<Summary> {
        let json = fs::read(self.path.join("summary.json")).ok()?;
        serde_json::from_slice(&json).ok()
    }

    /// Writes the model, its configuration and its tokenizer to `checkpoint/`: the tokenizer of the checkpoint that the
    /// run began with, or that of its text.
    ///
    /// # Errors
    /// A [`ResultsError`].
    pub fn write_checkpoint(
        &self,
        model: &ModelConfig,
        parameters: &[f32],
        (corpus, origin): (&Corpus, &Origin),
    ) -> Result<(), ResultsError> {
        let path = self.checkpoint();
        let (special_tokens, mut files) = origin.carried()?;
        if !files.iter().any(|(name, _)| name == TOKENIZER_FILE) {
            files.extend(tokenizer_files(model, corpus));
        }
        let layout = model.layout().expect("the model was trained");
        let source = FlatParameters { layout: &layout, values: parameters };
        let options = WriteOptions { special_tokens, files, ..WriteOptions::default() };
        checkpoint::write(&path, model, &options, &source, &mut |_| ControlFlow::Continue(()))?;
        Ok(())
    }
}

/// The tokenizer of the corpus, for a model that had none.
fn tokenizer_files(model: &ModelConfig, corpus: &Corpus) -> Vec<(String, Vec<u8>)> {
    // Of a token file without a tokenizer its maker knows what the tokens stand for.
    let Some(tokenizer) = corpus.vocabulary().tokenizer_json() else { return Vec::new() };
    // Without it, AutoTokenizer of transformers 4 takes every Llama-like model to have Llama's special tokens.
    let tokenizer_config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.context,
        "clean_up_tokenization_spaces": false,
    });
    let tokenizer_config = serde_json::to_vec_pretty(&tokenizer_config).expect("JSON values can be written");
    vec![
        (TOKENIZER_FILE.to_owned(), tokenizer.into_owned()),
        ("tokenizer_config.json".to_owned(), tokenizer_config),
    ]
}

/// Writes to a temporary name and renames, so that a reader never sees half a file.
fn write(path: &Path, bytes: &[u8]) -> Result<(), ResultsError> {
    let temporary = path.with_extension("partial");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.map_err(|source| ResultsError::Write { path: path.to_owned(), source })
}
