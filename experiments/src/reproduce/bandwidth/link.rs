//! A link of a given rate between two sets of processes.

use std::process::Command;

use anyhow::{Context, bail, ensure};

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
    /// Whether this process may make some: it needs `ip` and `tc`, and to run as root.
    pub(super) fn are_possible() -> bool {
        let name = format!("sanderling-{}-probe", std::process::id());
        let made = ip(&["netns", "add", &name]).is_ok();
        made && ip(&["netns", "del", &name]).is_ok() && Command::new("tc").arg("-Version").output().is_ok()
    }

    /// A cable of so many bits per second in each direction.
    ///
    /// # Errors
    /// A sentence, with what the system said.
    pub(super) fn new(bits_per_second: f64) -> anyhow::Result<Self> {
        let id = std::process::id();
        let this = Self { server: format!("sanderling-{id}-s"), workers: format!("sanderling-{id}-w") };
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
    pub(super) const SERVER: &str = "10.213.17.1";
    const WORKERS: &str = "10.213.17.2";

    /// This program on the server's side.
    pub(super) fn server(&self) -> anyhow::Result<Command> {
        inside(&self.server)
    }

    /// And on the workers'.
    pub(super) fn workers(&self) -> anyhow::Result<Command> {
        inside(&self.workers)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in [&self.server, &self.workers] {
            // One that was not made need not go.
            let _ = ip(&["netns", "del", name]);
        }
    }
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
    run(Command::new("ip").args(arguments))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => bail!("cannot run {:?}: {error}", command.get_program()),
    };
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
