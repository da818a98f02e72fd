//! Updates per second over a real link.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::super::lab::{Finished, Progress};
use super::alone::Alone;
use super::children::{JOIN, Line};
use super::link::{Link, this_program};
use super::seen::{Seen, Updates};
use super::setup::{Course, Setup, UPDATES_MIN, patience};

/// How often it is looked whether the user wants to stop.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What came of a measurement.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Measured {
    pub(super) setup: Setup,
    pub(super) outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// What there is to make a rate of.
    Updates(Updates),
    /// Why there is nothing.
    Failed(String),
}

impl Finished for Measured {
    type Key = Setup;

    fn key(&self) -> &Setup {
        &self.setup
    }
}

/// Why a measurement came to nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Others may well be possible.
    Here(String),
    /// No other one will be.
    Everywhere(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Everywhere(error)
    }
}

/// A process that ends with this, and when this one does, however that ends: it holds the other end of its standard input.
struct Spawned(Child);

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is heard of the processes.
enum Event {
    Said(Line),
    /// This one has.
    Ended(&'static str),
}

/// Measures one setup, whose model has so many parameters, once nobody else measures for the folder.
///
/// # Errors
/// What keeps all measurements from being made, or that the user wanted to stop.
pub(super) fn measure(
    setup: &Setup,
    (folder, parameters): (&Path, u64),
    progress: &Progress<'_>,
) -> anyhow::Result<Measured> {
    let _alone = Alone::wait(folder, &|| progress.at(0))?;
    let outcome = match attempt(setup, Course::of(setup, parameters), progress) {
        Ok(updates) => Outcome::Updates(updates),
        Err(Trouble::Here(reason)) => Outcome::Failed(reason),
        Err(Trouble::Everywhere(error)) => return Err(error),
    };
    Ok(Measured { setup: setup.clone(), outcome })
}

/// What the processes may have said that is not listened to yet; they wait with more.
const EVENTS_MAX: usize = 1024;

fn attempt(setup: &Setup, course: Course, progress: &Progress<'_>) -> Result<Updates, Trouble> {
    let folder = tempfile::Builder::new().prefix("sanderling-bandwidth-").tempdir();
    let folder = folder.context("cannot make a temporary folder")?;
    let mut link = Link::new(setup.link, setup.bits_per_second)?;
    let path = write_run_file(setup, folder.path(), link.listen())?;
    let mut command = link.server()?;
    command.arg("bandwidth-server").arg("--config").arg(&path);
    let (told, events) = sync_channel(EVENTS_MAX);
    let _server = spawn(command, ("the server", told.clone()))?;
    let mut listener = Listener {
        events,
        progress,
        begun: Instant::now(),
        expected_s: course.total_s(setup) as u64,
        seen: Seen::new(setup.workers),
    };
    let Some(join) = listener.join(patience(0.0))? else {
        return Err(anyhow!("the server did not begin with its join string").into());
    };
    let join = link.join(&join)?;
    let mut command = link.workers()?;
    command.arg("bandwidth-workers").env(JOIN, join);
    let stagger_ms = (1e3 * course.stagger_s()).round();
    command.args(["--workers", &setup.workers.to_string(), "--compute-ms", &setup.compute_ms.to_string()]);
    command.args(["--stagger-ms", &format!("{stagger_ms:.0}")]);
    let _workers = spawn(command, ("the workers", told))?;
    listener.watch(setup, &course)
}

/// Writes what the server is to serve.
fn write_run_file(setup: &Setup, folder: &Path, listen: &str) -> anyhow::Result<std::path::PathBuf> {
    let mut run = setup.run()?;
    let runs = folder.to_str().with_context(|| format!("the path {} is no text", folder.display()))?;
    runs.clone_into(&mut run.run.runs_dir);
    run.server.listen = format!("{listen}:0");
    let path = folder.join("run.toml");
    std::fs::write(&path, run.to_toml()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Starts a process; what it prints is told as it comes, and then that it ended.
fn spawn(mut command: Command, (name, told): (&'static str, SyncSender<Event>)) -> anyhow::Result<Spawned> {
    // Its log is of use only where something goes wrong.
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // Ctrl-C on a terminal is for this process, which ends the others.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn();
    let mut child = Spawned(
        child.with_context(|| format!("cannot start {}", this_program().unwrap_or_default().display()))?,
    );
    let output = child.0.stdout.take().context("a process's output is a pipe")?;
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        let said = lines.filter_map(|line| serde_json::from_str(&line).ok()).map(Event::Said);
        for event in said.chain(std::iter::once(Event::Ended(name))) {
            if told.send(event).is_err() {
                return;
            }
        }
    });
    Ok(child)
}

/// Listens to both sides.
struct Listener<'a> {
    events: Receiver<Event>,
    progress: &'a Progress<'a>,
    begun: Instant,
    /// What the bar counts for all of it.
    expected_s: u64,
    seen: Seen,
}

impl Listener<'_> {
    /// The server's join string; `None` if it said something else.
    fn join(&mut self, patience: Duration) -> anyhow::Result<Option<String>> {
        let until = Instant::now() + patience;
        loop {
            match self.next() {
                Ok(Some(Line::Join(join))) => return Ok(Some(join)),
                Ok(Some(_)) => return Ok(None),
                Ok(None) if Instant::now() < until => {}
                Ok(None) => return Err(anyhow!("the server was not ready after {} s", patience.as_secs())),
                // A server that does not even begin will not the next time either.
                Err(Trouble::Here(reason)) => return Err(anyhow!(reason)),
                Err(Trouble::Everywhere(error)) => return Err(error),
            }
        }
    }

    /// The next line, if one comes soon.
    fn next(&mut self) -> Result<Option<Line>, Trouble> {
        if !self.progress.at(self.begun.elapsed().as_secs().min(self.expected_s)) {
            return Err(anyhow!("stopped; what was measured is kept").into());
        }
        match self.events.recv_timeout(LOOK_EVERY) {
            Ok(Event::Said(line)) => Ok(Some(line)),
            Ok(Event::Ended(name)) => Err(Trouble::Here(format!("{name} ended before the measurement"))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Trouble::Here("server and workers ended before the measurement".to_owned()))
            }
        }
    }

    /// Listens until `is_enough`; returns whether that was before the patience was over.
    fn until(&mut self, patience: Duration, is_enough: impl Fn(&Seen) -> bool) -> Result<bool, Trouble> {
        let until = Instant::now() + patience;
        while !is_enough(&self.seen) {
            if Instant::now() > until {
                return Ok(false);
            }
            if let Some(line) = self.next()? {
                self.seen.take(&line);
            }
        }
        Ok(true)
    }

    fn watch(mut self, setup: &Setup, course: &Course) -> Result<Updates, Trouble> {
        let waited = patience(course.warm_up_s());
        if !self.until(waited, Seen::is_warm)? {
            return Err(Trouble::Here(format!(
                "{} of {} workers were answered within {} s",
                self.seen.answered(),
                setup.workers,
                waited.as_secs()
            )));
        }
        let is_enough = |seen: &Seen| seen.updates() >= setup.updates && seen.seconds() >= setup.seconds_min;
        let waited = patience(course.measuring_s(setup));
        if !self.until(waited, is_enough)? && self.seen.updates() < UPDATES_MIN {
            let updates = self.seen.updates();
            return Err(Trouble::Here(format!("{updates} updates came in {} s", waited.as_secs())));
        }
        // What the server says after this was counted after this.
        let told = self.seen.told;
        let counted = self.seen.all;
        self.until(patience(0.0), |seen| seen.told >= told + 2)?;
        self.seen.check(counted).map_err(Trouble::Here)?;
        Ok(self.seen.conclude())
    }
}

#[cfg(test)]
mod tests {
    use sanderling_common::config::parse;
    use sanderling_common::method::Method;

    use super::super::super::lab::REVISION;
    use super::super::link::Kind;
    use super::super::setup::Size;
    use super::*;

    #[test]
    fn a_folder_of_any_name_makes_a_run_file() {
        let folder = tempfile::Builder::new().prefix("a \"quote\" and a \\ ").tempdir().unwrap();
        let setup = Setup {
            revision: REVISION,
            method: Method::Dgs,
            workers: 3,
            bits_per_second: 1e8,
            link: Kind::Relay,
            size: Size::Tiny,
            compute_ms: 5,
            seconds_min: 0.0,
            updates: 4,
            attempt: 0,
        };
        let path = write_run_file(&setup, folder.path(), "127.0.0.1").unwrap();
        let run = parse(&std::fs::read_to_string(path).unwrap()).unwrap().resolve().unwrap();
        assert_eq!(run.run.runs_dir, folder.path().to_str().unwrap());
        assert_eq!((run.server.listen.as_str(), run.run.workers), ("127.0.0.1:0", 3));
    }
}
