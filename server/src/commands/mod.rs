//! What `sanderling-server` does besides serving: certificates and tokens for a fleet of workers.

mod cert;
mod token;

/// What to do instead of serving.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a small certificate authority and client certificates for a fleet of workers
    #[command(subcommand)]
    Cert(cert::Command),
    /// Give workers tokens of their own, which can be revoked while a run goes on
    #[command(subcommand)]
    Token(token::Command),
}

impl Command {
    /// Does it. What is to be used goes to standard output.
    ///
    /// # Errors
    /// Whatever keeps it from being done, in a sentence.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Cert(command) => command.run(),
            Self::Token(command) => command.run(),
        }
    }
}
