//! Run settings on the command line: `--config FILE` and an option per key.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{AdoptError, ConfigError, RunConfig, RunPartial, STATE_RUN_FILE, parse};
use crate::method::Method;

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
    /// The run of a state folder is missing from its file.
    #[error("{0} is empty, so that the run of its folder cannot go on; was the disk full?")]
    EmptyState(PathBuf),
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
    /// Reads the run file, if one is named, and resolves the run. What the file says for its own method is left out, and
    /// that is said on standard error, where the options name another; so is a warm-up that is longer than the run.
    ///
    /// # Errors
    /// A [`RunOptionsError`]; every one of them is the user's to mend.
    pub fn resolve(self) -> Result<RunConfig, RunOptionsError> {
        let mut file = self.config.as_deref().map(read).transpose()?.unwrap_or_default();
        if let Some(notice) = leave_out_other_method(&self.settings, &mut file) {
            tell(&notice);
        }
        let run = Self::resolve_stated(self.settings.or(file))?;
        if let Some(notice) = too_short_for_its_warmup(&run) {
            tell(&notice);
        }
        Ok(run)
    }

    fn resolve_stated(stated: RunPartial) -> Result<RunConfig, RunOptionsError> {
        // A state folder with a run in it says whatever else that run is.
        let state = stated.server.state_dir.as_deref().filter(|path| !path.is_empty());
        let there = state.map(|folder| Path::new(folder).join(STATE_RUN_FILE)).filter(|path| path.is_file());
        match there {
            None => Ok(stated.adopt()?.resolve()?),
            // An empty file would be a run of defaults only.
            Some(path) if read_text(&path)?.trim().is_empty() => Err(RunOptionsError::EmptyState(path)),
            // It was adopted and resolved when it began.
            Some(path) => Ok(stated.or(read(&path)?).resolve()?),
        }
    }
}

/// Nobody is left to tell when standard error is closed.
fn tell(notice: &str) {
    let _ = writeln!(std::io::stderr(), "{notice}");
}

fn too_short_for_its_warmup(run: &RunConfig) -> Option<String> {
    let (steps, warmup_steps) = (run.training.steps, run.training.warmup_steps);
    (steps < warmup_steps).then(|| {
        format!(
            "the learning rate stays below its peak, since the run of {steps} steps is over before the warm-up of \
             {warmup_steps}; --warmup-steps makes that shorter"
        )
    })
}

/// Takes out of `file` what was stated for another method than the one the options name; says so.
fn leave_out_other_method(options: &RunPartial, file: &mut RunPartial) -> Option<String> {
    let (wanted, stated) = (options.training.method?, file.training.method?);
    if wanted == stated {
        return None;
    }
    let taken = file.take_method_settings();
    let keys = taken.join(", ");
    (!taken.is_empty()).then(|| {
        format!("the run file is for method {stated}; for {wanted} its {keys} are left at the defaults")
    })
}

fn read_text(path: &Path) -> Result<String, RunOptionsError> {
    std::fs::read_to_string(path)
        .map_err(|source| RunOptionsError::Unreadable { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<RunPartial, RunOptionsError> {
    let text = read_text(path)?;
    parse(&text).map_err(|source| RunOptionsError::File { path: path.to_owned(), source })
}

/// Adds each setting's default to its help text, read off the default runs of all methods so that it cannot go stale, and
/// lets a setting that is true or false be turned on by its bare name.
#[must_use]
pub fn with_defaults(command: clap::Command) -> clap::Command {
    let (default, runs) = (Method::default(), Method::ALL.map(|method| (method, default_values(method))));
    let (_, values) = runs.iter().find(|(method, _)| *method == default).expect("it is one of them");
    values.iter().fold(command, |command, (key, value)| {
        if !command.get_arguments().any(|arg| arg.get_id() == key.as_str()) {
            return command;
        }
        let of_methods = runs.iter().map(|(method, values)| (*method, &values[key]));
        let stated = if key == "method" { shown(value) } else { shown_by_method(of_methods) };
        command.mut_arg(key, |arg| {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let arg = if value.is_bool() { arg.num_args(0..=1).default_missing_value("true") } else { arg };
            // Of a setting that is empty by default the help says what that means.
            if stated.is_empty() { arg } else { arg.help(format!("{help} [default: {stated}]")) }
        })
    })
}

/// Every setting of the run that has only its method stated.
fn default_values(method: Method) -> toml::Table {
    let mut stated = RunPartial::default();
    stated.training.method = Some(method);
    let sections: toml::Table =
        toml::from_str(&stated.fill_in().to_toml()).expect("the default runs are valid TOML");
    let tables = sections.into_iter().filter_map(|(_, section)| match section {
        toml::Value::Table(keys) => Some(keys),
        _ => None,
    });
    tables.flatten().collect()
}

fn shown(value: &toml::Value) -> String {
    value.to_string().trim_matches('"').to_owned()
}

/// The value, where all methods have the same; else each value with its methods.
fn shown_by_method<'a>(of_methods: impl Iterator<Item = (Method, &'a toml::Value)>) -> String {
    let mut groups: Vec<(&toml::Value, Vec<&str>)> = Vec::new();
    for (method, value) in of_methods {
        match groups.iter_mut().find(|(known, _)| *known == value) {
            Some((_, methods)) => methods.push(method.name()),
            None => groups.push((value, vec![method.name()])),
        }
    }
    match &groups[..] {
        [(value, _)] => shown(value),
        _ => {
            let of_group = |(value, methods): &(&toml::Value, Vec<&str>)| {
                format!("{} for {}", shown(value), methods.join(", "))
            };
            groups.iter().map(of_group).collect::<Vec<_>>().join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_for_another_method_is_left_out() {
        let file = |method: Method| {
            let mut run = RunPartial::default();
            run.training.method = Some(method);
            parse(&run.resolve().unwrap().to_toml()).unwrap()
        };
        let mut options = RunPartial::default();
        options.training.method = Some(Method::Dgs);
        options.training.momentum = Some(0.5);

        let mut other = file(Method::DgsAdam);
        let notice = leave_out_other_method(&options, &mut other).unwrap();
        assert!(
            ["dgs-adam", "for dgs", "learning_rate", "dense_below"].iter().all(|word| notice.contains(word))
        );
        let mut run = options.clone().or(other).resolve().unwrap();
        assert_eq!(run.training.momentum, 0.5, "the options are as stated");
        let mut fresh = options.clone();
        fresh.run.name = Some(std::mem::take(&mut run.run.name));
        run.run.name = fresh.run.name.clone().unwrap();
        assert_eq!(run, fresh.resolve().unwrap());

        let mut same = file(Method::Dgs);
        assert_eq!(leave_out_other_method(&options, &mut same), None);
        assert_eq!(same, file(Method::Dgs));
        options.training.method = None;
        let mut kept = file(Method::DgsAdam);
        assert_eq!(leave_out_other_method(&options, &mut kept), None);
        assert_eq!(kept, file(Method::DgsAdam));
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_said() {
        let mut run = RunConfig::default();
        assert_eq!(too_short_for_its_warmup(&run), None);
        run.training.warmup_steps = run.training.steps;
        assert_eq!(too_short_for_its_warmup(&run), None);
        (run.training.steps, run.training.warmup_steps) = (7, 8);
        let notice = too_short_for_its_warmup(&run).unwrap();
        assert!(
            ["7 steps", "warm-up of 8", "--warmup-steps"].iter().all(|part| notice.contains(part)),
            "{notice}"
        );
    }

    #[test]
    fn the_settings_of_a_method_are_those_whose_defaults_differ() {
        let runs = Method::ALL.map(default_values);
        let differs = |key: &&String| runs.iter().any(|run| run[*key] != runs[0][*key]);
        let mut differing: Vec<&str> = runs[0].keys().filter(differs).map(String::as_str).collect();
        differing.retain(|key| *key != "method");
        let mut partial = parse(&RunConfig::default().to_toml()).unwrap();
        let mut taken = partial.take_method_settings();
        differing.sort_unstable();
        taken.sort_unstable();
        assert_eq!(taken, differing);
        assert_eq!(partial.take_method_settings(), [""; 0]);
    }

    #[test]
    fn help_names_the_defaults_of_every_method() {
        #[derive(clap::Parser)]
        struct Program {
            #[command(flatten)]
            _run: RunOptions,
        }
        let command = with_defaults(<Program as clap::CommandFactory>::command());
        let help = |key: &str| {
            let arg = command.get_arguments().find(|arg| arg.get_id() == key).unwrap();
            arg.get_help().unwrap().to_string()
        };
        assert!(help("momentum").contains("0.7 for dgc-async, dgs; 0.9 for msgd"), "{}", help("momentum"));
        assert!(help("method").ends_with("[default: dgs-adam]"), "{}", help("method"));
        assert!(help("steps").ends_with("[default: 4500]"), "{}", help("steps"));
        for key in ["name", "init", "dense", "dense_sha256", "advertise"] {
            assert!(!help(key).contains("[default"), "{}", help(key));
        }
    }
}
