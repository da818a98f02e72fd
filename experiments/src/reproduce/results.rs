//! Finished runs, a JSON line each: what is there already is not run again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::arms::Budget;
use super::trainer::Point;

/// Names a run within an experiment.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct RunKey {
    pub(super) arm: String,
    pub(super) budget: Budget,
    pub(super) seed: u64,
    pub(super) rate: f64,
    /// The whole of the settings that are the same for all arms, so that results of other settings are not taken for
    /// these.
    pub(super) settings: String,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct RunResult {
    #[serde(flatten)]
    pub(super) key: RunKey,
    pub(super) steps: u64,
    pub(super) tokens: u64,
    /// Forward and backward, products and causal attention.
    pub(super) flops: f64,
    pub(super) parameters: u64,
    pub(super) active_parameters: u64,
    pub(super) start_val_loss: f64,
    pub(super) best_val_loss: f64,
    pub(super) best_step: u64,
    pub(super) test_loss: f64,
    pub(super) seconds: f64,
    pub(super) curve: Vec<Point>,
}

/// The file of finished runs.
pub(super) struct Results {
    path: PathBuf,
    file: File,
    done: Vec<RunResult>,
}

impl Results {
    /// Reads what is there. A last line that was cut off by a crash is left out and overwritten in effect by the run
    /// being made again.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("results.jsonl");
        let unusable = || format!("cannot use {}", path.display());
        let text =
            if path.exists() { fs::read_to_string(&path).with_context(unusable)? } else { String::new() };
        let done = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let mut file = OpenOptions::new().create(true).append(true).open(&path).with_context(unusable)?;
        if !text.is_empty() && !text.ends_with('\n') {
            file.write_all(b"\n").with_context(unusable)?;
        }
        Ok(Self { file, done, path })
    }

    pub(super) fn find(&self, key: &RunKey) -> Option<&RunResult> {
        self.done.iter().find(|result| result.key == *key)
    }

    pub(super) fn add(&mut self, result: RunResult) -> anyhow::Result<()> {
        let mut line = serde_json::to_string(&result).context("a result has a JSON form")?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write {}", self.path.display()))?;
        self.done.push(result);
        Ok(())
    }

    /// The results with these keys, by arm and budget.
    pub(super) fn grouped<'a>(
        &'a self,
        keys: &[RunKey],
    ) -> BTreeMap<(String, &'static str), Vec<&'a RunResult>> {
        let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for result in keys.iter().filter_map(|key| self.find(key)) {
            let group = (result.key.arm.clone(), result.key.budget.name());
            groups.entry(group).or_default().push(result);
        }
        groups
    }
}

/// Mean and sample standard deviation; the latter zero for a single value.
pub(super) fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 })
}
