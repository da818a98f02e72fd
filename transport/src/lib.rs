//! How both ends use QUIC: certificates, pins and client certificates, endpoints, messages on streams, and why a
//! connection is closed; and how all programs end on a signal.
//!
//! Server and worker never depend on each other, and `common` knows no network; what the two ends of a connection
//! must agree on about QUIC itself lives here. What the bytes mean is `sanderling_common::wire`.

mod clients;
mod close;
mod endpoint;
mod interrupt;
mod message;
mod tls;

pub use clients::{Authority, ClientAuthority, ClientError, ClientIdentity, PemPair, client_names};
pub use close::{CloseCode, describe, is_tls_alert};
pub use endpoint::{
    CONNECTION_WINDOW_BYTES, EndpointError, IDLE_MAX, INCOMING_BYTES_TOTAL, STRANGER_WINDOW_BYTES,
    STREAMS_MAX, client_endpoint, server_endpoint, trust,
};
pub use interrupt::stop_on_interrupt;
pub use message::{MessageError, read_kind, receive, receive_at_most, receive_rest, send};
pub use tls::{Certificate, TlsError, client_tls, secure_random, server_tls};
