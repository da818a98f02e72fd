//! The join string: all that a worker needs to know.
//!
//! `sanderling://HOST:PORT?pin=SHA256&token=TOKEN`. The pin is the SHA-256 of the server's certificate and
//! authenticates the server without a certificate authority; the token admits the worker. The token comes last, so
//! that a string cut off in copying fails as a bad token or a missing one, never as a wrong host. Without a token it is
//! for servers that admit workers by client certificates, or by tokens of their own that are put behind it.

use std::fmt;
use std::str::FromStr;

const SCHEME: &str = "sanderling://";

/// Shortest token accepted, in characters; the server draws 32 hexadecimal digits.
pub const TOKEN_CHARACTERS_MIN: usize = 8;
/// Longest token accepted, in characters.
pub const TOKEN_CHARACTERS_MAX: usize = 256;

/// Where a server is, how to recognise it, and what to show it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinString {
    /// Host name or address; an IPv6 address without its brackets.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// SHA-256 of the server's certificate (DER).
    pub pin: [u8; 32],
    /// Admits the worker; none where a certificate does, or where each worker has a token of its own.
    pub token: Option<Token>,
}

/// The secret that admits a worker. It shows itself only through [`Token::reveal`], so that it cannot slip into logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token that random bytes make.
    pub fn draw(random: [u8; 16]) -> Self {
        Self(hex(&random))
    }

    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `other` is the same token, in time that does not depend on where they differ.
    pub fn matches(&self, other: &str) -> bool {
        self.0.len() == other.len()
            && self.0.bytes().zip(other.bytes()).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

impl FromStr for Token {
    type Err = JoinError;

    fn from_str(text: &str) -> Result<Self, JoinError> {
        let length_is_right = (TOKEN_CHARACTERS_MIN..=TOKEN_CHARACTERS_MAX).contains(&text.len());
        if !length_is_right || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(JoinError::Token);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What is wrong with a join string.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JoinError {
    /// Another scheme, or none.
    #[error("a join string starts with sanderling:// (copy the whole line that the server printed)")]
    Scheme,
    /// No host and port before the question mark.
    #[error("the join string has no HOST:PORT")]
    Address,
    /// No pin, or not 64 hexadecimal digits.
    #[error("the join string's pin is missing or cut off (it has 64 hexadecimal digits)")]
    Pin,
    /// A token that cannot be one.
    #[error(
        "the token is malformed or cut off (letters, digits, - and _, {TOKEN_CHARACTERS_MIN} to \
         {TOKEN_CHARACTERS_MAX} of them; it is the last part of the join string)"
    )]
    Token,
    /// A parameter nobody knows.
    #[error("the join string has an unknown part named {0}")]
    Unknown(String),
}

impl FromStr for JoinString {
    type Err = JoinError;

    fn from_str(text: &str) -> Result<Self, JoinError> {
        let rest = text.trim().strip_prefix(SCHEME).ok_or(JoinError::Scheme)?;
        let (address, query) = rest.split_once('?').ok_or(JoinError::Pin)?;
        let (host, port) = address.trim_end_matches('/').rsplit_once(':').ok_or(JoinError::Address)?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().map_err(|_| JoinError::Address)?;
        if host.is_empty() || port == 0 {
            return Err(JoinError::Address);
        }
        let (mut pin, mut token) = (None, None);
        for part in query.split('&') {
            match part.split_once('=') {
                Some(("pin", value)) => pin = Some(hex_32(value).ok_or(JoinError::Pin)?),
                Some(("token", value)) => token = Some(value.parse()?),
                _ => return Err(JoinError::Unknown(part.split('=').next().unwrap_or_default().to_owned())),
            }
        }
        Ok(Self { host: host.to_owned(), port, pin: pin.ok_or(JoinError::Pin)?, token })
    }
}

impl JoinString {
    /// The string to hand to workers; the only place where the token is written out.
    pub fn reveal(&self) -> String {
        match &self.token {
            Some(token) => format!("{self}&token={}", token.reveal()),
            None => self.to_string(),
        }
    }
}

/// The string without its token, fit for logs.
impl fmt::Display for JoinString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brackets = self.host.contains(':');
        let (open, close) = if brackets { ("[", "]") } else { ("", "") };
        write!(f, "{SCHEME}{open}{}{close}:{}?pin={}", self.host, self.port, hex(&self.pin))
    }
}

impl fmt::Debug for JoinString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinString({self})")
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hex_32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(host: &str) -> JoinString {
        JoinString {
            host: host.into(),
            port: 4433,
            pin: [0xab; 32],
            token: Some("abcdef0123456789".parse().unwrap()),
        }
    }

    #[test]
    fn round_trips() {
        for host in ["127.0.0.1", "training.example.org", "::1"] {
            let join = example(host);
            assert_eq!(join.reveal().parse::<JoinString>().unwrap(), join);
            assert!(join.reveal().ends_with("&token=abcdef0123456789"));
            let open = JoinString { token: None, ..join };
            assert_eq!(open.reveal().parse::<JoinString>().unwrap(), open);
            assert!(!open.reveal().contains("token"));
        }
    }

    #[test]
    fn never_shows_the_token_by_accident() {
        let join = example("::1");
        for text in [format!("{join}"), format!("{join:?}"), format!("{:?}", join.token)] {
            assert!(!text.contains("abcdef0123456789"), "{text}");
        }
    }

    #[test]
    fn every_truncation_is_an_error_or_another_token() {
        let whole = example("10.0.0.1").reveal();
        for cut in 0..whole.len() {
            if let Ok(join) = whole[..cut].parse::<JoinString>() {
                assert_eq!((join.host.as_str(), join.port, join.pin), ("10.0.0.1", 4433, [0xab; 32]));
                assert_ne!(join.token, example("10.0.0.1").token);
            }
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let check =
            |text: &str, expected| assert_eq!(text.parse::<JoinString>().unwrap_err(), expected, "{text}");
        check("http://x:1?pin=00", JoinError::Scheme);
        check("sanderling://x?pin=00", JoinError::Address);
        check("sanderling://x:99999?pin=00", JoinError::Address);
        check("sanderling://x:1?pin=00&token=abcdefgh", JoinError::Pin);
        check("sanderling://x:1", JoinError::Pin);
        let pin = "ab".repeat(32);
        check(&format!("sanderling://x:1?pin={pin}&"), JoinError::Unknown(String::new()));
        check(&format!("sanderling://x:1?pin={pin}&token="), JoinError::Token);
        check(&format!("sanderling://x:1?pin={pin}&token=short"), JoinError::Token);
        check(&format!("sanderling://x:1?pin={pin}&colour=red"), JoinError::Unknown("colour".into()));
    }
}
