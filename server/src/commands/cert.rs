//! `sanderling-server cert`: a small certificate authority.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sanderling_transport::{Authority, PemPair};

use crate::admission::{Name, Passes};

/// The authority's certificate in its folder, for `client_ca`.
const CA_CERTIFICATE: &str = "ca.pem";

/// Its key, which signs; a server does not need it.
const CA_KEY: &str = "ca.key";

/// A hundred years: beyond that, dates have no form in a certificate that everybody reads.
const DAYS_MAX: i64 = 36_500;

/// What to make, or to take back.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a certificate authority: DIR/ca.pem for the server, DIR/ca.key to sign clients with
    ///
    /// A server with `--client-ca DIR/ca.pem` admits only workers that present a certificate signed by this authority; they
    /// need no token. Keep ca.key away from the server: whoever has it can admit workers. Both files are readable by their
    /// owner only, and files that exist are never overwritten.
    #[command(after_help = "\
Examples:
  sanderling-server cert ca --out fleet
  sanderling-server --client-ca fleet/ca.pem --listen 0.0.0.0:4433 --advertise training.example.org")]
    Ca {
        /// Folder for the two files; made if it is not there
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Days that its certificate is valid from now on; what counts for workers are those of their own
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
        days: u32,
    },
    /// Make a client certificate for a worker: DIR/NAME.pem and DIR/NAME.key
    ///
    /// The worker presents it with `--certificate` and `--key`. It is known by NAME in the server's log, and by NAME its
    /// certificate can be revoked. The files are readable by their owner only; files that exist are never overwritten.
    #[command(after_help = "\
Examples:
  sanderling-server cert client --ca fleet --name node-1 --out fleet
  sanderling-worker --join 'sanderling://…?pin=…' --certificate node-1.pem --key node-1.key")]
    Client {
        /// Folder of the authority, as `cert ca` made it
        #[arg(long, value_name = "DIR")]
        ca: PathBuf,
        /// Name of the worker, of letters a to z, digits, dots and hyphens
        #[arg(long)]
        name: Name,
        /// Folder for the two files; made if it is not there
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Days that it is valid from now on; a worker whose certificate has expired cannot connect any more
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
        days: u32,
    },
    /// Revoke the client certificates of a name, also while the server runs
    ///
    /// A server with `--tokens-file FILE` sends the worker away within two seconds and refuses it from then on. The name
    /// stays revoked: give the worker a certificate with another name if it is to come back.
    #[command(after_help = "\
Example:
  sanderling-server cert revoke --file fleet/tokens.toml --name node-1")]
    Revoke {
        /// The server's tokens file; made if it is not there
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Name in the certificate
        #[arg(long)]
        name: Name,
    },
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Ca { out, days } => {
                let pair = Authority::generate(days)?.to_pem();
                write_pair(&out, (CA_CERTIFICATE, CA_KEY), &pair)?;
                say(&format!("{} and {CA_KEY}, valid for {days} days", out.join(CA_CERTIFICATE).display()))
            }
            Self::Client { ca, name, out, days } => {
                let (certificate, key) = (ca.join(CA_CERTIFICATE), ca.join(CA_KEY));
                let authority = Authority::from_pem(&read(&certificate)?, &read(&key)?);
                let signed = authority.and_then(|authority| authority.sign(name.as_str(), days));
                let pair = signed.with_context(|| format!("cannot sign with {}", key.display()))?;
                let files = (format!("{name}.pem"), format!("{name}.key"));
                write_pair(&out, (&files.0, &files.1), &pair)?;
                say(&format!("{} and {}, valid for {days} days", out.join(&files.0).display(), files.1))
            }
            Self::Revoke { file, name } => {
                let is_new = Passes::edit(&file, |passes| Ok(passes.revoke_certificate(&name)))?;
                say(&format!("{name} {}", if is_new { "is revoked" } else { "was revoked already" }))
            }
        }
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot print what was done")
}

/// Writes both files, or neither.
fn write_pair(folder: &Path, (certificate, key): (&str, &str), pair: &PemPair) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let (certificate, key) = (folder.join(certificate), folder.join(key));
    write_new(&key, &pair.key)?;
    write_new(&certificate, &pair.certificate).inspect_err(|_| {
        // It was made just now.
        let _ = fs::remove_file(&key);
    })
}

/// Only the owner may read it, and nothing is overwritten.
fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow::anyhow!("{} exists already and is not overwritten; name another folder", path.display())
        }
        _ => anyhow::Error::new(error).context(format!("cannot write {}", path.display())),
    })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.with_context(|| format!("cannot write {}", path.display())).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}
