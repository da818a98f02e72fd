//! Where a run's model comes from: seeded initialisation, a checkpoint, or a dense checkpoint that is upcycled.

use std::path::{Path, PathBuf};

#[cfg(feature = "tokenizers")]
use crate::checkpoint::TOKENIZER_FILE;
use crate::checkpoint::{Checkpoint, CheckpointError, SpecialTokens};
use crate::config::{ConfigError, RunConfig};
use crate::corpus::CorpusError;
#[cfg(feature = "tokenizers")]
use crate::corpus::{Corpus, Vocabulary};
use crate::init::{initial_parameters, parameters_hash};
use crate::join::hex;
use crate::model_config::{ModelConfig, ModelConfigError};
#[cfg(feature = "tokenizers")]
use crate::tokenizer::Tokenizer;
use crate::upcycle::{Recipe, UpcycleError, Upcycled};

/// Why a run cannot start from what it names.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The recipe does not fit the dense checkpoint.
    #[error("{path} cannot be upcycled: {source}")]
    Upcycle {
        /// The dense checkpoint.
        path: PathBuf,
        /// What does not fit.
        source: UpcycleError,
    },
    /// The model cannot be built.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
    /// The data cannot be trained on.
    #[error("cannot train on {text}: {source}")]
    Corpus {
        /// The run's text.
        text: String,
        /// What is wrong with it.
        source: CorpusError,
    },
    /// A text, and nothing that says which tokens the model knows.
    #[error(
        "{path} does not exist, so the text {text} cannot be tokenised; give a token file made for this model"
    )]
    NoTokenizer {
        /// Where it would be.
        path: PathBuf,
        /// The run's text.
        text: String,
    },
    /// A token file of another tokenizer than the checkpoint's.
    #[error(
        "{text} was made with another tokenizer than that of the checkpoint {path}: they number {token:?} differently; \
         tokenise its text with the checkpoint's tokenizer.json"
    )]
    OtherTokenizer {
        /// The token file.
        text: String,
        /// The checkpoint.
        path: PathBuf,
        /// A token that shows it.
        token: String,
    },
    /// The model does not fit the run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The text is tokenised with more tokens than the model knows.
    #[error(
        "the text has tokens up to number {tokens}, but the vocabulary of the checkpoint {path} has {vocab_size}; \
         tokenise the text with the checkpoint's own tokenizer.json"
    )]
    Vocabulary {
        /// The checkpoint.
        path: PathBuf,
        /// Tokens of the text's vocabulary.
        tokens: usize,
        /// Tokens of the model's.
        vocab_size: usize,
    },
    /// Another dense checkpoint than the one the run was described with.
    #[error("the dense checkpoint {path} has the hash {found}, but the run names dense_sha256 = {expected}")]
    OtherDense {
        /// The checkpoint.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The run's.
        expected: String,
    },
}

/// What a checkpoint hands on to those made from it: its special tokens, and files by name and content.
pub type Carried = (SpecialTokens, Vec<(String, Vec<u8>)>);

/// Where a run's model comes from.
#[derive(Debug)]
pub enum Origin {
    /// Seeded initialisation.
    Fresh,
    /// It goes on from a checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// A mixture is made of a dense checkpoint.
    Upcycled {
        /// The dense checkpoint.
        dense: Box<Checkpoint>,
        /// How.
        recipe: Recipe,
    },
}

/// A dense model, flat, and the hash that names it whatever files it comes in.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// Its architecture.
    pub config: ModelConfig,
    /// Its parameters in the order of the layout.
    pub parameters: Vec<f32>,
    /// [`parameters_hash`] of them.
    pub sha256: [u8; 32],
}

impl Dense {
    /// Reads a dense checkpoint whole.
    ///
    /// # Errors
    /// A [`CheckpointError`].
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let parameters = checkpoint.load()?;
        let sha256 = parameters_hash(checkpoint.layout(), &parameters);
        Ok(Self { config: checkpoint.config().clone(), parameters, sha256 })
    }

    /// The mixture that a recipe makes of it: its architecture and its parameters, flat.
    ///
    /// # Errors
    /// An [`UpcycleError`] if the recipe does not fit.
    ///
    /// # Panics
    /// If the parameters do not fit the architecture.
    pub fn upcycle(&self, recipe: &Recipe) -> Result<(ModelConfig, Vec<f32>), UpcycleError> {
        let layout = self.config.layout()?;
        let source = crate::checkpoint::FlatParameters { layout: &layout, values: &self.parameters };
        let upcycled = Upcycled::new(recipe, &self.config, &source)?;
        let parameters = upcycled.parameters().expect("parameters in memory can be read");
        Ok((upcycled.config().clone(), parameters))
    }
}

/// The model that a run begins with.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// Its architecture.
    pub model: ModelConfig,
    /// θ0, flat.
    pub parameters: Vec<f32>,
    /// What it was made of, if it was upcycled.
    pub dense: Option<Dense>,
}

impl Origin {
    /// Opens what the run names.
    ///
    /// # Errors
    /// An [`OriginError`] that names the directory and what is wrong with it.
    pub fn open(run: &RunConfig) -> Result<Self, OriginError> {
        if run.upcycles() {
            let dense = Box::new(Checkpoint::open(Path::new(&run.upcycle.dense))?);
            return Ok(Self::Upcycled { dense, recipe: run.recipe() });
        }
        match run.model.init.as_str() {
            "" => Ok(Self::Fresh),
            path => Ok(Self::Checkpoint(Box::new(Checkpoint::open(Path::new(path))?))),
        }
    }

    /// The checkpoint, if there is one.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Self::Fresh => None,
            Self::Checkpoint(checkpoint) | Self::Upcycled { dense: checkpoint, .. } => Some(checkpoint),
        }
    }

    /// What goes with the text side of the model into a checkpoint that is made of it.
    ///
    /// # Errors
    /// A [`CheckpointError`] if a file cannot be read.
    pub fn carried(&self) -> Result<Carried, CheckpointError> {
        match self.checkpoint() {
            None => Ok((SpecialTokens::default(), Vec::new())),
            Some(checkpoint) => Ok((checkpoint.special_tokens().clone(), checkpoint.carried_files()?)),
        }
    }

    /// The run's data. A text is tokenised with the checkpoint's tokenizer, if the run starts from one, and by characters
    /// otherwise.
    ///
    /// # Errors
    /// [`OriginError::Corpus`], or [`OriginError::NoTokenizer`].
    #[cfg(feature = "tokenizers")]
    pub fn corpus(&self, run: &RunConfig) -> Result<Corpus, OriginError> {
        let text = || run.data.text.clone();
        let failed = |source| OriginError::Corpus { text: text(), source };
        let corpus = run.corpus().map_err(failed)?;
        let Some(checkpoint) = self.checkpoint() else { return Ok(corpus) };
        if let Vocabulary::Tokens(file) = corpus.vocabulary() {
            if let (Some(json), Some(own)) = (file.tokenizer_json(), checkpoint.read_file(TOKENIZER_FILE)?) {
                let read =
                    |json: &[u8], name: &str| Tokenizer::from_json(json, name).map_err(CorpusError::from);
                let own = read(&own, TOKENIZER_FILE).map_err(failed)?;
                let theirs = read(json, "the token file's tokenizer").map_err(failed)?;
                if let Some(token) = own.differs_from(&theirs) {
                    let path = checkpoint.directory().to_owned();
                    return Err(OriginError::OtherTokenizer { text: text(), path, token });
                }
            }
            return Ok(corpus);
        }
        let path = checkpoint.directory().join(TOKENIZER_FILE);
        let Some(json) = checkpoint.read_file(TOKENIZER_FILE)? else {
            return Err(OriginError::NoTokenizer { path, text: text() });
        };
        let tokenizer = Tokenizer::from_json(&json, &path.display().to_string());
        let tokenizer = tokenizer.map_err(CorpusError::from).map_err(failed)?;
        let vocab_size = checkpoint.config().vocab_size;
        let corpus = Corpus::with_tokenizer(corpus.bytes(), &tokenizer, vocab_size).map_err(failed)?;
        run.check_corpus(&corpus).map_err(failed)?;
        Ok(corpus)
    }

    /// The model that the run begins with, for data with `tokens` distinct tokens.
    ///
    /// # Errors
    /// An [`OriginError`] if the model cannot be read or made, or does not go with the run or its data.
    pub fn begin(&self, run: &RunConfig, tokens: usize) -> Result<Beginning, OriginError> {
        let beginning = match self {
            Self::Fresh => {
                let model = run.model_config(tokens);
                let parameters = initial_parameters(&model, run.run.seed)?;
                Beginning { model, parameters, dense: None }
            }
            Self::Checkpoint(checkpoint) => {
                Beginning { model: checkpoint.config().clone(), parameters: checkpoint.load()?, dense: None }
            }
            Self::Upcycled { dense: checkpoint, recipe } => {
                let path = checkpoint.directory();
                let dense = Dense::load(checkpoint)?;
                let (found, expected) = (hex(&dense.sha256), &run.upcycle.dense_sha256);
                if !expected.is_empty() && !found.eq_ignore_ascii_case(expected) {
                    let (path, expected) = (path.to_owned(), expected.clone());
                    return Err(OriginError::OtherDense { path, found, expected });
                }
                let upcycled = dense.upcycle(recipe);
                let (model, parameters) =
                    upcycled.map_err(|source| OriginError::Upcycle { path: path.to_owned(), source })?;
                Beginning { model, parameters, dense: Some(dense) }
            }
        };
        let vocab_size = beginning.model.vocab_size;
        if tokens > vocab_size {
            let path = self.checkpoint().map(Checkpoint::directory).unwrap_or(Path::new("")).to_owned();
            return Err(OriginError::Vocabulary { path, tokens, vocab_size });
        }
        run.validate_model(&beginning.model)?;
        Ok(beginning)
    }
}
