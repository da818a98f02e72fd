//! The two sides of a measurement: a server, and workers that stand in for machines of their own.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use sanderling_common::config;
use sanderling_common::join::JoinString;
use sanderling_server::net::Server;
use sanderling_transport::stop_on_interrupt;
use sanderling_worker::net::{StandIn, WorkerOptions, work};
use tokio::task::JoinSet;

use super::synthetic::{Crowd, Synthetic};
use crate::child::end_with_the_parent;

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
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// What a step takes
    #[arg(long)]
    compute_ms: u64,
    /// Between the beginnings of two workers
    #[arg(long)]
    stagger_ms: u64,
}

/// The variable in which workers are given the join string: a command line is everybody's to read.
pub(super) const JOIN: &str = "SANDERLING_JOIN";

/// What the two sides print, a JSON line each.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// The server, before all others.
    Join(String),
    /// The server, several times a second: where it stands.
    Progress {
        /// Pushes applied.
        done: u64,
        /// UDP payload bytes.
        bytes_up: u64,
        bytes_down: u64,
    },
    /// The workers: one of them was answered.
    Update {
        /// Since the workers' process began.
        seconds: f64,
        /// Whose.
        worker: u32,
    },
}

pub(super) fn tell(line: &Line) {
    let text = serde_json::to_string(line).expect("a line has a JSON form");
    // Nobody is left to tell when it is closed.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Serves until it is told to end, and says where it stands.
///
/// # Errors
/// As a server's.
pub fn serve(arguments: &ServerArguments) -> anyhow::Result<()> {
    end_with_the_parent();
    let path = &arguments.config;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let run = config::parse(&text)?.resolve()?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        let server = Server::start(run, None)?;
        tell(&Line::Join(server.join().reveal().to_string()));
        let told = |progress: &sanderling_server::progress::Progress| {
            tell(&Line::Progress {
                done: progress.done,
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
    end_with_the_parent();
    let join = std::env::var(JOIN).with_context(|| format!("{JOIN} is not set"))?;
    let join: JoinString = join.trim().parse()?;
    let duration = Duration::from_millis(arguments.compute_ms);
    let crowd = Crowd::new(arguments.workers, duration, Duration::from_millis(arguments.stagger_ms));
    let crowd = Arc::new(crowd);
    let stand_in = StandIn(Arc::new(move |engine| Box::new(Synthetic::new(engine, crowd.clone()))));
    let options = WorkerOptions { stand_in: Some(stand_in), ..WorkerOptions::default() };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    let worked = runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        let mut workers = JoinSet::new();
        for _ in 0..arguments.workers {
            let (join, options, stop) = (join.clone(), options.clone(), stop.clone());
            workers.spawn(async move { work(&join, &options, stop).await });
        }
        while let Some(ended) = workers.join_next().await {
            ended.context("a worker panicked")??;
        }
        anyhow::Ok(())
    });
    // Those that wait for one that failed would wait for ever.
    runtime.shutdown_background();
    worked
}
