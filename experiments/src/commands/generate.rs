//! `sanderling generate`: text from a checkpoint, as it is made.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::{Checkpoint, TOKENIZER_FILE};
use sanderling_common::tokenizer::Tokenizer;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::site::DeviceOptions;
use serde_json::json;
use tracing::warn;

use super::device::{Held, hold, open};
use super::{UsageError, say};
use crate::generate::{Ending, Generator, Sampling};
use crate::work::Stop;

/// Write text that goes on from a prompt, shown as it is made
///
/// The prompt is tokenised as `transformers` would, with the special tokens that tokenizer.json says to put around a text.
/// The same model, prompt, options and seed give the same text on the same device. At the end of the model's context the
/// older half of the text is forgotten; at most 8192 tokens are seen. Generation ends at the model's end-of-text token, if
/// it has one, or after --max-new-tokens.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling generate --model runs/NAME/checkpoint --prompt 'ROMEO:'
  sanderling generate --model mixtral --prompt 'Once' --temperature 0            # the likeliest token each time
  sanderling generate --model mixtral --prompt 'Once' --top-p 0.9 --seed 7 --max-new-tokens 500 --device cuda")]
pub struct Arguments {
    /// The checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What to go on from
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to make at most
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 200)]
    max_new_tokens: usize,
    /// Below 1 likelier tokens are preferred, above 1 unlikelier ones; 0 takes the likeliest each time
    #[arg(long, allow_negative_numbers = true, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Draw from the fewest tokens whose probabilities sum to at least this
    #[arg(long, allow_negative_numbers = true, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 1337)]
    seed: u64,
    /// Another tokenizer.json than the checkpoint's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Where and how precisely.
    #[command(flatten)]
    device: DeviceOptions,
    /// Print the whole as JSON instead, with the tokens, why there are no more ("count", "end-of-text" or "stopped") and
    /// the speed
    #[arg(long)]
    json: bool,
}

/// What was made.
#[derive(Default)]
struct Made {
    text: String,
    tokens: Vec<u32>,
    /// Why there is no more of it, in a word.
    ending: &'static str,
    /// From the first token of the prompt on.
    seconds: f64,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the text from being made, in a sentence.
pub fn generate(arguments: &Arguments) -> anyhow::Result<()> {
    let Arguments { temperature, top_p, .. } = *arguments;
    ensure!(
        temperature >= 0.0 && temperature.is_finite(),
        UsageError(format!("--temperature {temperature} must be zero or a positive number"))
    );
    ensure!(top_p > 0.0 && top_p <= 1.0, UsageError(format!("--top-p {top_p} must lie in (0, 1]")));
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let config = checkpoint.config();
    let path = arguments.tokenizer.clone().unwrap_or_else(|| checkpoint.directory().join(TOKENIZER_FILE));
    let tokenizer = Tokenizer::load(&path)?;
    tokenizer.check_fits(config.vocab_size)?;
    let prompt = tokenizer.encode_prompt(&arguments.prompt)?;
    ensure!(!prompt.is_empty(), "the prompt has no tokens; give at least one character with --prompt");
    let ends = &checkpoint.special_tokens().eos;
    let (place, on) = open(arguments.device)?;
    let held = hold(place, config, checkpoint.load()?)?;
    let made = match &held {
        Held::Cpu(parameters) => {
            let generator = Generator::new(config, parameters)?;
            stream(arguments, generator, &prompt, (&tokenizer, ends))
        }
        Held::Gpu(gpu) => {
            let generator = Generator::with(gpu.kernels(), config, &gpu.parameters)?;
            stream(arguments, generator, &prompt, (&tokenizer, ends))
        }
    }?;
    let Some(Made { text, tokens, ending, seconds }) = made.filter(|_| arguments.json) else { return Ok(()) };
    say(&format!(
        "{:#}\n",
        json!({
            "prompt": arguments.prompt, "text": text, "tokens": tokens, "ending": ending, "seed": arguments.seed,
            "temperature": temperature, "top_p": top_p, "device": on.device, "precision": on.precision.to_string(),
            "seconds": seconds,
            "tokens_per_second": tokens.len() as f64 / seconds,
        })
    ))
}

/// Makes the text, and shows it as it is made unless it is to be JSON; `None` if the reader has seen enough.
fn stream<K: Kernels>(
    arguments: &Arguments,
    mut generator: Generator<'_, K>,
    prompt: &[u32],
    (tokenizer, ends): (&Tokenizer, &[u32]),
) -> anyhow::Result<Option<Made>> {
    let stop = Stop::listen()?;
    let mut out = std::io::stdout().lock();
    let mut show = |piece: &str| {
        if arguments.json { Ok(()) } else { out.write_all(piece.as_bytes()).and_then(|()| out.flush()) }
    };
    let mut decoder = tokenizer.stream_decoder();
    if prompt.len() > generator.sight() {
        let (most, all) = (generator.sight(), prompt.len());
        warn!("the prompt has {all} tokens; only its last {most} are seen");
    }
    let (mut made, mut shown, mut decoding) = (Made::default(), show(&arguments.prompt), Ok(()));
    let Arguments { temperature, top_p, seed, .. } = *arguments;
    let sampling = Sampling { temperature, top_p, seed };
    let started = Instant::now();
    let ending = generator.stream(prompt, &sampling, arguments.max_new_tokens, ends, |token| {
        if let Some(token) = token {
            made.tokens.push(token);
            match decoder.push(token) {
                Ok(piece) => {
                    made.text.push_str(&piece);
                    shown = show(&piece);
                }
                Err(error) => decoding = Err(error),
            }
        }
        let is_over = shown.is_err() || decoding.is_err() || stop.is_asked();
        if is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    decoding?;
    made.seconds = started.elapsed().as_secs_f64();
    made.ending = match ending {
        Ending::Count => "count",
        Ending::StopToken(_) => "end-of-text",
        Ending::Receiver => "stopped",
    };
    let rest = decoder.finish()?;
    made.text.push_str(&rest);
    match shown.and_then(|()| show(&format!("{rest}\n"))) {
        // A reader that has seen enough, such as `head`, is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(None),
        shown => shown.map(|()| Some(made)).context("cannot print the text"),
    }
}
