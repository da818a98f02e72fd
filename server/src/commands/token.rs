//! `sanderling-server token`: a token for each worker.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use sanderling_common::join::{JoinString, Token};

use crate::admission::{Name, Passes};

/// What to do with the tokens in a file.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a token for a worker and print it, this once: the file has its SHA-256 only
    ///
    /// A server with `--tokens-file FILE` admits the worker within two seconds, and nobody by a token that all workers
    /// share. The token goes behind the join string that the server prints, as `&token=…`; `--join` puts it there.
    #[command(after_help = "\
Examples:
  sanderling-server token add --file tokens.toml --name node-1
  sanderling-server token add --file tokens.toml --name node-2 --join 'sanderling://…?pin=…'
  sanderling-server --tokens-file tokens.toml --listen 0.0.0.0:4433 --advertise training.example.org")]
    Add {
        /// The tokens file; made if it is not there
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Name of the worker, for the server's log and for revoking: of letters a to z, digits, dots and hyphens
        #[arg(long)]
        name: Name,
        /// The join string that the server prints; the whole of the worker's is printed then
        #[arg(long, value_name = "STRING")]
        join: Option<String>,
    },
    /// Take a worker's token away, also while the server runs
    ///
    /// The server sends the worker away within two seconds, gives its batches to others and refuses the token from then on.
    #[command(after_help = "\
Example:
  sanderling-server token revoke --file tokens.toml --name node-1")]
    Revoke {
        /// The tokens file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Name of the worker
        #[arg(long)]
        name: Name,
    },
    /// Print the names that have tokens, and those whose certificates were revoked
    List {
        /// The tokens file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Add { file, name, join } => {
                let join: Option<JoinString> = join.as_deref().map(str::parse).transpose()?;
                let token = Token::draw(sanderling_transport::secure_random());
                Passes::edit(&file, |passes| passes.add(&name, &token))?;
                say(&match join {
                    Some(join) => JoinString { token: Some(token), ..join }.reveal(),
                    None => token.reveal().to_owned(),
                })
            }
            Self::Revoke { file, name } => {
                Passes::edit_existing(&file, |passes| passes.revoke(&name, &file))?;
                say(&format!("{name} is revoked"))
            }
            Self::List { file } => {
                let passes = Passes::read(&file)?;
                passes.names().try_for_each(|name| say(name.as_str()))?;
                passes
                    .revoked_certificates()
                    .try_for_each(|name| say(&format!("{name} (certificate revoked)")))
            }
        }
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot print what was done")
}
