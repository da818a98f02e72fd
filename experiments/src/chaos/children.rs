//! What the processes do: the same as `sanderling-server` and `sanderling-worker`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use sanderling_common::config;
use sanderling_common::join::JoinString;
use sanderling_server::net::Server;
use sanderling_transport::stop_on_interrupt;
use sanderling_worker::net::{WorkerOptions, work};

use super::processes::write_private;
use crate::child::end_with_the_parent;

/// A worker looks for the server for as long as any soak lasts.
const GIVE_UP_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A server of `sanderling chaos`.
#[derive(Debug, clap::Args)]
pub struct ServerArguments {
    /// The run file
    #[arg(long)]
    config: PathBuf,
    /// Where the join string goes when the server is ready
    #[arg(long)]
    join_file: PathBuf,
}

/// A worker of `sanderling chaos`.
#[derive(Debug, clap::Args)]
pub struct WorkerArguments {
    /// Where the join string is
    #[arg(long)]
    join_file: PathBuf,
    /// Where the worker keeps its place, if it does
    #[arg(long)]
    state_dir: Option<PathBuf>,
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Serves until it is told to end.
///
/// # Errors
/// As a server's.
pub fn serve(arguments: &ServerArguments) -> anyhow::Result<()> {
    end_with_the_parent();
    let run = config::parse(&read(&arguments.config)?)?.resolve()?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        let server = Server::start(run, None)?;
        let temporary = arguments.join_file.with_extension("partial");
        write_private(&temporary, &server.join().reveal())
            .and_then(|()| std::fs::rename(&temporary, &arguments.join_file))
            .with_context(|| format!("cannot write {}", arguments.join_file.display()))?;
        server.serve(stop, |_| {}).await?;
        Ok(())
    })
}

/// Works until it is told to end, or the run is over.
///
/// # Errors
/// As a worker's.
pub fn join(arguments: &WorkerArguments) -> anyhow::Result<()> {
    end_with_the_parent();
    let join: JoinString = read(&arguments.join_file)?.trim().parse()?;
    let options = WorkerOptions {
        give_up_after: GIVE_UP_AFTER,
        state_dir: arguments.state_dir.clone(),
        ..WorkerOptions::default()
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_interrupt(|| {});
        work(&join, &options, stop).await?;
        Ok(())
    })
}
