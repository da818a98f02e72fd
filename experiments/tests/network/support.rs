//! A small run, its server and its workers.

use std::path::PathBuf;
use std::time::Duration;

use sanderling::relay::{Conditions, Relay};
use sanderling_common::config::{RunConfig, RunPartial, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::join::JoinString;
use sanderling_server::net::{Outcome, Server};
use sanderling_worker::net::{WorkerError, WorkerOptions, WorkerReport, work};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// No test takes anywhere near as long; one that hangs fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A run of a small model on a text that workers do not have, in a folder that goes away with the test.
pub(crate) struct Scene {
    folder: TempDir,
    run: RunPartial,
}

impl Scene {
    pub(crate) fn new(steps: u64) -> Self {
        Self::shapeless(steps).with(
            "[model]\nhidden_size = 32\nlayers = 1\nheads = 2\nkv_heads = 1\nintermediate_size = 32\nexperts = 4",
        )
    }

    /// The same without the model's shape, which a checkpoint is to decide.
    pub(crate) fn shapeless(steps: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text.txt");
        std::fs::write(&text, &Corpus::bundled().bytes()[..30_000]).unwrap();
        let file = format!(
            "[run]\nname = 'run'\nruns_dir = '{}'\nworkers = 3\n[data]\ntext = '{}'\nbatch_size = 2\n\
             [model]\ncontext = 32\n[training]\nsteps = {steps}\neval_every = {steps}\nwarmup_steps = 5\n\
             [exchange]\nreplica_check_every = 5\n[server]\nlease_ms = 2000\n",
            folder.path().join("runs").display(),
            text.display()
        );
        Self { run: parse(&file).unwrap(), folder }
    }

    /// With further settings.
    pub(crate) fn with(mut self, settings: &str) -> Self {
        self.run = parse(settings).unwrap().or(self.run);
        self
    }

    /// On another text or token file.
    pub(crate) fn with_text(self, name: &str, bytes: &[u8]) -> Self {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        self.with(&format!("[data]\ntext = '{}'", path.display()))
    }

    pub(crate) fn server(&self) -> Server {
        Server::start(self.resolved(), None).unwrap()
    }

    pub(crate) fn resolved(&self) -> RunConfig {
        self.run.clone().adopt().unwrap().resolve().unwrap()
    }

    pub(crate) fn results(&self) -> PathBuf {
        self.folder.path().join("runs/run")
    }

    /// A place of its own in the test's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A server that serves until its run is over or `stop` is told.
pub(crate) struct Serving {
    pub(crate) join: JoinString,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) progress: watch::Receiver<u64>,
    task: JoinHandle<Outcome>,
}

impl Serving {
    pub(crate) fn start(scene: &Scene) -> Self {
        Self::of(scene.server())
    }

    pub(crate) fn of(server: Server) -> Self {
        let join = server.join().clone();
        let (stop, stopped) = watch::channel(false);
        let (done, progress) = watch::channel(0);
        let task = tokio::spawn(async move {
            let serving = server.serve(stopped, |progress| {
                done.send_replace(progress.done);
            });
            tokio::time::timeout(PATIENCE, serving).await.expect("the run ends").expect("the run is served")
        });
        Self { join, stop, progress, task }
    }

    /// Waits until that many batches are done.
    pub(crate) async fn reach(&mut self, done: u64) {
        let reached = self.progress.wait_for(|&now| now >= done);
        tokio::time::timeout(PATIENCE, reached).await.expect("the run goes on").expect("the server lives");
    }

    /// Ends the server without a conclusion.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    pub(crate) async fn outcome(self) -> Outcome {
        self.task.await.unwrap()
    }
}

/// A bad network in front of a server, and how workers join over it.
pub(crate) async fn relayed(join: &JoinString, conditions: Conditions) -> (Relay, JoinString) {
    let server = format!("{}:{}", join.host, join.port).parse().unwrap();
    let relay = Relay::start(server, conditions, 1).await.unwrap();
    let join = JoinString { port: relay.address().port(), ..join.clone() };
    (relay, join)
}

pub(crate) fn options() -> WorkerOptions {
    WorkerOptions { give_up_after: Duration::from_secs(20), ..WorkerOptions::default() }
}

/// A worker in this runtime.
pub(crate) fn worker(join: &JoinString) -> JoinHandle<Result<WorkerReport, WorkerError>> {
    worker_with(join, options())
}

/// A worker with options of its own.
pub(crate) fn worker_with(
    join: &JoinString,
    options: WorkerOptions,
) -> JoinHandle<Result<WorkerReport, WorkerError>> {
    let join = join.clone();
    tokio::spawn(async move {
        let (_stop, stopped) = watch::channel(false);
        work(&join, &options, stopped).await
    })
}
