//! `sanderling generate`: text from a checkpoint, as it is made.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::{Checkpoint, TOKENIZER_FILE};
use sanderling_common::tokenizer::Tokenizer;
use serde_json::json;
use tracing::warn;

use super::{UsageError, say};
use crate::generate::{Generator, Sampling};
use crate::work::Stop;

/// Write text that goes on from a prompt, shown as it is made
///
/// The prompt is tokenised as `transformers` would, with the special tokens that tokenizer.json says to put around a text.
/// The same model, prompt, options and seed give the same text. At the end of the model's context the older half of the
/// text is forgotten; at most 8192 tokens are seen. Generation ends at the model's end-of-text token, if it has one, or after --max-new-tokens.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling generate --model runs/NAME/checkpoint --prompt 'ROMEO:'
  sanderling generate --model mixtral --prompt 'Once' --temperature 0            # the likeliest token each time
  sanderling generate --model mixtral --prompt 'Once' --top-p 0.9 --seed 7 --max-new-tokens 500")]
pub struct Arguments {
    /// The checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What to go on from
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to make at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_new_tokens: usize,
    /// Below 1 likelier tokens are preferred, above 1 unlikelier ones; 0 takes the likeliest each time
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Draw from the fewest tokens whose probabilities sum to at least this
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 1337)]
    seed: u64,
    /// Another tokenizer.json than the checkpoint's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Print the whole as JSON instead, with the tokens and the speed
    #[arg(long)]
    json: bool,
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
    let special = checkpoint.special_tokens();
    let prompt = tokenizer.encode_prompt(&arguments.prompt)?;
    ensure!(!prompt.is_empty(), "the prompt has no tokens; give at least one character with --prompt");
    let parameters = checkpoint.load()?;
    let mut generator = Generator::new(config, &parameters)?;

    let stop = Stop::listen()?;
    let mut out = std::io::stdout().lock();
    let mut decoder = tokenizer.stream_decoder();
    let (mut text, mut tokens, mut failure) = (String::new(), Vec::new(), None);
    if !arguments.json {
        failure = out.write_all(arguments.prompt.as_bytes()).and_then(|()| out.flush()).err();
    }
    let started = Instant::now();
    let sampling = Sampling { temperature, top_p, seed: arguments.seed };
    let mut decoding = Ok(());
    if prompt.len() > generator.sight() {
        let (most, all) = (generator.sight(), prompt.len());
        warn!("the prompt has {all} tokens; only its last {most} are seen");
    }
    generator.stream(&prompt, &sampling, arguments.max_new_tokens, &special.eos, |token| {
        let Some(token) = token else {
            return if stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        };
        tokens.push(token);
        let piece = match decoder.push(token) {
            Ok(piece) => piece,
            Err(error) => {
                decoding = Err(error);
                return ControlFlow::Break(());
            }
        };
        text.push_str(&piece);
        if !arguments.json {
            failure = out.write_all(piece.as_bytes()).and_then(|()| out.flush()).err();
        }
        if failure.is_some() || stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    decoding?;
    let seconds = started.elapsed().as_secs_f64();
    let rest = decoder.finish()?;
    text.push_str(&rest);
    if let Some(error) = failure {
        // A reader that has seen enough, such as `head`, is no failure.
        let closed = error.kind() == std::io::ErrorKind::BrokenPipe;
        return if closed { Ok(()) } else { Err(error).context("cannot print the text") };
    }
    drop(out);
    if !arguments.json {
        return say(&format!("{rest}\n"));
    }
    say(&format!(
        "{:#}\n",
        json!({
            "prompt": arguments.prompt, "text": text, "tokens": tokens, "seed": arguments.seed,
            "temperature": temperature, "top_p": top_p, "seconds": seconds,
            "tokens_per_second": tokens.len() as f64 / seconds,
        })
    ))
}
