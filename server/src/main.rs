//! `sanderling-server`: serves one run to as many workers as come.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser};
use sanderling_common::config::cli::{RunOptions, RunOptionsError, with_defaults};
use sanderling_common::join::{JoinError, Token};
use sanderling_common::report::one_sentence;
use sanderling_server::commands::Command;
use sanderling_server::net::{AdmissionError, Server, ServerError};
use sanderling_server::progress::ProgressView;
use sanderling_transport::stop_on_interrupt;
use tracing::{info, level_filters::LevelFilter};

/// Serve a training run: hold the model, apply workers' sparse updates, write the results
///
/// Prints a join string on standard output; `sanderling-worker --join '…'` is all that a worker needs. Without
/// options it serves the run that `sanderling train` makes. Results are written to runs/<name>/.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  sanderling-server                                  # this machine only, any free port
  sanderling-server --listen 0.0.0.0:4433 --advertise training.example.org
  sanderling-server --config run.toml --steps 20000 --join-file /shared/join
  sanderling-server --config run.toml --state-dir state   # again after a crash or Ctrl-C: goes on with the run
  sanderling-server --tokens-file tokens.toml        # a token for each worker: see sanderling-server token --help
  sanderling-server --client-ca fleet/ca.pem         # a certificate for each: see sanderling-server cert --help"
)]
struct Arguments {
    /// What to do instead of serving.
    #[command(subcommand)]
    command: Option<Command>,
    /// What is trained.
    #[command(flatten)]
    run: RunOptions,
    /// The token that admits workers; drawn afresh if none is given. Not with tokens_file or client_ca
    #[arg(long, env = "SANDERLING_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Also write the join string to this file, readable by its owner only
    #[arg(long, value_name = "FILE")]
    join_file: Option<PathBuf>,
    /// Say more (-v), or everything (-vv)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let matches = with_defaults(Arguments::command()).get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let level = match arguments.verbose {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(level > LevelFilter::INFO)
        .init();
    let done = match arguments.command {
        Some(command) => command.run(),
        None => run(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {}", one_sentence(error.as_ref()));
            // 2: the command line or the run file is to be mended; 1: anything else.
            let is_usage = matches!(
                error.downcast_ref(),
                Some(
                    ServerError::Listen(_)
                        | ServerError::Config(_)
                        | ServerError::Memory(_)
                        | ServerError::Admission(AdmissionError::TokenBeside(_))
                )
            ) || error.is::<JoinError>();
            let other = if is_usage { 2 } else { 1 };
            ExitCode::from(error.downcast_ref().map_or(other, RunOptionsError::exit_code))
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let run = arguments.run.resolve()?;
    let token: Option<Token> = arguments.token.as_deref().map(str::parse).transpose()?;
    let stop = stop_on_interrupt(|| info!("Ctrl-C again to stop at once, without the results"));
    let server = Server::start(run, token)?;
    let join = server.join().reveal();
    if let Some(path) = &arguments.join_file {
        write_join_file(path, &join).with_context(|| format!("cannot write {}", path.display()))?;
    }
    writeln!(std::io::stdout(), "{join}").context("cannot print the join string")?;
    let settings = &server.run().server;
    if !settings.client_ca.is_empty() {
        info!(
            "workers join with this string and a client certificate: see sanderling-server cert client --help"
        );
    } else if !settings.tokens_file.is_empty() {
        info!(
            "workers join with this string and a token of their own: see sanderling-server token add --help"
        );
    }
    match server.was_over() {
        true => info!("the run is over already; its results are in {}", server.folder().display()),
        false => info!("results go to {}; waiting for workers", server.folder().display()),
    }
    let mut view = ProgressView::new(server.run().training.steps);
    let served = server.serve(stop, |progress| view.update(progress)).await;
    view.finish();
    let outcome = served?;
    if let Some(path) = &arguments.join_file {
        // It would lead workers to a server that is gone; where somebody else removed it, that is as well.
        let _ = std::fs::remove_file(path);
    }
    let summary = serde_json::to_string_pretty(&outcome.summary).context("cannot print the summary")?;
    writeln!(std::io::stdout(), "{summary}").context("cannot print the summary")?;
    info!("results are in {}", outcome.folder.display());
    Ok(())
}

/// Written under another name and renamed, so that a worker never reads half of it.
fn write_join_file(path: &Path, join: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("partial");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&temporary)?.write_all(format!("{join}\n").as_bytes())?;
    std::fs::rename(&temporary, path)
}
