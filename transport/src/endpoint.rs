//! UDP sockets and QUIC endpoints.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use socket2::{Domain, Protocol, Socket, Type};

use crate::clients::{ClientAuthority, ClientIdentity};
use crate::tls::{Certificate, TlsError, client_tls, server_tls};

/// Asked of the system for each direction: the default loses packets by the thousand on fast links. The system may
/// grant less, which costs retransmissions and nothing else.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// Streams one connection may have open at a time: control, an exchange, a request, a bulk transfer, and room for
/// those that are being closed.
pub const STREAMS_MAX: u32 = 16;

/// Bytes one stream may have under way unread.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// Bytes one connection may have under way unread, which bounds what a peer can make this side buffer.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// The same of a peer that is not admitted yet: room for a hello.
pub const STRANGER_WINDOW_BYTES: u32 = 64 << 10;

/// Connections that nobody has looked at yet, at a time; the server looks at once, so they are few.
const INCOMING_MAX: usize = 1024;

/// Bytes that each of them may send meanwhile: its first packets.
const INCOMING_BYTES: u64 = 16 << 10;

/// Bytes that all of them may send meanwhile.
pub const INCOMING_BYTES_TOTAL: u64 = INCOMING_BYTES * INCOMING_MAX as u64;

/// Nothing is sent more often than this to keep a connection alive; the server's lease is at least twice that.
const KEEP_ALIVE: Duration = Duration::from_millis(400);

/// However long a connection may be silent, something is sent this often: it is how a worker whose server was started again
/// learns that its connection is gone.
const KEEP_ALIVE_MAX: Duration = Duration::from_secs(2);

/// A silent connection is lost after this long at the latest, however long the server's lease is.
pub const IDLE_MAX: Duration = Duration::from_secs(60);

/// Why an endpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken, not this machine's, or not allowed.
    #[error("cannot listen on UDP {address}: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// An endpoint that accepts workers, with an authority only those with a certificate that it signed. A connection that is
/// silent for `idle`, at most [`IDLE_MAX`], is lost.
///
/// A server that was killed and is started again with the same certificate tells whoever still sends to the old one at once
/// that its connections are gone (RFC 9000, section 10.3), instead of leaving them to time out.
///
/// # Errors
/// An [`EndpointError`].
///
/// # Panics
/// Outside a tokio runtime.
pub fn server_endpoint(
    address: SocketAddr,
    certificate: &Certificate,
    clients: Option<&ClientAuthority>,
    idle: Duration,
) -> Result<Endpoint, EndpointError> {
    let mut config = ServerConfig::with_crypto(Arc::new(server_tls(certificate, clients)?));
    config.max_incoming(INCOMING_MAX).incoming_buffer_size(INCOMING_BYTES);
    config.incoming_buffer_size_total(INCOMING_BYTES_TOTAL);
    let mut transport = transport(idle);
    transport.receive_window(STRANGER_WINDOW_BYTES.into());
    config.transport_config(Arc::new(transport));
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &certificate.derived("stateless reset"));
    let mut endpoint = EndpointConfig::new(Arc::new(reset_key));
    let id_key = certificate.derived("connection ids");
    let id_key = u64::from_le_bytes(id_key[..8].try_into().expect("eight bytes"));
    endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    open(address, endpoint, Some(config))
}

/// Lets a peer that is admitted send as much at a time as any.
pub fn trust(connection: &Connection) {
    connection.set_receive_window(CONNECTION_WINDOW_BYTES.into());
}

/// An endpoint that connects to the server with this certificate pin, and presents an identity if there is one. A
/// connection that is silent for `idle`, at most [`IDLE_MAX`], is lost; it may be lost earlier, by what the server says.
///
/// # Errors
/// An [`EndpointError`].
///
/// # Panics
/// Outside a tokio runtime.
pub fn client_endpoint(
    server: SocketAddr,
    pin: [u8; 32],
    identity: Option<&ClientIdentity>,
    idle: Duration,
) -> Result<Endpoint, EndpointError> {
    let mut config = ClientConfig::new(Arc::new(client_tls(pin, identity)?));
    config.transport_config(Arc::new(transport(idle)));
    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0; 16], 0)),
    };
    let mut endpoint = open(any, EndpointConfig::default(), None)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

fn transport(idle: Duration) -> TransportConfig {
    let idle = idle.min(IDLE_MAX);
    let mut transport = TransportConfig::default();
    let idle_ms = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
    transport.max_idle_timeout(Some(VarInt::from_u32(idle_ms).into()));
    transport.keep_alive_interval(Some(KEEP_ALIVE.max(idle / 8).min(KEEP_ALIVE_MAX).min(idle / 2)));
    transport.max_concurrent_bidi_streams(STREAMS_MAX.into());
    transport.max_concurrent_uni_streams(0u32.into());
    transport.stream_receive_window(STREAM_WINDOW_BYTES.into());
    transport.receive_window(CONNECTION_WINDOW_BYTES.into());
    transport.send_window(CONNECTION_WINDOW_BYTES.into());
    transport
}

fn open(
    address: SocketAddr,
    endpoint: EndpointConfig,
    server: Option<ServerConfig>,
) -> Result<Endpoint, EndpointError> {
    let failed = |source| EndpointError::Bind { address, source };
    let socket =
        Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).map_err(failed)?;
    // A refusal leaves the system's default, which works, only slower.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.bind(&address.into()).map_err(failed)?;
    let socket: UdpSocket = socket.into();
    Endpoint::new(endpoint, server, socket, Arc::new(TokioRuntime)).map_err(failed)
}
