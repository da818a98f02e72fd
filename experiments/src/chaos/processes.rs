//! The processes that are killed: this program, told to be a server or a worker.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sanderling_common::join::JoinString;

/// A process is asked to end, and given this long before it is killed.
const ENDING_MAX: Duration = Duration::from_secs(120);

/// A server that has not said after this long that it is ready never will.
const STARTING_MAX: Duration = Duration::from_secs(300);

/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A process, killed when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    started: Instant,
}

impl Process {
    /// This program, with these arguments; what it says on standard error is appended to `log`.
    pub(super) fn start(arguments: &[&str], log: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(program);
        // It ends when the pipe does: see `crate::child`.
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        // Ctrl-C on a terminal is for whoever started the others, which ends them.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().context("cannot start a process")?;
        Ok(Self { child, started: Instant::now() })
    }

    /// `kill -9`; the process is gone when this returns.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill a process")?;
        self.child.wait().map(drop).context("a process that was killed stays")
    }

    /// How it ended, if it did by itself.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().context("cannot look at a process")
    }

    /// Waits until a file is there, which tells that the process is ready; returns how long that took from its start.
    pub(super) fn ready(&mut self, file: &Path, is_stopped: &dyn Fn() -> bool) -> anyhow::Result<Duration> {
        while !file.exists() {
            if let Some(status) = self.ended()? {
                bail!("a process ended before it was ready: {status}");
            }
            if self.started.elapsed() > STARTING_MAX {
                bail!("a process was not ready after {} s", STARTING_MAX.as_secs());
            }
            if is_stopped() {
                bail!("interrupted");
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(self.started.elapsed())
    }

    /// Asks the process to end, and waits until it has.
    pub(super) fn end(&mut self) -> anyhow::Result<ExitStatus> {
        #[cfg(unix)]
        {
            let id = rustix::process::Pid::from_child(&self.child);
            let asked = rustix::process::kill_process(id, rustix::process::Signal::TERM);
            asked.context("cannot ask a process to end")?;
        }
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if begun.elapsed() > ENDING_MAX {
                bail!("a process did not end within {} s of being asked to", ENDING_MAX.as_secs());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended cannot be killed, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where everything of a soak lies.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) folder: PathBuf,
}

impl Place {
    pub(super) fn run_file(&self) -> PathBuf {
        self.folder.join("run.toml")
    }

    pub(super) fn join_file(&self) -> PathBuf {
        self.folder.join("join")
    }

    /// What workers join with where they are relayed.
    pub(super) fn worker_join_file(&self) -> PathBuf {
        self.folder.join("join-relayed")
    }

    /// What the server said when it was ready.
    pub(super) fn join(&self) -> anyhow::Result<JoinString> {
        let path = self.join_file();
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.parse()?)
    }

    pub(super) fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    pub(super) fn worker_state(&self, number: usize) -> PathBuf {
        self.folder.join(format!("worker-{number}"))
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    pub(super) fn report(&self) -> PathBuf {
        self.folder.join("chaos.json")
    }
}

/// Writes a file that holds a secret: only its owner may read it.
pub(super) fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(text.as_bytes())
}

/// The text of a path, for a command line.
pub(super) fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("the path {} is no text", path.display()))
}
