//! Who is admitted, and for how long.
//!
//! | settings | what admits a worker |
//! | --- | --- |
//! | neither `tokens_file` nor `client_ca` | the run's token, which all workers share |
//! | `tokens_file` | a token of the worker's own that the file has; the shared one is none |
//! | `client_ca`, alone or with `tokens_file` | a client certificate of that authority, unless the file says that it is revoked; tokens are not looked at |
//!
//! The file is looked at again every [`LOOK_EVERY`]. A worker whose token it does not have any more, or whose certificate
//! was revoked, loses its connection and its session at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use sanderling_common::config::ServerSettings;
use sanderling_common::join::Token;
use sanderling_transport::{ClientAuthority, ClientError, client_names};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::admission::{Name, Passes, PassesError, TokenDigest, read_text};

/// The tokens file is looked at this often, so that what it says holds after so long at the latest.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The largest file of authorities read, in bytes.
const CLIENT_CA_BYTES_MAX: u64 = 1 << 20;

/// Why nobody could be admitted as the settings say.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The tokens file cannot be used.
    #[error(transparent)]
    Passes(#[from] PassesError),
    /// The certificate of the authority cannot be read.
    #[error("cannot read the client CA {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificate of the authority cannot be used.
    #[error("the client CA {path} cannot be used: {source}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ClientError,
    },
    /// A token that would admit nobody.
    #[error(
        "{0} decides who is admitted, so that a token for all workers would admit nobody; leave one of the two out"
    )]
    TokenBeside(&'static str),
}

/// Why a peer is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error("wrong token")]
    WrongToken,
    #[error("the certificate has no DNS name to know its owner by")]
    Nameless,
    #[error("the certificate of {0} was revoked")]
    RevokedCertificate(String),
    #[error("the token of {0} was revoked")]
    RevokedToken(Name),
}

/// What a worker was admitted by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// The token that all workers share.
    Shared,
    /// A token of its own.
    Token { name: Name, digest: TokenDigest },
    /// A certificate with these names.
    Certificate { names: Vec<String> },
}

impl Pass {
    /// Whom it was given to, where that is known.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Shared => None,
            Self::Token { name, .. } => Some(name.as_str()),
            Self::Certificate { names } => names.first().map(String::as_str),
        }
    }
}

#[derive(Debug)]
enum Rule {
    Shared(Token),
    Own,
    Certificates,
}

/// The rule and the file that it goes by.
#[derive(Debug)]
pub(super) struct Admission {
    rule: Rule,
    passes: watch::Sender<Arc<Passes>>,
    /// The file, and what it said last.
    file: Option<(PathBuf, String)>,
}

impl Admission {
    /// As the settings say; `shared` is the token that admits where they say nothing.
    pub(super) fn of(settings: &ServerSettings, shared: Token) -> Result<Self, AdmissionError> {
        let rule = match (settings.client_ca.as_str(), settings.tokens_file.as_str()) {
            ("", "") => Rule::Shared(shared),
            ("", _) => Rule::Own,
            _ => Rule::Certificates,
        };
        let (file, passes) = match settings.tokens_file.as_str() {
            "" => (None, Passes::default()),
            path => {
                let path = PathBuf::from(path);
                let text = read_text(&path)?;
                let passes = Passes::parse(&text, &path)?;
                (Some((path, text)), passes)
            }
        };
        Ok(Self { rule, passes: watch::Sender::new(Arc::new(passes)), file })
    }

    /// The token that workers join with, where all have the same.
    pub(super) fn shared_token(&self) -> Option<&Token> {
        match &self.rule {
            Rule::Shared(token) => Some(token),
            Rule::Own | Rule::Certificates => None,
        }
    }

    /// What a peer that has shown this token, and gone through the handshake, is admitted by.
    pub(super) fn admit(&self, token: &str, connection: &Connection) -> Result<Pass, Denied> {
        let pass = match &self.rule {
            Rule::Shared(shared) if shared.matches(token) => Pass::Shared,
            Rule::Shared(_) => return Err(Denied::WrongToken),
            Rule::Own => {
                let passes = self.passes.borrow();
                let (name, digest) = passes.holder(token).ok_or(Denied::WrongToken)?;
                Pass::Token { name: name.clone(), digest }
            }
            Rule::Certificates => match client_names(connection) {
                names if names.is_empty() => return Err(Denied::Nameless),
                names => Pass::Certificate { names },
            },
        };
        match why_not(&self.passes.borrow(), &pass) {
            Some(denied) => Err(denied),
            None => Ok(pass),
        }
    }

    /// Waits until a pass holds no longer, if that ever happens.
    pub(super) async fn revoked(&self, pass: &Pass) -> Denied {
        let mut passes = self.passes.subscribe();
        loop {
            if let Some(denied) = why_not(&passes.borrow_and_update(), pass) {
                return denied;
            }
            if passes.changed().await.is_err() {
                // There is no file, or the server is about to end.
                std::future::pending().await
            }
        }
    }

    /// Looks at the file again and again. One that cannot be read, or makes no sense, leaves everything as it was.
    pub(super) async fn watch(&self) {
        let Some((path, text)) = &self.file else { return };
        let (mut known, mut complaint) = (text.clone(), None);
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let read = look(path.clone(), known.clone()).await;
            match read {
                Ok(None) => complaint = None,
                Ok(Some((text, passes))) => {
                    (known, complaint) = (text, None);
                    let (tokens, revoked) = (passes.names().count(), passes.revoked_certificates().count());
                    info!("{} has changed: {tokens} tokens, {revoked} revoked certificates", path.display());
                    self.passes.send_replace(Arc::new(passes));
                }
                Err(error) => {
                    let said = Some(error.to_string());
                    if complaint != said {
                        warn!("{error}; who may take part stays as it was");
                        complaint = said;
                    }
                }
            }
        }
    }
}

/// Why a pass does not hold, if it does not.
fn why_not(passes: &Passes, pass: &Pass) -> Option<Denied> {
    match pass {
        Pass::Shared => None,
        Pass::Token { name, digest } if passes.has(name, *digest) => None,
        Pass::Token { name, .. } => Some(Denied::RevokedToken(name.clone())),
        Pass::Certificate { names } => {
            passes.revoked(names).map(|name| Denied::RevokedCertificate(name.to_owned()))
        }
    }
}

/// What the file says, if it says something else than what is known.
async fn look(path: PathBuf, known: String) -> Result<Option<(String, Passes)>, PassesError> {
    let read = tokio::task::spawn_blocking(move || {
        let text = read_text(&path)?;
        if text == known {
            return Ok(None);
        }
        let passes = Passes::parse(&text, &path)?;
        Ok(Some((text, passes)))
    });
    read.await.expect("reading a file does not panic")
}

/// The authority that the settings name, if they do.
pub(super) fn client_authority(settings: &ServerSettings) -> Result<Option<ClientAuthority>, AdmissionError> {
    use std::io::Read;
    if settings.client_ca.is_empty() {
        return Ok(None);
    }
    let path = Path::new(&settings.client_ca);
    let unreadable = |source| AdmissionError::Unreadable { path: path.to_owned(), source };
    let mut pem = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(CLIENT_CA_BYTES_MAX).read_to_end(&mut pem).map_err(unreadable)?;
    let authority = ClientAuthority::from_pem(&pem);
    Ok(Some(authority.map_err(|source| AdmissionError::Authority { path: path.to_owned(), source })?))
}

/// Checks that a token for all workers that was asked for would admit them.
pub(super) fn check_token(settings: &ServerSettings, token: Option<&Token>) -> Result<(), AdmissionError> {
    let other = match (settings.client_ca.is_empty(), settings.tokens_file.is_empty()) {
        (false, _) => "client_ca",
        (true, false) => "tokens_file",
        (true, true) => return Ok(()),
    };
    if token.is_some() { Err(AdmissionError::TokenBeside(other)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use sanderling_common::config::RunConfig;

    use super::*;

    #[tokio::test]
    async fn a_file_counts_when_it_has_changed_and_makes_sense() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        std::fs::write(&path, "").unwrap();
        let settings =
            ServerSettings { tokens_file: path.display().to_string(), ..RunConfig::default().server };
        let shared: Token = "0123456789abcdef".parse().unwrap();
        let admission = Admission::of(&settings, shared).unwrap();
        assert_eq!(admission.shared_token(), None);
        assert!(look(path.clone(), String::new()).await.unwrap().is_none(), "nothing has changed");
        for nonsense in ["tokens = 3", "revoked_certificates = ['A']"] {
            std::fs::write(&path, nonsense).unwrap();
            assert!(matches!(look(path.clone(), String::new()).await, Err(PassesError::Malformed { .. })));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(look(path.clone(), String::new()).await, Err(PassesError::Missing(_))));

        let pass = Pass::Certificate { names: vec!["node-1".to_owned(), "node-2".to_owned()] };
        let watched = async {
            tokio::select! {
                () = admission.watch() => unreachable!("it looks for ever"),
                denied = admission.revoked(&pass) => denied,
            }
        };
        std::fs::write(&path, "revoked_certificates = ['node-2']").unwrap();
        assert_eq!(watched.await, Denied::RevokedCertificate("node-2".to_owned()));
    }

    #[test]
    fn a_token_for_all_is_for_runs_without_others() {
        let token: Token = "0123456789abcdef".parse().unwrap();
        let plain = RunConfig::default().server;
        assert!(check_token(&plain, Some(&token)).is_ok());
        let with_ca = ServerSettings { client_ca: "ca.pem".to_owned(), ..plain.clone() };
        let with_tokens = ServerSettings { tokens_file: "tokens.toml".to_owned(), ..plain };
        for (settings, named) in [(with_ca, "client_ca"), (with_tokens, "tokens_file")] {
            assert!(check_token(&settings, None).is_ok());
            let error = check_token(&settings, Some(&token)).unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains("0123"), "{error}");
        }
    }
}
