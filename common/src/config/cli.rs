//! Run settings on the command line: `--config FILE` and an option per key.

use std::path::{Path, PathBuf};

use super::{AdoptError, ConfigError, RunConfig, RunPartial, parse};

/// The options that describe a run, for flattening into a program's own.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RunOptions {
    /// A run file (TOML); options given here override it
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// An option per key of the run file.
    #[command(flatten)]
    pub settings: RunPartial,
}

/// Why the options do not describe a run.
#[derive(Debug, thiserror::Error)]
pub enum RunOptionsError {
    /// The run file cannot be read.
    #[error("cannot read the run file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The run file says something wrong.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// File and options together make no run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// They do not go with the checkpoint that they name.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
}

impl RunOptionsError {
    /// 2 where the command line or the run file is to be mended, 1 where a checkpoint is.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Adopt(AdoptError::Checkpoint(_))) { 1 } else { 2 }
    }
}

impl RunOptions {
    /// Reads the run file, if one is named, and resolves the run.
    ///
    /// # Errors
    /// A [`RunOptionsError`]; every one of them is the user's to mend.
    pub fn resolve(self) -> Result<RunConfig, RunOptionsError> {
        let file = self.config.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(self.settings.or(file).adopt()?.resolve()?)
    }
}

fn read(path: &Path) -> Result<RunPartial, RunOptionsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| RunOptionsError::Unreadable { path: path.to_owned(), source })?;
    parse(&text).map_err(|source| RunOptionsError::File { path: path.to_owned(), source })
}

/// Adds each setting's default to its help text, read off the default run so that it cannot go stale, and lets a
/// setting that is true or false be turned on by its bare name.
#[must_use]
pub fn with_defaults(command: clap::Command) -> clap::Command {
    let defaults: toml::Table =
        toml::from_str(&RunConfig::default().to_toml()).expect("the default run is valid TOML");
    let values = defaults.into_iter().filter_map(|(_, section)| match section {
        toml::Value::Table(keys) => Some(keys),
        _ => None,
    });
    values.flatten().fold(command, |command, (key, value)| {
        if !command.get_arguments().any(|arg| arg.get_id() == key.as_str()) {
            return command;
        }
        command.mut_arg(&key, |arg| {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let arg = if value.is_bool() { arg.num_args(0..=1).default_missing_value("true") } else { arg };
            arg.help(format!("{help} [default: {}]", value.to_string().trim_matches('"')))
        })
    })
}
