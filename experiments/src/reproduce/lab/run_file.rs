//! Run files, for reproductions with settings that are the user's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::Checkpoint;
use sanderling_common::config::{BUNDLED_TEXT, RunPartial, parse};
use sanderling_common::init::parameters_hash;
use sanderling_common::join::hex;
use sanderling_common::origin::{Dense, Origin};

use super::spec::{Contents, SMALL_MODEL_RATE, Subject, small_model};

/// What a run file says, as `train --config` reads it, and what the files are that it names.
#[derive(Clone, Debug, Default)]
pub(in crate::reproduce) struct RunFile {
    /// The file; empty of the defaults.
    pub(in crate::reproduce) path: PathBuf,
    /// With what a checkpoint decides of the model filled in.
    pub(in crate::reproduce) settings: RunPartial,
    pub(in crate::reproduce) contents: Contents,
}

impl RunFile {
    /// Reads a run file, and of the checkpoint and the text that it names as much as makes their hashes.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub(in crate::reproduce) fn read(path: &Path) -> anyhow::Result<Self> {
        let in_file = || format!("the run file {}", path.display());
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", in_file()))?;
        let mut settings = parse(&text).with_context(in_file)?.adopt().with_context(in_file)?;
        let run = settings.clone().resolve().with_context(in_file)?;
        ensure!(!run.training.overlap, "{}: overlap is for real workers, not for simulated ones", in_file());
        let origin = Origin::open(&run).with_context(in_file)?;
        let mut contents = Contents::default();
        match &origin {
            Origin::Fresh => {}
            Origin::Checkpoint(checkpoint) => contents.init_sha256 = hash(checkpoint)?,
            Origin::Upcycled { dense, .. } => {
                // A stated one is compared with it where the model is made.
                let stated = settings.upcycle.dense_sha256.take().filter(|stated| !stated.is_empty());
                settings.upcycle.dense_sha256 = Some(match stated {
                    Some(stated) => stated,
                    None => hex(&Dense::load(dense)?.sha256),
                });
            }
        }
        if run.data.text != BUNDLED_TEXT {
            contents.text_sha256 = hex(&origin.corpus(&run).with_context(in_file)?.sha256());
        }
        Ok(Self { path: path.to_owned(), settings, contents })
    }

    /// The small model and the default method, with the rates that suit the model.
    ///
    /// # Panics
    /// If that is no run.
    pub(in crate::reproduce) fn small() -> Self {
        Self::small_with("")
    }

    /// The same with what a run file would say besides, in sections other than those of the model and the data.
    ///
    /// # Panics
    /// If no run file could say that.
    pub(in crate::reproduce) fn small_with(settings: &str) -> Self {
        let file = format!("{}{settings}", small_model(Subject::Text));
        let mut settings =
            parse(&file).expect("variations of the small model are written down in this program");
        settings.training.learning_rate.get_or_insert(SMALL_MODEL_RATE);
        Self { settings, ..Self::default() }
    }

    /// For tables.
    pub(in crate::reproduce) fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn hash(checkpoint: &Checkpoint) -> anyhow::Result<String> {
    Ok(hex(&parameters_hash(checkpoint.layout(), &checkpoint.load()?)))
}
