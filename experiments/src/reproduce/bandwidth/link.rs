//! A link of a given rate between two sets of processes.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use sanderling_common::join::JoinString;
use tokio::runtime::Runtime;

use crate::relay::{Conditions, Relay};

/// What limits a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// Linux, between two network namespaces: needs root, `ip` and `tc`
    Namespaces,
    /// A relay in this process, which costs processor time
    Relay,
}

impl Kind {
    /// The best that this process may make.
    pub(super) fn best() -> Self {
        if Namespaces::are_possible() { Self::Namespaces } else { Self::Relay }
    }

    /// In a report.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Namespaces => "Between two network namespaces of Linux, limited by `tc tbf`.",
            Self::Relay => {
                "Over a relay in one process, which shares the processor with server and workers and is itself a limit at high \
                 rates."
            }
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Namespaces => Self::Relay,
            Self::Relay => Self::Namespaces,
        }
    }

    /// Whether a report is of measurements over the other kind of link.
    pub(super) fn is_other_of(self, report: &str) -> bool {
        report.contains(self.other().describe())
    }
}

/// A link of so many bits per second in each direction, for all workers together.
pub(super) enum Link {
    Namespaces(Namespaces),
    Relay {
        bits_per_second: f64,
        /// Since the server listens.
        relay: Option<Relay>,
        runtime: Runtime,
    },
}

impl Link {
    /// # Errors
    /// A sentence, with what the system said.
    pub(super) fn new(kind: Kind, bits_per_second: f64) -> anyhow::Result<Self> {
        Ok(match kind {
            Kind::Namespaces => Self::Namespaces(Namespaces::new(bits_per_second)?),
            Kind::Relay => {
                let runtime = Runtime::new().context("cannot start the runtime")?;
                Self::Relay { bits_per_second, relay: None, runtime }
            }
        })
    }

    /// The address that the server listens at.
    pub(super) fn listen(&self) -> &'static str {
        match self {
            Self::Namespaces(_) => Namespaces::SERVER,
            Self::Relay { .. } => "127.0.0.1",
        }
    }

    /// This program on the server's side.
    pub(super) fn server(&self) -> anyhow::Result<Command> {
        match self {
            Self::Namespaces(namespaces) => inside(&namespaces.server),
            Self::Relay { .. } => Ok(Command::new(this_program()?)),
        }
    }

    /// And on the workers'.
    pub(super) fn workers(&self) -> anyhow::Result<Command> {
        match self {
            Self::Namespaces(namespaces) => inside(&namespaces.workers),
            Self::Relay { .. } => Ok(Command::new(this_program()?)),
        }
    }

    /// How workers join over the link a server that is joined like this.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn join(&mut self, join: &str) -> anyhow::Result<String> {
        let Self::Relay { bits_per_second, relay, runtime } = self else { return Ok(join.to_owned()) };
        let join: JoinString = join.parse()?;
        let server: SocketAddr = format!("{}:{}", join.host, join.port).parse()?;
        let rate = *bits_per_second / 8.0;
        let queue_bytes =
            BURST_BYTES as usize + (rate * Duration::from_millis(QUEUE_MS.into()).as_secs_f64()) as usize;
        let conditions =
            Conditions { shared_bytes_per_second: Some(rate), queue_bytes, ..Conditions::default() };
        let started =
            runtime.block_on(Relay::start(server, conditions, 1)).context("cannot start the relay")?;
        let join = JoinString { port: started.address().port(), ..join };
        *relay = Some(started);
        Ok(join.reveal().to_string())
    }
}

/// Bytes that a link lets pass at once: two of the largest bundles that the system makes of datagrams.
const BURST_BYTES: u32 = 128 << 10;

/// How long a datagram may wait for its turn; one that would wait longer is lost, as in a router.
const QUEUE_MS: u32 = 50;

/// Two network namespaces of Linux with a virtual cable between them, whose ends send at the rate. Both vanish with it.
#[derive(Debug)]
pub(super) struct Namespaces {
    server: String,
    workers: String,
}

impl Namespaces {
    /// Whether this process may make some, by making some: it needs to run as root, `ip` and `tc`, and a system with virtual
    /// cables and `tbf`, which containers often have not.
    pub(super) fn are_possible() -> bool {
        const PROBE_BITS_PER_SECOND: f64 = 1e9;
        Self::new(PROBE_BITS_PER_SECOND).is_ok()
    }

    /// A cable of so many bits per second in each direction.
    ///
    /// # Errors
    /// A sentence, with what the system said.
    pub(super) fn new(bits_per_second: f64) -> anyhow::Result<Self> {
        clear_stale()?;
        let id = std::process::id();
        let this = Self { server: format!("{PREFIX}{id}-s"), workers: format!("{PREFIX}{id}-w") };
        for name in [&this.server, &this.workers] {
            ip(&["netns", "add", name])?;
        }
        let (a, b) = ("sander-s", "sander-w");
        ip(&[
            "link",
            "add",
            a,
            "netns",
            &this.server,
            "type",
            "veth",
            "peer",
            "name",
            b,
            "netns",
            &this.workers,
        ])?;
        for (name, device, address) in [(&this.server, a, Self::SERVER), (&this.workers, b, Self::WORKERS)] {
            ip(&["-n", name, "address", "add", &format!("{address}/30"), "dev", device])?;
            for up in [device, "lo"] {
                ip(&["-n", name, "link", "set", up, "up"])?;
            }
            let (rate, burst) = (format!("{bits_per_second:.0}bit"), BURST_BYTES.to_string());
            let latency = format!("{QUEUE_MS}ms");
            run(Command::new("ip")
                .args(["netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "tbf"])
                .args(["rate", &rate, "burst", &burst, "latency", &latency]))?;
        }
        Ok(this)
    }

    /// Where the server listens.
    const SERVER: &str = "10.213.17.1";
    const WORKERS: &str = "10.213.17.2";
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in [&self.server, &self.workers] {
            // One that was not made need not go.
            let _ = ip(&["netns", "del", name]);
        }
    }
}

/// What the names of our namespaces begin with; the number of the process that made them follows.
const PREFIX: &str = "sanderling-";

/// Removes the namespaces of processes that were killed before they could.
fn clear_stale() -> anyhow::Result<()> {
    let processes = Path::new("/proc");
    if !processes.join("self").exists() {
        // Nobody can be told to be dead.
        return Ok(());
    }
    let list = run(Command::new("ip").args(["netns", "list"]))?;
    let is_alive = |id: u32| id != std::process::id() && processes.join(id.to_string()).exists();
    for name in stale(&list, is_alive) {
        // Somebody else may clear it at the same moment.
        let _ = ip(&["netns", "del", name]);
    }
    Ok(())
}

/// Those of our namespaces in the system's list whose process is not alive.
fn stale(list: &str, is_alive: impl Fn(u32) -> bool) -> Vec<&str> {
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    let is_stale = |name: &&str| {
        let made_by = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-'));
        made_by.and_then(|(id, _)| id.parse().ok()).is_some_and(|id| !is_alive(id))
    };
    names.filter(is_stale).collect()
}

/// This program.
pub(super) fn this_program() -> anyhow::Result<std::path::PathBuf> {
    std::env::current_exe().context("cannot tell where this program is")
}

fn inside(name: &str) -> anyhow::Result<Command> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]).arg(this_program()?);
    Ok(command)
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    run(Command::new("ip").args(arguments)).map(drop)
}

/// Runs it to its end; returns what it printed.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => bail!("cannot run {:?}: {error}", command.get_program()),
    };
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_the_other_link_is_known() {
        let report = format!("## Measured\n\n{} A model", Kind::Relay.describe());
        assert!(Kind::Namespaces.is_other_of(&report) && !Kind::Relay.is_other_of(&report));
        assert!(!Kind::Namespaces.is_other_of("# Title"));
    }

    #[test]
    fn only_namespaces_of_dead_processes_are_stale() {
        let list = "sanderling-17-w (id: 1)\nsanderling-17-s (id: 0)\nsanderling-18-s\nvpn\nsanderling-x-s\n";
        assert_eq!(stale(list, |id| id == 18), ["sanderling-17-w", "sanderling-17-s"]);
        assert!(stale(list, |_| true).is_empty());
        assert!(stale("", |_| false).is_empty());
    }
}
