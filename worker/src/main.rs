//! `sanderling-worker`: joins a server by its join string and works until the run is over.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use sanderling_common::join::{JoinError, JoinString};
use sanderling_common::report::one_sentence;
use sanderling_transport::{ClientIdentity, stop_on_interrupt};
use sanderling_worker::net::{WorkerOptions, WorkerReport, work};
use sanderling_worker::site::{DeviceOptions, PlaceError};
use tokio::sync::watch;
use tracing::{info, level_filters::LevelFilter};

/// Work for a Sanderling server: fetch its model, compute gradients, exchange sparse updates
///
/// The join string is the line that the server prints on start; it is all that a worker needs. The configuration, the
/// text and the batches come from the server. A worker that loses the server tries again and resumes its session.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  sanderling-worker --join 'sanderling://192.0.2.7:4433?pin=…&token=…'
  sanderling-worker --join-file /shared/join        # waits until the server has written it
  sanderling-worker --join 'sanderling://192.0.2.7:4433?pin=…' --certificate node-1.pem --key node-1.key
  sanderling-worker --join-file join --state-dir /var/lib/sanderling/worker-1
  sanderling-worker --join-file join --device cuda              # on the first GPU, in bf16
  sanderling-worker --join-file join --device cuda:1 --precision f32
  sanderling-worker --join-file join --device auto              # on the CPU where there is no GPU
  SANDERLING_JOIN='sanderling://…' sanderling-worker -v"
)]
struct Arguments {
    /// The join string that the server printed, in quotes; or --join-file
    #[arg(long, env = "SANDERLING_JOIN", hide_env_values = true, value_name = "STRING")]
    #[arg(required_unless_present = "join_file", conflicts_with = "join_file")]
    join: Option<String>,
    /// A file that holds the join string; waited for if it does not exist yet
    #[arg(long, value_name = "FILE")]
    join_file: Option<PathBuf>,
    /// Give up after this many seconds without a server that takes this worker in
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    #[arg(value_parser = clap::value_parser!(u64).range(..=GIVE_UP_AFTER_S_MAX))]
    give_up_after_s: u64,
    /// The dense checkpoint of a run that upcycles one, if it is on this machine. The path that the run names is tried
    /// too; where neither holds that model, the server sends it
    #[arg(long, value_name = "DIR")]
    dense: Option<PathBuf>,
    /// The client certificate (PEM) to present to a server that admits workers by one
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Option<PathBuf>,
    /// The private key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// A folder in which the worker keeps model, accumulators, data cursor and unanswered push, synced before each push:
    /// started again after a crash, it goes on in its session and repeats or skips no batch. Each worker needs its own;
    /// the session must still be there, so start it again within the run's lease_ms
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where it computes.
    #[command(flatten)]
    device: DeviceOptions,
    /// Say more (-v), or everything (-vv)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,
}

/// The longest patience, in seconds: as good as for ever, and no clock overflows.
const GIVE_UP_AFTER_S_MAX: u64 = 1_000_000_000;

/// How often a join file is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The largest join file read, in bytes.
const JOIN_FILE_BYTES_MAX: u64 = 4096;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let level = match (arguments.quiet, arguments.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::INFO,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(level > LevelFilter::INFO)
        .init();
    match run(&arguments) {
        Ok(report) => {
            let WorkerReport { exchanges, skipped, reconnects, stopped, .. } = report;
            let why = if stopped { "stopped" } else { "the run is over" };
            info!("{why}: {exchanges} exchanges, {skipped} gradients skipped, {reconnects} reconnects");
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {}", one_sentence(error.as_ref()));
            // 2: the command line is to be mended; 1: anything else.
            let is_of_command_line =
                error.is::<JoinError>() || error.downcast_ref().is_some_and(PlaceError::is_usage);
            ExitCode::from(if is_of_command_line { 2 } else { 1 })
        }
    }
}

#[tokio::main]
async fn run(arguments: &Arguments) -> anyhow::Result<WorkerReport> {
    let stated: Option<JoinString> = arguments.join.as_deref().map(str::parse).transpose()?;
    // Before anything is waited for: what is missing is said at once, not when a server is found.
    let (place, said) = arguments.device.open()?;
    info!("{said}");
    let stop =
        stop_on_interrupt(|| info!("stopping after the gradient under way; Ctrl-C again to stop at once"));
    let give_up_after = Duration::from_secs(arguments.give_up_after_s);
    let join = match (stated, &arguments.join_file) {
        (Some(join), _) => join,
        (None, Some(path)) => match wait_for_file(path, give_up_after, stop.clone()).await? {
            Some(text) => text.parse()?,
            None => return Ok(WorkerReport { stopped: true, ..WorkerReport::default() }),
        },
        (None, None) => unreachable!("clap asks for one of the two"),
    };
    info!("joining {}:{}", join.host, join.port);
    let options = WorkerOptions {
        give_up_after,
        dense: arguments.dense.clone(),
        state_dir: arguments.state_dir.clone(),
        identity: identity(arguments)?,
        place,
        ..WorkerOptions::default()
    };
    Ok(work(&join, &options, stop).await?)
}

/// The client certificate with its key, if one is named.
fn identity(arguments: &Arguments) -> anyhow::Result<Option<Arc<ClientIdentity>>> {
    let (Some(certificate), Some(key)) = (&arguments.certificate, &arguments.key) else { return Ok(None) };
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let identity = ClientIdentity::from_pem(&read(certificate)?, &read(key)?);
    let named = || format!("cannot use {} and {}", certificate.display(), key.display());
    Ok(Some(Arc::new(identity.with_context(named)?)))
}

/// The content of a join file, once it has a whole line.
async fn wait_for_file(
    path: &Path,
    give_up_after: Duration,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<Option<String>> {
    let deadline = Instant::now() + give_up_after;
    let mut said = false;
    loop {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > JOIN_FILE_BYTES_MAX => {
                anyhow::bail!("{} is too large to be a join string", path.display());
            }
            Ok(_) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                if text.ends_with('\n') {
                    return Ok(Some(text));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
        if Instant::now() >= deadline {
            anyhow::bail!("gave up waiting for the join string in {}", path.display());
        }
        if !std::mem::replace(&mut said, true) {
            info!("waiting for the join string in {}", path.display());
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return Ok(None),
        }
    }
}
