//! `sanderling tokenize`: texts into a token file.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use sanderling_common::beside::Beside;
use sanderling_common::corpus::TEXT_BYTES_MAX;
use sanderling_common::tokenizer::{DocumentError, Documents, END_OF_TEXT, PIECE_BYTES, Segment, Tokenizer};
use sanderling_common::tokens::{TokenSink, TokenSinkError};
use sanderling_server::progress::bytes;
use tracing::warn;

use super::UsageError;
use crate::work::Stop;

/// Text encoded at a time, in parallel where there are cores.
const BATCH_BYTES: usize = 4 * PIECE_BYTES;

/// Turn texts into a token file that `train` takes
///
/// The tokenizer is a tokenizer.json of yours, or a byte-level BPE tokenizer that is trained on the texts. It goes into
/// the token file, so that `train --text FILE` and the checkpoint it leaves need nothing else.
#[derive(Debug, clap::Args)]
#[command(
    group(clap::ArgGroup::new("vocabulary").required(true).args(["tokenizer", "train_vocab"])),
    after_help = "\
Examples:
  sanderling tokenize novel.txt --train-vocab 4096 --out novel.tok
  sanderling tokenize a.jsonl b.jsonl --field content --tokenizer tokenizer.json --out ab.tok
  sanderling train --text novel.tok"
)]
pub struct Arguments {
    /// Texts: a .txt file is one document, a .jsonl file has one a line
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// The token file to write; one that exists is replaced when the new one is complete
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The tokenizer.json to use
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Train a byte-level BPE tokenizer with a vocabulary of N on the texts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(257..=1 << 20))]
    train_vocab: Option<u32>,
    /// The field of a .jsonl line that is the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// The token between two documents [default: <|endoftext|>]; '' for none
    #[arg(long, value_name = "TOKEN")]
    separator: Option<String>,
    /// Also write the tokenizer.json to FILE
    #[arg(long, value_name = "FILE")]
    save_tokenizer: Option<PathBuf>,
    /// Print the closing line as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the inputs, the tokenizer or the places to write to, in a sentence; nothing half-written is
/// left then.
pub fn tokenize(arguments: Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let stop = Stop::listen()?;
    let inputs = Inputs::check(&arguments)?;
    // Before the long work, so that a place that cannot be written to is known at once.
    let out = create(&arguments.out)?;
    let save = arguments.save_tokenizer.as_deref().map(create).transpose()?;
    let tokenizer = match (&arguments.tokenizer, arguments.train_vocab) {
        (Some(path), _) => Tokenizer::load(path)?,
        (None, size) => train(&inputs, size.expect("clap requires one of the two"), &stop)?,
    };
    let separator = Separator::of(arguments.separator.as_deref(), &tokenizer)?;
    let sink = TokenSink::new(BufWriter::new(out), tokenizer.vocabulary_size());
    let mut work = Work {
        sink: sink.map_err(|error| cannot_write(&arguments.out, error))?,
        out: &arguments.out,
        tokenizer: &tokenizer,
        separator,
        documents: 0,
        text_bytes: 0,
    };
    work.encode(&inputs, &stop)?;
    let (tokens, documents, text_bytes) = (work.sink.count(), work.documents, work.text_bytes);
    if tokens == 0 {
        anyhow::bail!("there is no text in {}", inputs.names());
    }
    work.finish()?;
    if let Some(mut file) = save {
        let path = file.path().to_owned();
        file.write_all(tokenizer.json())
            .and_then(|()| file.place())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    report(
        &arguments,
        &Outcome {
            tokens,
            documents,
            text_bytes,
            vocabulary_size: tokenizer.vocabulary_size(),
            file_bytes: fs::metadata(&arguments.out)?.len(),
            seconds: started.elapsed().as_secs_f64(),
        },
    );
    Ok(())
}

/// What was made.
struct Outcome {
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    vocabulary_size: usize,
    file_bytes: u64,
    seconds: f64,
}

fn report(arguments: &Arguments, outcome: &Outcome) {
    let bytes_per_token = outcome.text_bytes as f64 / outcome.tokens as f64;
    let line = if arguments.json {
        serde_json::json!({
            "file": arguments.out.display().to_string(),
            "tokens": outcome.tokens,
            "documents": outcome.documents,
            "vocabulary_size": outcome.vocabulary_size,
            "text_bytes": outcome.text_bytes,
            "bytes_per_token": bytes_per_token,
            "file_bytes": outcome.file_bytes,
            "seconds": outcome.seconds,
        })
        .to_string()
    } else {
        format!(
            "{}: {} tokens of a vocabulary of {}, {bytes_per_token:.2} bytes per token, {} document{}, {}, {:.1} s",
            arguments.out.display(),
            outcome.tokens,
            outcome.vocabulary_size,
            outcome.documents,
            if outcome.documents == 1 { "" } else { "s" },
            bytes(outcome.file_bytes),
            outcome.seconds
        )
    };
    // A closed pipe on the other side is no reason to fail: the file is written.
    let _ = writeln!(std::io::stdout(), "{line}");
    if outcome.file_bytes > TEXT_BYTES_MAX {
        let (file, most) = (arguments.out.display(), bytes(TEXT_BYTES_MAX));
        warn!("{file} is larger than the {most} that a run takes: every worker downloads its text");
    }
}

fn create(path: &Path) -> anyhow::Result<Beside> {
    Beside::create(path).with_context(|| format!("cannot write {}", path.display()))
}

fn cannot_write(path: &Path, error: TokenSinkError) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("cannot write {}", path.display()))
}

/// The files to read.
struct Inputs<'a> {
    paths: &'a [PathBuf],
    field: &'a str,
    bytes: u64,
}

impl<'a> Inputs<'a> {
    /// Opens every input once, so that none is found missing after hours.
    fn check(arguments: &'a Arguments) -> anyhow::Result<Self> {
        let Arguments { inputs, field, out, save_tokenizer, .. } = arguments;
        let mut total = 0;
        for path in inputs {
            Documents::open(path, field)?;
            let metadata = fs::metadata(path);
            let metadata = metadata.with_context(|| format!("cannot read {}", path.display()))?;
            if !metadata.is_file() {
                anyhow::bail!("{} is not a file", path.display());
            }
            total += metadata.len();
        }
        let read = inputs.iter().chain(&arguments.tokenizer);
        for written in [Some(out), save_tokenizer.as_ref()].into_iter().flatten() {
            if let Some(path) = read.clone().find(|read| same(read, written)) {
                let path = path.display();
                return Err(UsageError(format!("{path} is to be read; write to another file")).into());
            }
        }
        if save_tokenizer.as_ref().is_some_and(|save| save == out) {
            return Err(UsageError("--out and --save-tokenizer name the same file".to_owned()).into());
        }
        Ok(Self { paths: inputs, field, bytes: total })
    }

    fn segments(&self) -> impl Iterator<Item = Result<Segment, DocumentError>> + Send + use<'_> {
        self.paths.iter().flat_map(|path| match Documents::open(path, self.field) {
            Ok(documents) => Either::Documents(Box::new(documents)),
            Err(error) => Either::Failure(Some(error)),
        })
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.paths.iter().map(|path| path.display().to_string()).collect();
        names.join(", ")
    }

    /// A bar over the bytes read, on standard error; cleared when it is dropped.
    fn bar(&self, message: &'static str) -> ProgressBar {
        let style = ProgressStyle::with_template("{msg} {bar:40} {bytes} of {total_bytes}, {eta} left");
        let bar = ProgressBar::new(self.bytes).with_finish(ProgressFinish::AndClear);
        bar.set_style(style.expect("the template is valid"));
        bar.set_message(message);
        bar
    }
}

/// The segments of a file, or why there are none.
enum Either {
    Documents(Box<Documents>),
    Failure(Option<DocumentError>),
}

impl Iterator for Either {
    type Item = Result<Segment, DocumentError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Documents(documents) => documents.next(),
            Self::Failure(error) => error.take().map(Err),
        }
    }
}

fn same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// Ctrl-C was pressed.
#[derive(Debug, thiserror::Error)]
#[error("stopped; nothing was written")]
struct Stopped;

fn train(inputs: &Inputs<'_>, vocabulary_size: u32, stop: &Stop) -> anyhow::Result<Tokenizer> {
    let bar = inputs.bar("reading for the tokenizer");
    let mut failure = None;
    let texts = inputs.segments().map_while(|segment| match segment {
        Ok(_) if stop.is_asked() => None,
        Ok(segment) => {
            bar.inc(segment.read_bytes);
            Some(segment.text)
        }
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    let tokenizer = Tokenizer::train(texts, vocabulary_size as usize);
    match failure {
        Some(error) => Err(error.into()),
        None if stop.is_asked() => Err(Stopped.into()),
        None => Ok(tokenizer?),
    }
}

/// What goes between two documents.
enum Separator {
    Token(u32),
    Nothing,
    /// Nothing was said, and the tokenizer does not have the usual token.
    Unknown,
}

impl Separator {
    fn of(asked: Option<&str>, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        Ok(match asked {
            None => tokenizer.token(END_OF_TEXT).map_or(Self::Unknown, Self::Token),
            Some("") => Self::Nothing,
            Some(text) => match tokenizer.token(text) {
                Some(token) => Self::Token(token),
                None => anyhow::bail!("the tokenizer has no token {text:?} to separate documents"),
            },
        })
    }
}

/// Encoding under way.
struct Work<'a> {
    sink: TokenSink<BufWriter<Beside>>,
    out: &'a Path,
    tokenizer: &'a Tokenizer,
    separator: Separator,
    documents: u64,
    text_bytes: u64,
}

impl Work<'_> {
    fn encode(&mut self, inputs: &Inputs<'_>, stop: &Stop) -> anyhow::Result<()> {
        let bar = inputs.bar("tokenizing");
        let (mut batch, mut batch_bytes) = (Vec::new(), 0);
        for segment in inputs.segments() {
            let segment = segment?;
            bar.inc(segment.read_bytes);
            batch_bytes += segment.text.len();
            batch.push(segment);
            if batch_bytes >= BATCH_BYTES {
                if stop.is_asked() {
                    return Err(Stopped.into());
                }
                self.push(&batch)?;
                batch.clear();
                batch_bytes = 0;
            }
        }
        self.push(&batch)
    }

    fn push(&mut self, batch: &[Segment]) -> anyhow::Result<()> {
        let texts: Vec<&str> = batch.iter().map(|segment| segment.text.as_str()).collect();
        let encoded = self.tokenizer.encode_each(&texts)?;
        for (segment, tokens) in batch.iter().zip(&encoded) {
            if segment.begins && self.documents > 0 {
                self.separate()?;
            }
            self.documents += u64::from(segment.begins);
            self.text_bytes += segment.text.len() as u64;
            self.sink.push(tokens).map_err(|error| cannot_write(self.out, error))?;
        }
        Ok(())
    }

    fn separate(&mut self) -> anyhow::Result<()> {
        match self.separator {
            Separator::Token(token) => {
                self.sink.push(&[token]).map_err(|error| cannot_write(self.out, error))
            }
            Separator::Nothing => Ok(()),
            Separator::Unknown => anyhow::bail!(
                "there are several documents, but the tokenizer has no token {END_OF_TEXT} to separate them; name one \
                 with --separator, or none with --separator ''"
            ),
        }
    }

    fn finish(self) -> anyhow::Result<()> {
        let file = self.sink.finish(Some(self.tokenizer.json()));
        let file = file.map_err(|error| cannot_write(self.out, error))?;
        (file.into_inner().map_err(std::io::IntoInnerError::into_error))
            .and_then(Beside::place)
            .with_context(|| format!("cannot write {}", self.out.display()))
    }
}
