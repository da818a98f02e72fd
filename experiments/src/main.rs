//! `sanderling`: what a person runs at a desk.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use sanderling::commands::{
    UsageError, chaos, eval, export, generate, inspect, simulate, tokenize, train, upcycle,
};
use sanderling::{bench, reproduce};
use sanderling_common::config::cli::{RunOptionsError, with_defaults};
use sanderling_common::report::one_sentence;
use sanderling_server::net::ServerError;
use sanderling_worker::site::PlaceError;
use tracing::level_filters::LevelFilter;

/// Train mixture-of-experts language models asynchronously, with tens of times fewer bytes
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  sanderling train                                   # under three minutes on two cores
  sanderling train --text novel.txt --method dgs
  sanderling inspect runs/NAME/checkpoint
  sanderling COMMAND --help                          # what a command does, its options and examples")]
struct Arguments {
    /// What to do.
    #[command(subcommand)]
    command: Command,
    /// Say more (-v), or everything (-vv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(Box<train::Arguments>),
    Upcycle(upcycle::Arguments),
    Eval(eval::Arguments),
    Generate(generate::Arguments),
    Inspect(inspect::Arguments),
    Export(export::Arguments),
    Tokenize(Box<tokenize::Arguments>),
    Simulate(simulate::Arguments),
    Chaos(chaos::Arguments),
    #[command(hide = true)]
    ChaosServer(sanderling::chaos::ServerArguments),
    #[command(hide = true)]
    ChaosWorker(sanderling::chaos::WorkerArguments),
    #[command(hide = true)]
    BandwidthServer(reproduce::BandwidthServerArguments),
    #[command(hide = true)]
    BandwidthWorkers(reproduce::BandwidthWorkersArguments),
    /// Run a published result again, at a scale that fits a desk: table, plots, verdict
    #[command(subcommand)]
    Reproduce(Reproduction),
    /// Measure how fast this machine is
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Subcommand)]
enum Bench {
    Model(bench::ModelArguments),
}

#[derive(Debug, Subcommand)]
enum Reproduction {
    Recipe(reproduce::RecipeArguments),
    Methods(reproduce::MethodsArguments),
    Bandwidth(reproduce::BandwidthArguments),
    Secondary(reproduce::SecondaryArguments),
    Quantisation(reproduce::QuantisationArguments),
    LocalSteps(reproduce::LocalStepsArguments),
    Staleness(reproduce::StalenessArguments),
    Upcycling(reproduce::UpcyclingArguments),
    Compare(reproduce::CompareArguments),
}

fn main() -> ExitCode {
    let command = Arguments::command().mut_subcommand("train", with_defaults);
    let arguments = Arguments::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    let level = match arguments.verbose {
        // The progress bar says what there is to say.
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(level > LevelFilter::INFO)
        .init();
    let result = match arguments.command {
        Command::Train(arguments) => train::train(*arguments),
        Command::Upcycle(arguments) => upcycle::upcycle(&arguments),
        Command::Eval(arguments) => eval::eval(&arguments),
        Command::Generate(arguments) => generate::generate(&arguments),
        Command::Inspect(arguments) => inspect::inspect(&arguments),
        Command::Export(arguments) => export::export(&arguments),
        Command::Tokenize(arguments) => tokenize::tokenize(*arguments),
        Command::Simulate(arguments) => simulate::simulate(&arguments),
        Command::Chaos(arguments) => chaos::chaos(&arguments),
        Command::ChaosServer(arguments) => sanderling::chaos::serve(&arguments),
        Command::ChaosWorker(arguments) => sanderling::chaos::join(&arguments),
        Command::BandwidthServer(arguments) => reproduce::bandwidth_server(&arguments),
        Command::BandwidthWorkers(arguments) => reproduce::bandwidth_workers(&arguments),
        Command::Bench(Bench::Model(arguments)) => bench::model(&arguments),
        Command::Reproduce(what) => match what {
            Reproduction::Recipe(arguments) => reproduce::recipe(&arguments),
            Reproduction::Methods(arguments) => reproduce::methods(&arguments),
            Reproduction::Bandwidth(arguments) => reproduce::bandwidth(&arguments),
            Reproduction::Secondary(arguments) => reproduce::secondary(&arguments),
            Reproduction::Quantisation(arguments) => reproduce::quantisation(&arguments),
            Reproduction::LocalSteps(arguments) => reproduce::local_steps(&arguments),
            Reproduction::Staleness(arguments) => reproduce::staleness(&arguments),
            Reproduction::Upcycling(arguments) => reproduce::upcycling(&arguments),
            Reproduction::Compare(arguments) => reproduce::compare(&arguments),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {}", one_sentence(error.as_ref()));
            // 2: the command line or the run file is to be mended; 1: anything else.
            let is_usage =
                matches!(error.downcast_ref(), Some(ServerError::Listen(_) | ServerError::Config(_)))
                    || error.is::<UsageError>()
                    || error.downcast_ref().is_some_and(PlaceError::is_usage);
            let other = if is_usage { 2 } else { 1 };
            ExitCode::from(error.downcast_ref().map_or(other, RunOptionsError::exit_code))
        }
    }
}
