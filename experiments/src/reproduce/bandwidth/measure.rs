//! Updates per second over a real link.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use sanderling_common::method::Method;

use super::super::lab::{Finished, Progress};
use super::children::{JOIN, Line};
use super::link::{Kind, Link, this_program};

/// What is measured.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Setup {
    pub(super) method: Method,
    pub(super) workers: u32,
    pub(super) bits_per_second: f64,
    pub(super) link: Kind,
    pub(super) compute_ms: u64,
    /// The measurement takes at least so long, and then until so many updates have come, but at most so long.
    pub(super) seconds_min: f64,
    pub(super) updates_min: u64,
    pub(super) seconds_max: f64,
}

/// What it came to.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Measured {
    pub(super) setup: Setup,
    pub(super) updates: u64,
    pub(super) seconds: f64,
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
}

impl Finished for Measured {
    type Key = Setup;

    fn key(&self) -> &Setup {
        &self.setup
    }
}

impl Measured {
    pub(super) fn updates_per_second(&self) -> f64 {
        self.updates as f64 / self.seconds
    }
}

/// A model of ResNet-18's size: 11.68 M parameters (ResNet-18 has 11.69 M).
const MODEL: &str =
    "[model]\nhidden_size = 256\nlayers = 6\nintermediate_size = 284\nexperts = 8\ncontext = 32\n";

/// The run file's part of a method, as published but for the encoding: 1 % up and 1 % down.
fn settings(method: Method) -> String {
    let secondary = if method.is_dense() { "" } else { "[exchange]\nkeep = 0.01\nsecondary = 0.01\n" };
    // Large enough for every entry of the model to change, so that a dense method has everything to send down, too.
    format!("[training]\nmethod = \"{method}\"\nlearning_rate = 1e-2\nlearning_rate_max = 1e-2\n{secondary}")
}

/// All workers have come by then, or something is wrong.
const ARRIVAL_MAX: Duration = Duration::from_secs(120);

/// A process that ends with this.
struct Spawned(Child);

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures one setup.
///
/// # Errors
/// A sentence.
pub(super) fn measure(setup: &Setup, progress: &Progress<'_>) -> anyhow::Result<Measured> {
    let folder = tempfile_folder()?;
    let mut link = Link::new(setup.link, setup.bits_per_second)?;
    let path = folder.0.join("run.toml");
    let file = format!(
        "{MODEL}{}steps = 1000000000\neval_every = 1000000000\n[data]\nbatch_size = 1\n[run]\nname = \"bandwidth\"\n\
         runs_dir = \"{}\"\nworkers = {}\n[server]\nlisten = \"{}:0\"\nlease_ms = 3600000\n",
        training_first(&settings(setup.method)),
        folder.0.display(),
        setup.workers,
        link.listen(),
    );
    std::fs::write(&path, file).with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = link.server()?;
    command.arg("bandwidth-server").arg("--config").arg(&path).stdout(Stdio::piped());
    let mut server = spawn(command)?;
    let lines = read_lines(&mut server)?;
    let Line::Join(join) = next(&lines, ARRIVAL_MAX)? else {
        bail!("the server did not begin with its join string")
    };
    let join = link.join(&join)?;
    let mut command = link.workers()?;
    command.arg("bandwidth-workers").env(JOIN, join);
    command.args(["--workers", &setup.workers.to_string(), "--compute-ms", &setup.compute_ms.to_string()]);
    let _workers = spawn(command)?;
    watch(setup, &lines, progress)
}

/// The section that comes last is the one that what follows belongs to.
fn training_first(settings: &str) -> String {
    match settings.split_once("[exchange]") {
        Some((training, exchange)) => format!("[exchange]{exchange}{training}"),
        None => settings.to_owned(),
    }
}

fn watch(setup: &Setup, lines: &Receiver<Line>, progress: &Progress<'_>) -> anyhow::Result<Measured> {
    let begun = Instant::now();
    let mut first: Option<(f64, u64, u64, u64)> = None;
    loop {
        ensure!(progress.at(0), "stopped; what was measured is kept");
        let Line::Progress { seconds, done, workers, bytes_up, bytes_down } = next(lines, ARRIVAL_MAX)?
        else {
            continue;
        };
        let Some((since, before, up, down)) = first else {
            // Everybody is there and has been answered about once.
            if workers == setup.workers && done >= u64::from(setup.workers) {
                first = Some((seconds, done, bytes_up, bytes_down));
            }
            let patience = ARRIVAL_MAX.as_secs_f64() + setup.seconds_max;
            ensure!(
                begun.elapsed().as_secs_f64() < patience,
                "{workers} of {} workers came, and made {done} updates",
                setup.workers
            );
            continue;
        };
        let (took, updates) = (seconds - since, done - before);
        let is_enough = took >= setup.seconds_min && updates >= setup.updates_min;
        if is_enough || took >= setup.seconds_max {
            return Ok(Measured {
                setup: setup.clone(),
                updates,
                seconds: took,
                bytes_up: bytes_up - up,
                bytes_down: bytes_down - down,
            });
        }
    }
}

fn spawn(mut command: Command) -> anyhow::Result<Spawned> {
    // Its log is of use only where something goes wrong.
    let child = command.stdin(Stdio::null()).spawn();
    Ok(Spawned(
        child.with_context(|| format!("cannot start {}", this_program().unwrap_or_default().display()))?,
    ))
}

/// What the server prints, as it comes.
fn read_lines(server: &mut Spawned) -> anyhow::Result<Receiver<Line>> {
    let output = server.0.stdout.take().context("the server's output is a pipe")?;
    let (told, lines) = channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        for line in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
            if told.send(line).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

fn next(lines: &Receiver<Line>, patience: Duration) -> anyhow::Result<Line> {
    match lines.recv_timeout(patience) {
        Ok(line) => Ok(line),
        Err(RecvTimeoutError::Timeout) => bail!("the server has said nothing for {patience:?}"),
        Err(RecvTimeoutError::Disconnected) => bail!("the server has ended"),
    }
}

/// A folder that goes away with this.
struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // Whatever is left is in the system's folder for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tempfile_folder() -> anyhow::Result<Folder> {
    let path = std::env::temp_dir().join(format!("sanderling-bandwidth-{}", std::process::id()));
    std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(Folder(path))
}
