//! `sanderling train`: a server and N workers in this process, over real QUIC on the loopback interface.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use sanderling_common::config::RunConfig;
use sanderling_common::config::cli::RunOptions;
use sanderling_common::corpus::{Characters, Corpus, Vocabulary};
use sanderling_common::join::JoinString;
use sanderling_common::origin::Origin;
use sanderling_common::report::one_sentence;
use sanderling_common::tokenizer::Tokenizer;
use sanderling_server::net::{Outcome, Server};
use sanderling_server::progress::ProgressView;
use sanderling_transport::stop_on_interrupt;
use sanderling_worker::net::{WorkerError, WorkerOptions, WorkerReport, work};
use sanderling_worker::site::{DeviceOptions, Gpu, Place};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::warn;

use super::UsageError;
use crate::generate::{Generator, Sampling};
use crate::report::{closing_table, plot_losses};

/// The plot's name in the run's folder.
const PLOT_FILE: &str = "loss.svg";

/// Characters of generated text shown at the end.
const SAMPLE_CHARACTERS: usize = 400;

/// Tokens of it, where a token is more than a character.
const SAMPLE_TOKENS: usize = 150;

/// Workers that were told to stop may take this long over what they compute.
const WORKERS_WAIT: Duration = Duration::from_secs(30);

/// What the sample goes on from.
const SAMPLE_PROMPT: &str = "\n";

/// Temperature of the sample.
const SAMPLE_TEMPERATURE: f32 = 0.8;

/// Train on real text: one server and several workers on this machine, over QUIC
///
/// Trains a mixture-of-experts decoder at character level on Shakespeare or on a text of yours, or on a token file
/// that `sanderling tokenize` made, and writes the curve, a plot, a summary and a Hugging Face checkpoint to runs/NAME/. Ctrl-C ends the run early, with its checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling train                                   # under three minutes on two cores
  sanderling train --text novel.txt --steps 10000
  sanderling train --text novel.tok                  # subwords: see sanderling tokenize --help
  sanderling train --workers 32
  sanderling train --workers 1 --device cuda         # on the first GPU; auto: on the CPU where there is none
  sanderling train --method dgs --momentum 0.7       # the published algorithm
  sanderling train --config runs/NAME/run.toml --seed 2")]
pub struct Arguments {
    /// What is trained.
    #[command(flatten)]
    run: RunOptions,
    /// Where the workers compute.
    #[command(flatten)]
    device: DeviceOptions,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the run from its end, in a sentence.
pub fn train(arguments: Arguments) -> anyhow::Result<()> {
    let run = arguments.run.resolve()?;
    for (key, value) in [("client_ca", &run.server.client_ca), ("tokens_file", &run.server.tokens_file)] {
        // It would keep its own workers out.
        anyhow::ensure!(
            value.is_empty(),
            UsageError(format!("{key} is for sanderling-server; train starts its own workers"))
        );
    }
    let (place, said) = arguments.device.open()?;
    // It lives until the report is made: it is what listens for signals.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        let stop =
            stop_on_interrupt(|| warn!("stopping early; Ctrl-C again to stop at once, without a checkpoint"));
        let said = match &place {
            // What a run that is upcycled needs is known when it is: the workers say it.
            Place::Gpu(gpu) if !run.upcycles() => format!("{said}; {}", estimate(gpu, &run)?),
            _ => said,
        };
        let server = Server::start(run, None)?;
        serve_with_workers(server, (place, said), stop).await
    });
    let reported = outcome.and_then(|outcome| report(&outcome));
    // To drop the runtime is to wait without end for threads that a GPU has left waiting.
    runtime.shutdown_timeout(WORKERS_WAIT);
    reported
}

/// What the workers need of a GPU, in a sentence: all at once, so that the last of them does not find out that there is no room
/// when the others have begun.
fn estimate(gpu: &Gpu, run: &RunConfig) -> anyhow::Result<String> {
    let corpus = Origin::open(run)?.corpus(run)?;
    let config = run.model_config(corpus.vocabulary().len());
    Ok(gpu.estimate(run, &config, run.run.workers)?)
}

async fn serve_with_workers(
    server: Server,
    (place, said): (Place, String),
    stop: watch::Receiver<bool>,
) -> anyhow::Result<Outcome> {
    let run = server.run().clone();
    let mut view = ProgressView::new(run.training.steps);
    view.say(&format!(
        "{}: {} on {} {}s, {} workers, seed {}; results go to {}",
        run.run.name,
        run.training.method,
        server.corpus().len(),
        server.corpus().vocabulary().unit(),
        run.run.workers,
        run.run.seed,
        server.folder().display()
    ));
    view.say(&said);
    let (stop_workers, workers_stop) = watch::channel(false);
    let mut workers = start_workers(server.local_join(), run.run.workers, place, &workers_stop);
    let outcome = {
        let over = server.over();
        let serving = server.serve(stop, |progress| view.update(progress));
        serve_beside(serving, over, &mut workers).await
    };
    view.finish();
    stop_workers.send_replace(true);
    wait_for_workers(&mut workers, WORKERS_WAIT).await;
    outcome
}

/// Waits for workers that were told to stop. The run is decided without them: those that hang are left behind.
async fn wait_for_workers(workers: &mut JoinSet<Result<WorkerReport, WorkerError>>, patience: Duration) {
    let all = async { while workers.join_next().await.is_some() {} };
    if tokio::time::timeout(patience, all).await.is_err() {
        warn!("workers did not end within {} s and are left behind: {}", patience.as_secs(), workers.len());
    }
}

/// The outcome of `serving`, or the first failure of a worker before the run is `over`: in one process a worker that is
/// lost stays lost. What happens to workers afterwards takes nothing from a run that is done.
async fn serve_beside<O, E: Into<anyhow::Error>>(
    serving: impl Future<Output = Result<O, E>>,
    over: impl Future<Output = ()>,
    workers: &mut JoinSet<Result<WorkerReport, WorkerError>>,
) -> anyhow::Result<O> {
    tokio::pin!(serving);
    tokio::select! {
        biased;
        outcome = &mut serving => return outcome.map_err(Into::into),
        () = over => {}
        failure = first_failure(workers) => return Err(failure),
    }
    serving.await.map_err(Into::into)
}

/// Waits until a worker fails.
async fn first_failure(workers: &mut JoinSet<Result<WorkerReport, WorkerError>>) -> anyhow::Error {
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return anyhow::Error::new(error).context("a worker cannot go on"),
            Err(error) => return anyhow::Error::new(error).context("a worker ended with a panic"),
        }
    }
    std::future::pending().await
}

/// Workers that share this process and its cores; they know the server by its join string alone.
fn start_workers(
    join: &JoinString,
    count: u32,
    place: Place,
    stop: &watch::Receiver<bool>,
) -> JoinSet<Result<WorkerReport, WorkerError>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let compute_permits = Some(Arc::new(Semaphore::new(cores)));
    let options = WorkerOptions { compute_permits, place, ..WorkerOptions::default() };
    let mut workers = JoinSet::new();
    for _ in 0..count {
        let (join, options, stop) = (join.clone(), options.clone(), stop.clone());
        workers.spawn(async move { work(&join, &options, stop).await });
    }
    workers
}

/// Table, sample, plot, in this order: what is known already does not wait for what takes longer or may fail.
fn report(outcome: &Outcome) -> anyhow::Result<()> {
    let file = |name: &str| Path::new(&outcome.folder).join(name).display().to_string();
    print(&format!(
        "\n{}\n  plot        {}\n  curve       {}\n  summary     {}\n  checkpoint  {}\n",
        closing_table(&outcome.summary),
        file(PLOT_FILE),
        file("metrics.jsonl"),
        file("summary.json"),
        outcome.checkpoint.display(),
    ));
    let sample = sample(outcome)?;
    let whose = if outcome.summary.best_val_loss.is_some() { "best" } else { "last" };
    print(&format!("\nA sample of the {whose} model:\n{}\n", sample.trim_end()));
    std::fs::write(outcome.folder.join("sample.txt"), format!("{}\n", sample.trim_end()))
        .with_context(|| format!("cannot write to {}", outcome.folder.display()))?;
    let (plot, unit) = (outcome.folder.join(PLOT_FILE), outcome.corpus.vocabulary().unit());
    plot_losses(&plot, &outcome.summary.name, unit, &outcome.evaluations)?;
    Ok(())
}

fn print(text: &str) {
    // A closed pipe on the other side is no reason to fail a finished run.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

fn sample(outcome: &Outcome) -> anyhow::Result<String> {
    let text = SampleText::of(&outcome.corpus);
    let mut generator = Generator::new(&outcome.model, &outcome.parameters)?;
    let prompt = Some(text.encode(SAMPLE_PROMPT)?).filter(|prompt| !prompt.is_empty()).unwrap_or(vec![0]);
    let count = match text {
        SampleText::Characters(_) => SAMPLE_CHARACTERS,
        SampleText::Subwords(_) | SampleText::Numbers => SAMPLE_TOKENS,
    };
    let options = Sampling { temperature: SAMPLE_TEMPERATURE, top_p: 1.0, seed: outcome.summary.seed };
    text.decode(&generator.generate(&prompt, &options, count)?)
}

/// Text to tokens and back, as the corpus does it.
enum SampleText<'a> {
    Characters(&'a Characters),
    Subwords(Box<Tokenizer>),
    /// Without a tokenizer there are only the tokens.
    Numbers,
}

impl<'a> SampleText<'a> {
    fn of(corpus: &'a Corpus) -> Self {
        let file = match corpus.vocabulary() {
            Vocabulary::Characters(characters) => return Self::Characters(characters),
            Vocabulary::Tokens(file) => file,
        };
        match file.tokenizer_json().map(|json| Tokenizer::from_json(json, "the token file's tokenizer")) {
            Some(Ok(tokenizer)) => Self::Subwords(Box::new(tokenizer)),
            Some(Err(error)) => {
                warn!("the sample is in token numbers: {}", one_sentence(&error));
                Self::Numbers
            }
            None => Self::Numbers,
        }
    }

    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(match self {
            Self::Characters(characters) => text.chars().filter_map(|c| characters.token(c)).collect(),
            Self::Subwords(tokenizer) => tokenizer.encode(text)?,
            Self::Numbers => Vec::new(),
        })
    }

    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        Ok(match self {
            Self::Characters(characters) => {
                tokens.iter().filter_map(|&token| characters.character(token)).collect()
            }
            Self::Subwords(tokenizer) => tokenizer.decode(tokens)?,
            Self::Numbers => tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn failed() -> Result<WorkerReport, WorkerError> {
        Err(WorkerError::WrongToken)
    }

    #[tokio::test]
    async fn a_worker_that_fails_ends_a_run_that_goes_on() {
        let mut workers = JoinSet::new();
        workers.spawn(async { Ok(WorkerReport::default()) });
        workers.spawn(async { failed() });
        let serving = std::future::pending::<Result<(), WorkerError>>();
        let error = serve_beside(serving, std::future::pending(), &mut workers).await.unwrap_err();
        assert!(error.downcast_ref::<WorkerError>().is_some(), "{error}");
    }

    #[tokio::test]
    async fn a_worker_that_hangs_is_left_behind() {
        let mut workers = JoinSet::new();
        workers.spawn(async { Ok(WorkerReport::default()) });
        workers.spawn(std::future::pending());
        wait_for_workers(&mut workers, Duration::from_millis(20)).await;
        assert_eq!(workers.len(), 1, "only the one that hangs");
    }

    #[tokio::test]
    async fn a_worker_that_fails_takes_nothing_from_a_finished_run() {
        let mut workers = JoinSet::new();
        workers.spawn(async { failed() });
        let serving = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok::<_, WorkerError>(7)
        };
        assert_eq!(serve_beside(serving, async {}, &mut workers).await.unwrap(), 7);
        assert_eq!(workers.len(), 1, "nobody asked the worker");

        // All at once.
        let served = std::future::ready(Ok::<_, WorkerError>(8));
        assert_eq!(serve_beside(served, async {}, &mut workers).await.unwrap(), 8);
    }
}
