//! The two sides of a measurement: a server, and workers that stand in for machines of their own.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use sanderling_common::config;
use sanderling_common::join::JoinString;
use sanderling_server::net::Server;
use sanderling_transport::stop_on_interrupt;
use sanderling_worker::net::{StandIn, WorkerOptions, work};

use super::synthetic::Synthetic;

/// A server of `sanderling reproduce bandwidth`.
#[derive(Debug, clap::Args)]
pub struct ServerArguments {
    /// The run file
    #[arg(long)]
    config: PathBuf,
}

/// Workers of `sanderling reproduce bandwidth`.
#[derive(Debug, clap::Args)]
pub struct WorkersArguments {
    /// How many
    #[arg(long)]
    workers: usize,
    /// What a step takes
    #[arg(long)]
    compute_ms: u64,
}

/// The variable in which workers are given the join string: a command line is everybody's to read.
pub(super) const JOIN: &str = "SANDERLING_JOIN";

/// A line of the server's output.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// Before all others.
    Join(String),
    /// Where it stands.
    Progress {
        /// Since it listens.
        seconds: f64,
        /// Pushes applied.
        done: u64,
        /// Workers connected.
        workers: u32,
        /// UDP payload bytes.
        bytes_up: u64,
        bytes_down: u64,
    },
}

fn tell(line: &Line) {
    let text = serde_json::to_string(line).expect("a line has a JSON form");
    // Nobody is left to tell when it is closed.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Serves until it is told to end, and says where it stands.
///
/// # Errors
/// As a server's.
pub fn serve(arguments: &ServerArguments) -> anyhow::Result<()> {
    let path = &arguments.config;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let run = config::parse(&text)?.resolve()?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        let server = Server::start(run, None)?;
        tell(&Line::Join(server.join().reveal().to_string()));
        let begun = Instant::now();
        let told = |progress: &sanderling_server::progress::Progress| {
            tell(&Line::Progress {
                seconds: begun.elapsed().as_secs_f64(),
                done: progress.done,
                workers: progress.workers,
                bytes_up: progress.traffic.bytes_up,
                bytes_down: progress.traffic.bytes_down,
            });
        };
        server.serve(stop, told).await?;
        Ok(())
    })
}

/// Works until it is told to end.
///
/// # Errors
/// As a worker's.
pub fn join(arguments: &WorkersArguments) -> anyhow::Result<()> {
    let join = std::env::var(JOIN).with_context(|| format!("{JOIN} is not set"))?;
    let join: JoinString = join.trim().parse()?;
    let duration = Duration::from_millis(arguments.compute_ms);
    let stand_in = StandIn(Arc::new(move |engine| Box::new(Synthetic::new(engine, duration))));
    let options = WorkerOptions { stand_in: Some(stand_in), ..WorkerOptions::default() };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        let workers: Vec<_> = (0..arguments.workers)
            .map(|_| {
                let (join, options, stop) = (join.clone(), options.clone(), stop.clone());
                tokio::spawn(async move { work(&join, &options, stop).await })
            })
            .collect();
        for worker in workers {
            worker.await.context("a worker panicked")??;
        }
        Ok(())
    })
}
