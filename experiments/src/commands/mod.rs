//! One module per command.

pub mod chaos;
pub(crate) mod device;
pub mod eval;
pub mod export;
pub mod generate;
pub mod inspect;
pub mod simulate;
pub mod tokenize;
pub mod train;
pub mod upcycle;

use std::io::Write;

use anyhow::Context;
use sanderling_common::checkpoint::{Checkpoint, SHARD_BYTES_DEFAULT, StoredType, TOKENIZER_FILE};
use sanderling_common::tokenizer::Tokenizer;

/// How a command that writes a checkpoint stores its values.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct StoredAs {
    /// How values are stored [default: as in the checkpoint that is read; float32 where weights are scaled exactly by
    /// what bfloat16 would round]
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<StoredType>,
    /// Bytes of values in one file; a larger model is written as shards with an index
    #[arg(long = "shard-bytes", value_name = "BYTES", default_value_t = SHARD_BYTES_DEFAULT,
          value_parser = clap::value_parser!(u64).range(1..))]
    shard_bytes_max: u64,
}

impl StoredAs {
    /// The number format: as asked for, or bfloat16 if the checkpoint has nothing else, or float32, which holds
    /// everything that is read.
    fn stored_type(&self, checkpoint: &Checkpoint) -> StoredType {
        self.stored_type_of(checkpoint, true)
    }

    /// The same for values made of those of the checkpoint; `keeps_bits` tells whether its format holds them too.
    fn stored_type_of(&self, checkpoint: &Checkpoint, keeps_bits: bool) -> StoredType {
        let bfloat16 = || keeps_bits && checkpoint.stored().values.keys().all(|format| format == "BF16");
        self.dtype.unwrap_or_else(|| if bfloat16() { StoredType::Bfloat16 } else { StoredType::Float32 })
    }
}

/// The tokenizer that a checkpoint carries, if it does, which must not have more tokens than its model.
fn checked_tokenizer(checkpoint: &Checkpoint) -> anyhow::Result<Option<Tokenizer>> {
    let path = checkpoint.directory().join(TOKENIZER_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::load(&path)?;
    tokenizer.check_fits(checkpoint.config().vocab_size)?;
    Ok(Some(tokenizer))
}

/// Prints a command's result.
pub(crate) fn say(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough, such as `head`, is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot print the result"),
    }
}

/// The command line asks for what makes no sense; the program ends with code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub(crate) String);
