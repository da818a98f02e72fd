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
    /// The hello, or what the other side sent or took, took too long; another try may be faster.
    TooSlow = 6,
    /// The worker's token or certificate was revoked.
    Revoked = 7,
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
            Self::Revoked,
        ]
        .into_iter()
        .find(|code| VarInt::from_u32(*code as u32) == close.error_code)
    }
}

/// The QUIC transport error code of a server that does not take a connection (RFC 9000, section 20.1).
const CONNECTION_REFUSED: u64 = 0x02;

/// TLS alerts as QUIC transport error codes (RFC 9001, section 4.8), with what they mean here.
mod alert {
    pub(super) const BASE: u64 = 0x100;
    pub(super) const CERTIFICATE_EXPIRED: u64 = BASE + 45;
    pub(super) const UNKNOWN_CA: u64 = BASE + 48;
    pub(super) const DECRYPT_ERROR: u64 = BASE + 51;
    pub(super) const CERTIFICATE_REQUIRED: u64 = BASE + 116;
    pub(super) const NO_APPLICATION_PROTOCOL: u64 = BASE + 120;
    pub(super) const LAST: u64 = BASE + 255;
}

/// The QUIC transport error code of a connection that ended with one, on either side.
fn transport_code(error: &ConnectionError) -> Option<u64> {
    match error {
        ConnectionError::TransportError(error) => Some(u64::from(error.code)),
        ConnectionError::ConnectionClosed(close) => Some(u64::from(close.error_code)),
        _ => None,
    }
}

/// Whether TLS failed: the same two programs will fail again.
pub fn is_tls_alert(error: &ConnectionError) -> bool {
    transport_code(error).is_some_and(|code| (alert::BASE..=alert::LAST).contains(&code))
}

/// One sentence that says why a connection ended or could not be made.
pub fn describe(error: &ConnectionError) -> String {
    match (transport_code(error), error) {
        (Some(alert::NO_APPLICATION_PROTOCOL), _) => format!(
            "the other side speaks another version of the protocol (this one speaks {}); use the same release on both",
            String::from_utf8_lossy(sanderling_common::wire::ALPN)
        ),
        (Some(alert::CERTIFICATE_REQUIRED), _) => {
            "a client certificate is required: give the worker --certificate and --key".to_owned()
        }
        // The authorities of other fleets have the same name, so that only their signatures tell them apart.
        (Some(alert::UNKNOWN_CA | alert::DECRYPT_ERROR), _) => {
            "the client certificate is not signed by the server's client_ca".to_owned()
        }
        (Some(alert::CERTIFICATE_EXPIRED), _) => {
            "the client certificate has expired, or is not valid yet".to_owned()
        }
        (Some(CONNECTION_REFUSED), ConnectionError::ConnectionClosed(_)) => {
            "the other side takes no more connections for now, from this address or altogether".to_owned()
        }
        (_, ConnectionError::ApplicationClosed(close)) => {
            format!("closed by the other side: {}", String::from_utf8_lossy(&close.reason))
        }
        (_, ConnectionError::TimedOut) => "no answer".to_owned(),
        (_, other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use quinn::{ConnectionClose, TransportErrorCode};

    use super::*;

    #[test]
    fn what_a_worker_can_do_about_it_is_said() {
        let closed = |error_code: TransportErrorCode| {
            let close = ConnectionClose { error_code, frame_type: None, reason: Default::default() };
            ConnectionError::ConnectionClosed(close)
        };
        let check = |code: TransportErrorCode, is_final: bool, words: &str| {
            let error = closed(code);
            assert_eq!(is_tls_alert(&error), is_final, "{words}");
            assert!(describe(&error).contains(words), "{}", describe(&error));
        };
        check(TransportErrorCode::CONNECTION_REFUSED, false, "no more connections for now");
        check(TransportErrorCode::crypto(116), true, "--certificate and --key");
        check(TransportErrorCode::crypto(48), true, "not signed by");
        check(TransportErrorCode::crypto(51), true, "not signed by");
        check(TransportErrorCode::crypto(45), true, "has expired");
        check(TransportErrorCode::crypto(120), true, "same release");
    }
}
