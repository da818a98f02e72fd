//! Run files, for reproductions with settings that are the user's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::Checkpoint;
use sanderling_common::config::{BUNDLED_TEXT, RunPartial, parse};
use sanderling_common::init::parameters_hash;
use sanderling_common::join::hex;
use sanderling_common::origin::{Dense, Origin};
use sanderling_common::report::one_sentence;

use super::spec::{Contents, SMALL_MODEL_RATE, Spec, Subject, Trainer, small_model};
use super::text::EVALUATIONS_MAX;
use crate::commands::UsageError;

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
    /// Reads a run file, and of the checkpoint and the text that it names as much as makes their hashes. `workers` are in the
    /// place of those that it says, if there are any.
    ///
    /// # Errors
    /// A sentence that names the file, which is the user's to mend.
    pub(in crate::reproduce) fn read(path: &Path, workers: Option<u32>) -> Result<Self, UsageError> {
        Self::read_and_check(path, workers).map_err(|error| UsageError(one_sentence(error.as_ref())))
    }

    fn read_and_check(path: &Path, workers: Option<u32>) -> anyhow::Result<Self> {
        let in_file = || format!("the run file {}", path.display());
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", in_file()))?;
        let mut settings = parse(&text).with_context(in_file)?.adopt().with_context(in_file)?;
        settings.run.workers = workers.or(settings.run.workers);
        let run = settings.clone().resolve().with_context(in_file)?;
        ensure!(
            !run.training.overlap,
            "{}: overlap is for real workers, not for simulated ones; leave it out",
            in_file()
        );
        let training = &run.training;
        let evaluations = training.steps.checked_mul(u64::from(training.local_steps));
        ensure!(
            evaluations.is_some_and(|evaluations| evaluations <= EVALUATIONS_MAX),
            "{}: {} steps of {} gradients are too many to be simulated; at most {EVALUATIONS_MAX} gradients are",
            in_file(),
            training.steps,
            training.local_steps
        );
        let origin = Origin::open(&run).with_context(in_file)?;
        let mut contents = Contents::default();
        match &origin {
            Origin::Fresh => {}
            Origin::Checkpoint(checkpoint) => contents.init_sha256 = hash(checkpoint)?,
            Origin::Upcycled { dense, .. } => {
                let (found, stated) = (hex(&Dense::load(dense)?.sha256), &run.upcycle.dense_sha256);
                ensure!(
                    stated.is_empty() || stated.eq_ignore_ascii_case(&found),
                    "{}: the dense checkpoint {} has the hash {found}, and not dense_sha256 = {stated}",
                    in_file(),
                    run.upcycle.dense
                );
                settings.upcycle.dense_sha256 = Some(found);
            }
        }
        // A checkpoint's tokenizer makes another text of the bundled one, too.
        if run.data.text != BUNDLED_TEXT || run.starts_from_checkpoint() {
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

    /// A run with these settings of it, resolved.
    ///
    /// # Errors
    /// A [`UsageError`] that names the file, if there is one: with another number of workers or steps than its own, settings of it
    /// may not go together.
    pub(in crate::reproduce) fn spec(&self, settings: RunPartial, trainer: Trainer) -> anyhow::Result<Spec> {
        let resolved = self.named(settings.resolve().map_err(anyhow::Error::new));
        let resolved = resolved.map_err(|error| UsageError(one_sentence(error.as_ref())))?;
        Ok(Spec { contents: self.contents.clone(), ..Spec::of(Subject::Text, &resolved, trainer) })
    }

    /// What went wrong with the file, with its name.
    pub(in crate::reproduce) fn named<T>(&self, outcome: anyhow::Result<T>) -> anyhow::Result<T> {
        match self.path.as_os_str().is_empty() {
            true => outcome,
            false => outcome.with_context(|| format!("the run file {}", self.path.display())),
        }
    }

    /// For tables.
    pub(in crate::reproduce) fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn hash(checkpoint: &Checkpoint) -> anyhow::Result<String> {
    Ok(hex(&parameters_hash(checkpoint.layout(), &checkpoint.load()?)))
}
