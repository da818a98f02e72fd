//! Settings that a checkpoint decides.

use std::path::{Path, PathBuf};

use super::{ModelPart, ModelSettings, RunPartial};
use crate::checkpoint::{CONFIG_FILE, CheckpointError, parse_config, read_small};
use crate::model_config::{FeedForward, ModelConfig};
use crate::upcycle::{Recipe, UpcycleError};

/// Why a run's settings and its checkpoint do not go together.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is none.
    #[error("{key} names the checkpoint {path}, but there is no folder {absolute}")]
    Missing {
        /// The setting.
        key: &'static str,
        /// As stated.
        path: PathBuf,
        /// Where that was looked for.
        absolute: PathBuf,
    },
    /// The recipe does not fit it.
    #[error("{path} cannot be upcycled: {source}")]
    Upcycle {
        /// The dense checkpoint.
        path: PathBuf,
        /// What does not fit.
        source: UpcycleError,
    },
    /// A recipe, and nothing to apply it to.
    #[error(
        "a granularity or scaling is stated, but no checkpoint to upcycle; name one as dense, or leave them out"
    )]
    NothingToUpcycle,
    /// A setting that says something else than the checkpoint.
    #[error("{key} = {stated}, but the checkpoint {path} has {decided}; leave the setting out")]
    Conflict {
        /// The setting.
        key: &'static str,
        /// As stated.
        stated: String,
        /// As in the checkpoint.
        decided: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// Sequences that the checkpoint's positions do not reach.
    #[error("context = {stated}, but the checkpoint {path} takes at most {most} tokens")]
    Context {
        /// As stated.
        stated: usize,
        /// The checkpoint's.
        most: usize,
        /// The checkpoint.
        path: PathBuf,
    },
    /// Experts are wanted of a dense checkpoint.
    #[error(
        "experts = {experts}, but the checkpoint {path} is dense; to make a mixture of it, name it with --dense, or as \
         dense in [upcycle], instead of init"
    )]
    DenseWithExperts {
        /// As stated.
        experts: usize,
        /// The checkpoint.
        path: PathBuf,
    },
    /// Two places to start from.
    #[error("init and dense are both set; a run goes on from one checkpoint, or is upcycled from one")]
    Both,
}

impl RunPartial {
    /// Fills in what the checkpoint decides that the run goes on from or is upcycled from, if it names one.
    ///
    /// # Errors
    /// An [`AdoptError`] if the checkpoint cannot be read or the settings contradict it.
    pub fn adopt(mut self) -> Result<Self, AdoptError> {
        // A run file with the rest of a recipe makes the checkpoint of `init` the one that is upcycled. A resolved run file
        // states that there is none.
        let recipe_stated = self.upcycle.granularity.is_some() || self.upcycle.scaling.is_some();
        if self.upcycle.dense.is_none() && recipe_stated {
            self.upcycle.dense = self.model.init.take();
        }
        let named = |setting: &Option<String>| setting.clone().filter(|path| !path.is_empty());
        match (named(&self.model.init), named(&self.upcycle.dense)) {
            (None, None) if recipe_stated && self.upcycle.dense.is_none() => {
                return Err(AdoptError::NothingToUpcycle);
            }
            (None, None) => {}
            (Some(_), Some(_)) => return Err(AdoptError::Both),
            (Some(init), None) => {
                let path = Path::new(&init);
                let config = read_config("init", path)?;
                self.model.adopt_choice(path, &config)?;
                self.model.adopt_shape(path, &config)?;
            }
            (None, Some(dense)) => {
                let path = Path::new(&dense);
                let config = read_config("dense", path)?;
                let recipe = self.recipe();
                let upcycled = recipe.config(&config);
                let upcycled =
                    upcycled.map_err(|source| AdoptError::Upcycle { path: path.to_owned(), source })?;
                self.model.adopt_shape(path, &upcycled)?;
            }
        }
        Ok(self)
    }

    fn recipe(&self) -> Recipe {
        let defaults = ModelPart::default().resolve(());
        let experts = self.model.experts.unwrap_or(defaults.experts);
        Recipe {
            experts,
            top_k: self.model.top_k.unwrap_or(defaults.top_k.min(experts)),
            granularity: self.upcycle.granularity.unwrap_or(1),
            router: self.model.router.unwrap_or(defaults.router),
            scaling: self.upcycle.scaling.unwrap_or_default(),
            seed: 0,
        }
    }
}

/// Of the checkpoint that the setting `key` names.
fn read_config(key: &'static str, directory: &Path) -> Result<ModelConfig, AdoptError> {
    if !directory.exists() {
        let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        return Err(AdoptError::Missing { key, path: directory.to_owned(), absolute });
    }
    let path = directory.join(CONFIG_FILE);
    Ok(parse_config(&path, &read_small(&path)?)?.1)
}

impl ModelPart {
    /// Experts and how they are chosen.
    fn adopt_choice(&mut self, path: &Path, config: &ModelConfig) -> Result<(), AdoptError> {
        let (experts, top_k) = match config.feed_forward {
            FeedForward::Dense => {
                if let Some(experts) = self.experts.filter(|&experts| experts > 1) {
                    return Err(AdoptError::DenseWithExperts { experts, path: path.to_owned() });
                }
                (1, 1)
            }
            FeedForward::Moe { experts, top_k, router } => {
                settle("router", &mut self.router, router, path)?;
                (experts, top_k)
            }
        };
        settle("experts", &mut self.experts, experts, path)?;
        settle("top_k", &mut self.top_k, top_k, path)
    }

    /// Everything else.
    fn adopt_shape(&mut self, path: &Path, config: &ModelConfig) -> Result<(), AdoptError> {
        settle("hidden_size", &mut self.hidden_size, config.hidden_size, path)?;
        settle("layers", &mut self.layers, config.layers, path)?;
        settle("heads", &mut self.heads, config.heads, path)?;
        settle("kv_heads", &mut self.kv_heads, config.kv_heads, path)?;
        settle("intermediate_size", &mut self.intermediate_size, config.intermediate_size, path)?;
        settle("rope_theta", &mut self.rope_theta, config.rope_theta, path)?;
        settle("rms_norm_eps", &mut self.rms_norm_eps, config.rms_norm_eps, path)?;
        settle("tie_word_embeddings", &mut self.tie_word_embeddings, config.tie_word_embeddings, path)?;
        let most = config.context;
        match self.context {
            Some(stated) if stated > most => Err(AdoptError::Context { stated, most, path: path.to_owned() }),
            Some(_) => Ok(()),
            None => {
                let ModelSettings { context, .. } = Self::default().resolve(());
                self.context = Some(context.min(most));
                Ok(())
            }
        }
    }
}

/// Takes over what the checkpoint decides, unless something else was stated.
fn settle<T: PartialEq + Copy + std::fmt::Debug>(
    key: &'static str,
    setting: &mut Option<T>,
    decided: T,
    path: &Path,
) -> Result<(), AdoptError> {
    match setting.replace(decided) {
        Some(stated) if stated != decided => Err(AdoptError::Conflict {
            key,
            stated: format!("{stated:?}"),
            decided: format!("{decided:?}"),
            path: path.to_owned(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RunConfig, parse};
    use super::*;
    use crate::checkpoint::save;
    use crate::init::initial_parameters;

    fn dense(folder: &Path) -> (String, ModelConfig) {
        let mut run = RunConfig::default();
        (run.model.hidden_size, run.model.layers, run.model.heads, run.model.kv_heads) = (24, 3, 3, 1);
        (run.model.experts, run.model.top_k, run.model.context) = (1, 1, 96);
        let config = ModelConfig { rope_theta: 12_345.5, rms_norm_eps: 3e-6, ..run.model_config(50) };
        let path = folder.join("dense");
        save(&path, &config, &initial_parameters(&config, 1).unwrap(), &[]).unwrap();
        (path.to_str().unwrap().to_owned(), config)
    }

    fn adopt(text: &str) -> Result<RunConfig, AdoptError> {
        parse(text).unwrap().adopt().map(|partial| partial.resolve().unwrap())
    }

    #[test]
    fn a_checkpoint_decides_the_shape_and_the_resolved_file_resolves_to_itself() {
        let folder = tempfile::tempdir().unwrap();
        let (path, config) = dense(folder.path());
        let run = adopt(&format!("[model]\ninit = '{path}'\nlayers = 3")).unwrap();
        assert_eq!(run.model_config(50), config);
        assert!(!run.upcycles());
        assert_eq!(adopt(&run.to_toml()).unwrap(), run);

        let run =
            adopt(&format!("[model]\nexperts = 6\ntop_k = 4\n[upcycle]\ndense = '{path}'\ngranularity = 2"));
        let run = run.unwrap();
        assert!(run.upcycles());
        assert_eq!(run.model_config(50), run.recipe().config(&config).unwrap());
        assert_eq!(run.model.intermediate_size, config.intermediate_size / 2);
        assert_eq!(adopt(&run.to_toml()).unwrap(), run);

        // The checkpoint by `init`, the recipe by the file.
        let named =
            adopt(&format!("[model]\nexperts = 6\ntop_k = 4\ninit = '{path}'\n[upcycle]\ngranularity = 2"));
        assert_eq!(named.unwrap(), run);
    }

    #[test]
    fn contradictions_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _) = dense(folder.path());
        let check = |text: String, parts: &[&str]| {
            let error = adopt(&text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check(format!("[model]\ninit = '{path}'\nlayers = 4"), &["layers = 4", "has 3", &path]);
        check(format!("[model]\ninit = '{path}'\nexperts = 8"), &["experts = 8", "dense", "--dense"]);
        check(format!("[model]\ninit = '{path}'\ncontext = 97"), &["context = 97", "96"]);
        check(format!("[model]\ninit = '{path}'\n[upcycle]\ndense = '{path}'"), &["init and dense"]);
        check(
            format!("[model]\ntop_k = 3\n[upcycle]\ndense = '{path}'\ngranularity = 2"),
            &["top_k (3)", &path],
        );
        check("[model]\ninit = '/no/such'".to_owned(), &["init names", "/no/such"]);
        check("[upcycle]\ndense = 'no/such'".to_owned(), &["dense names", "no/such", "no folder /"]);
        check(format!("[model]\ninit = '{}'", folder.path().display()), &["config.json"]);
    }
}
