//! Why a connection is closed, as a code for programs and a sentence for people.

use quinn::{Connection, ConnectionError, VarInt};

/// The application error code of a closed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// The worker leaves of its own accord.
    Goodbye = 0,
    /// The run is over.
    Finished = 1,
    /// The other side sent something that the protocol does not allow.
    Protocol = 2,
    /// The worker was not admitted: wrong token, no room, or another layout.
    NotAdmitted = 3,
    /// The session went on over another connection.
    Replaced = 4,
    /// The server stops before the run is over.
    ServerStopping = 5,
    /// The hello took too long; another try may be faster.
    TooSlow = 6,
}

impl CloseCode {
    /// Closes the connection with this code and a reason for the other side's log.
    pub fn close(self, connection: &Connection, reason: &str) {
        connection.close(VarInt::from_u32(self as u32), reason.as_bytes());
    }

    /// The code with which the other side closed the connection, if it did and the code is known.
    pub fn of(error: &ConnectionError) -> Option<Self> {
        let ConnectionError::ApplicationClosed(close) = error else { return None };
        [
            Self::Goodbye,
            Self::Finished,
            Self::Protocol,
            Self::NotAdmitted,
            Self::Replaced,
            Self::ServerStopping,
            Self::TooSlow,
        ]
        .into_iter()
        .find(|code| VarInt::from_u32(*code as u32) == close.error_code)
    }
}

/// The TLS alert for "no common application protocol", as a QUIC transport error code (RFC 9001, section 4.8).
const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

/// One sentence that says why a connection ended or could not be made.
pub fn describe(error: &ConnectionError) -> String {
    let code = match error {
        ConnectionError::TransportError(error) => Some(u64::from(error.code)),
        ConnectionError::ConnectionClosed(close) => Some(u64::from(close.error_code)),
        _ => None,
    };
    match error {
        _ if code == Some(NO_APPLICATION_PROTOCOL) => format!(
            "the other side speaks another version of the protocol (this one speaks {}); use the same release on both",
            String::from_utf8_lossy(sanderling_common::wire::ALPN)
        ),
        ConnectionError::ApplicationClosed(close) => {
            format!("closed by the other side: {}", String::from_utf8_lossy(&close.reason))
        }
        ConnectionError::TimedOut => "no answer".to_owned(),
        other => other.to_string(),
    }
}
