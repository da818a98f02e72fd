//! `sanderling eval`: loss over a text, or accuracy on multiple-choice questions.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use sanderling_common::checkpoint::{Checkpoint, TOKENIZER_FILE};
use sanderling_common::config::BUNDLED_TEXT;
use sanderling_common::corpus::SHAKESPEARE;
use sanderling_common::mapped::MappedFile;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::tokenizer::Tokenizer;
use sanderling_common::tokens::{TokenFile, Tokens};
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::site::DeviceOptions;
use serde_json::json;

use super::device::{Held, hold, open, ran_out};
use super::{UsageError, say};
use crate::evaluation::{
    FileScore, LanguageScore, Question, Scoring, Windows, accuracy, answer_all, language_loss, read_questions,
};
use crate::report::table;
use crate::work::{Unit, Work};

/// The longest window by default: more context costs memory in its square and helps little.
const WINDOW_DEFAULT: usize = 1024;

/// The largest text that is evaluated, in bytes.
const TEXT_BYTES_MAX: u64 = 1 << 30;

/// What is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Task {
    /// Mean cross-entropy and perplexity over a text or a token file
    #[default]
    Lm,
    /// Zero-shot accuracy on MMLU-style CSV: question, four choices, letter of the answer
    MultipleChoice,
}

/// Measure a model: loss and perplexity over a text, or accuracy on multiple-choice questions
///
/// Windows of a text overlap if --stride is smaller than --window: every token but the first is predicted once and, but for
/// the first window's, with at least (window − stride) tokens of context. Multiple choice asks without examples and takes
/// the letter with the largest log-likelihood. Routing drops no token here, whatever capacity the model was trained with.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling eval --model runs/NAME/checkpoint --data shakespeare
  sanderling eval --model mixtral --data novel.txt --window 512 --stride 256
  sanderling eval --model mixtral --data held-out.tokens --json
  sanderling eval --model mixtral --data mmlu/test --task multiple-choice --device cuda")]
pub struct Arguments {
    /// The checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A text, a token file, or "shakespeare"; for multiple choice a CSV file or a folder of them
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// What is measured
    #[arg(long, value_enum, default_value_t)]
    task: Task,
    /// Tokens that a window shows to the model [default: its context, at most 1024]
    #[arg(long)]
    window: Option<usize>,
    /// Tokens from one window to the next [default: the window, so that they do not overlap]
    #[arg(long)]
    stride: Option<usize>,
    /// Sequences computed together by each thread
    #[arg(long, allow_negative_numbers = true, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Threads [default: one per core, and one on a GPU]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Another tokenizer.json than the checkpoint's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Where and how precisely.
    #[command(flatten)]
    device: DeviceOptions,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the model from being measured, in a sentence.
pub fn eval(arguments: &Arguments) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    match arguments.task {
        Task::Lm => language(arguments, &checkpoint),
        Task::MultipleChoice => multiple_choice(arguments, &checkpoint),
    }
}

impl Arguments {
    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, usize::from)
    }

    /// Threads share a GPU's queue, so that more of them only take memory.
    fn threads_of_gpu(&self) -> usize {
        self.threads.map_or(1, usize::from)
    }
}

/// Says what needs less where a GPU's memory ran out.
fn with_remedy(error: anyhow::Error, less: &str) -> anyhow::Error {
    if ran_out(&error).is_some() { anyhow!("{error:#}; {less} need less") } else { error }
}

/// The loss over a text, wherever it is computed.
fn language_of(
    arguments: &Arguments,
    config: &ModelConfig,
    held: &Held,
    (tokens, windows): (&Tokens, &Windows),
) -> anyhow::Result<LanguageScore> {
    let mut work = Work::begin("evaluating", 0, Unit::Count("batches"))?;
    let mut progress = |done: usize, total: usize| {
        work.of(total as u64);
        work.at(done as u64)
    };
    let score = match held {
        Held::Cpu(parameters) => {
            let (kernels, threads) = (&Cpu::default, arguments.threads());
            let scoring = Scoring { config, parameters: parameters.as_slice(), kernels, threads };
            language_loss(&scoring, tokens, windows, &mut progress)?
        }
        Held::Gpu(gpu) => {
            let (kernels, threads) = (&|| gpu.kernels(), arguments.threads_of_gpu());
            let scoring = Scoring { config, parameters: &*gpu.parameters, kernels, threads };
            language_loss(&scoring, tokens, windows, &mut progress).map_err(|error| {
                with_remedy(error, "a smaller --batch-size or --window, or fewer --threads,")
            })?
        }
    };
    work.end();
    Ok(score)
}

/// The answers to the questions on a subject, wherever they are computed.
fn answers_of(
    arguments: &Arguments,
    config: &ModelConfig,
    held: &Held,
    asked: (&str, &[Question]),
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> anyhow::Result<FileScore> {
    let batch = arguments.batch_size.into();
    match held {
        Held::Cpu(parameters) => {
            let (kernels, threads) = (&Cpu::default, arguments.threads());
            let scoring = Scoring { config, parameters: parameters.as_slice(), kernels, threads };
            answer_all(&scoring, asked, tokenizer, batch, progress)
        }
        Held::Gpu(gpu) => {
            let (kernels, threads) = (&|| gpu.kernels(), arguments.threads_of_gpu());
            let scoring = Scoring { config, parameters: &*gpu.parameters, kernels, threads };
            answer_all(&scoring, asked, tokenizer, batch, progress)
                .map_err(|error| with_remedy(error, "a smaller --batch-size, or fewer --threads,"))
        }
    }
}

/// The tokenizer asked for, or the checkpoint's; it must not have more tokens than the model.
fn tokenizer(arguments: &Arguments, checkpoint: &Checkpoint) -> anyhow::Result<Tokenizer> {
    let path = arguments.tokenizer.clone().unwrap_or_else(|| checkpoint.directory().join(TOKENIZER_FILE));
    let tokenizer = Tokenizer::load(&path)?;
    tokenizer.check_fits(checkpoint.config().vocab_size)?;
    Ok(tokenizer)
}

fn is_token_file(path: &Path) -> anyhow::Result<bool> {
    let unreadable = || format!("cannot read {}", path.display());
    let is_file = std::fs::metadata(path).with_context(unreadable)?.is_file();
    ensure!(is_file, "{} is not a file", path.display());
    Ok(TokenFile::is_one(&MappedFile::open(path).with_context(unreadable)?))
}

/// Tokens of another tokenizer than the model's mean something else to it.
fn check_tokenizers(arguments: &Arguments, checkpoint: &Checkpoint, file: &TokenFile) -> anyhow::Result<()> {
    let has_own = arguments.tokenizer.is_some() || checkpoint.directory().join(TOKENIZER_FILE).is_file();
    let (true, Some(json)) = (has_own, file.tokenizer_json()) else { return Ok(()) };
    let (data, model) = (arguments.data.display(), arguments.model.display());
    let theirs = Tokenizer::from_json(json, &format!("the tokenizer in {data}"))?;
    let different = tokenizer(arguments, checkpoint)?.differs_from(&theirs);
    match different {
        None => Ok(()),
        Some(token) => bail!(
            "{data} was made with another tokenizer than that of {model}: they number {token:?} differently; tokenise \
             its text with the model's tokenizer.json"
        ),
    }
}

/// The tokens of the data, and the bytes of text they stand for where that is known.
fn tokens(arguments: &Arguments, checkpoint: &Checkpoint) -> anyhow::Result<(Tokens, Option<u64>)> {
    let path = &arguments.data;
    let vocab_size = checkpoint.config().vocab_size;
    if path != Path::new(BUNDLED_TEXT) && is_token_file(path)? {
        let file = TokenFile::open(path)?;
        let (found, path) = (file.vocabulary_size(), path.display());
        ensure!(found <= vocab_size, "{path} has a vocabulary of {found}, the model one of {vocab_size}");
        check_tokenizers(arguments, checkpoint, &file)?;
        return Ok((file.tokens(), None));
    }
    let text = match path.to_str() {
        Some(BUNDLED_TEXT) => SHAKESPEARE.to_owned(),
        _ => {
            let unreadable = || format!("cannot read the text {}", path.display());
            let bytes = std::fs::metadata(path).with_context(unreadable)?.len();
            ensure!(
                bytes <= TEXT_BYTES_MAX,
                "the text {} has {bytes} bytes; at most {TEXT_BYTES_MAX} are read",
                path.display()
            );
            let bytes = std::fs::read(path).with_context(unreadable)?;
            String::from_utf8(bytes)
                .with_context(|| format!("the text {} is not valid UTF-8", path.display()))?
        }
    };
    let tokens = tokenizer(arguments, checkpoint)?.encode(&text)?;
    Ok((Tokens::collect(tokens, vocab_size), Some(text.len() as u64)))
}

fn language(arguments: &Arguments, checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let config = checkpoint.config();
    let length = arguments.window.unwrap_or(config.context.min(WINDOW_DEFAULT));
    let stride = arguments.stride.unwrap_or(length);
    ensure!(length >= 1, UsageError("--window must be at least 1".to_owned()));
    ensure!(
        length <= config.context,
        UsageError(format!("--window {length} is longer than the model's context of {}", config.context))
    );
    ensure!(
        stride >= 1 && stride <= length,
        UsageError(format!("--stride {stride} must lie between 1 and the window, {length}"))
    );
    let (tokens, text_bytes) = tokens(arguments, checkpoint)?;
    ensure!(
        tokens.len() >= 2,
        "{} has {} tokens; at least 2 are needed",
        arguments.data.display(),
        tokens.len()
    );
    let (place, on) = open(arguments.device)?;
    let held = hold(place, config, checkpoint.load()?)?;
    let windows = Windows { length, stride, batch: arguments.batch_size.into() };
    let started = Instant::now();
    let score = language_of(arguments, config, &held, (&tokens, &windows))?;
    ensure!(
        score.loss().is_finite(),
        "the loss of {} is not a number: its computation overflows",
        arguments.model.display()
    );
    let seconds = started.elapsed().as_secs_f64();
    let bits_per_byte = text_bytes.map(|bytes| score.loss_sum / std::f64::consts::LN_2 / bytes as f64);
    let LanguageScore { tokens, .. } = score;
    if arguments.json {
        return say(&format!(
            "{:#}\n",
            json!({
                "task": "lm", "model": arguments.model.display().to_string(),
                "data": arguments.data.display().to_string(), "loss": score.loss(),
                "perplexity": score.perplexity(), "bits_per_byte": bits_per_byte, "tokens": tokens,
                "window": length, "stride": stride, "device": on.device, "precision": on.precision.to_string(),
                "seconds": seconds,
            })
        ));
    }
    let mut rows = vec![
        ("model", arguments.model.display().to_string()),
        ("data", format!("{}, {tokens} tokens predicted", arguments.data.display())),
        ("windows", format!("{length} tokens, {stride} apart")),
        ("loss", format!("{:.5} nats per token", score.loss())),
        ("perplexity", format!("{:.4}", score.perplexity())),
    ];
    rows.extend(bits_per_byte.map(|bits| ("bits per byte", format!("{bits:.4}"))));
    rows.push(("computed on", on.to_string()));
    rows.push(("time", format!("{seconds:.1} s, {:.2} k tokens/s", tokens as f64 / seconds / 1e3)));
    say(&table(&rows))
}

/// The CSV files of a path, in order of their names.
fn question_files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = || format!("cannot read {}", path.display());
    if std::fs::metadata(path).with_context(unreadable)?.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(unreadable)? {
        let file = entry.with_context(unreadable)?.path();
        if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
            files.push(file);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "{} has no .csv files", path.display());
    Ok(files)
}

/// What a file is about: its name without MMLU's endings.
fn subject(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let stem = ["_test", "_val", "_dev"].iter().find_map(|ending| stem.strip_suffix(ending)).unwrap_or(&stem);
    stem.replace('_', " ")
}

fn multiple_choice(arguments: &Arguments, checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let files: Vec<(PathBuf, String, Vec<Question>)> = question_files(&arguments.data)?
        .into_iter()
        .map(|path| anyhow::Ok((path.clone(), subject(&path), read_questions(&path)?)))
        .collect::<Result<_, _>>()?;
    let tokenizer = tokenizer(arguments, checkpoint)?;
    let config = checkpoint.config();
    let (place, on) = open(arguments.device)?;
    let held = hold(place, config, checkpoint.load()?)?;
    let total: usize = files.iter().map(|(_, _, questions)| questions.len()).sum();
    let started = Instant::now();
    let mut work = Work::begin("asking", total as u64, Unit::Count("questions"))?;
    let (mut scores, mut before) = (Vec::<FileScore>::new(), 0);
    for (path, subject, questions) in &files {
        let mut progress = |done: usize| work.at((before + done) as u64);
        let score = answers_of(arguments, config, &held, (subject, questions), &tokenizer, &mut progress);
        scores.push(score.with_context(|| format!("{}: cannot ask about {subject}", path.display()))?);
        before += questions.len();
    }
    work.end();
    let right: usize = scores.iter().map(|score| score.right).sum();
    let seconds = started.elapsed().as_secs_f64();
    let (overall, error) = accuracy(right, total);
    if arguments.json {
        let files = scores.iter().map(|score| {
            let (p, error) = accuracy(score.right, score.questions);
            json!({
                "subject": score.subject, "questions": score.questions, "right": score.right, "accuracy": p,
                "standard_error": error,
            })
        });
        return say(&format!(
            "{:#}\n",
            json!({
                "task": "multiple-choice", "model": arguments.model.display().to_string(),
                "data": arguments.data.display().to_string(), "accuracy": overall,
                "standard_error": error, "questions": total, "right": right, "device": on.device,
                "precision": on.precision.to_string(), "seconds": seconds,
                "files": files.collect::<Vec<_>>(),
            })
        ));
    }
    let row = |right, questions| {
        let (p, error) = accuracy(right, questions);
        format!("{:6.2} % ± {:.2}   {right} of {questions}", 100.0 * p, 100.0 * error)
    };
    let mut rows: Vec<(&str, String)> =
        scores.iter().map(|score| (score.subject.as_str(), row(score.right, score.questions))).collect();
    rows.push(("overall", row(right, total)));
    rows.push(("computed on", on.to_string()));
    say(&table(&rows))
}
