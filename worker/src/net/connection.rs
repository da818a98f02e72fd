//! One connection to the server: hello, then exchanges, requests and bulk transfers.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::join::JoinString;
use sanderling_common::wire::Push;
use sanderling_common::wire::control::{
    Goodbye, Greeting, Hello, Ready, Request, Response, Start, StreamKind, Welcome,
};
use sanderling_common::wire::frame::Reply;
use sanderling_transport::{
    CloseCode, IDLE_MAX, MessageError, client_endpoint, describe, is_tls_alert, receive, receive_rest, send,
};

use super::bulk::{BulkError, Download};
use super::{Lost, WorkerError, WorkerOptions};

/// A server that does not answer the first packets is tried again after this long, or given up on when less is left.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// A goodbye is waited for this long.
const GOODBYE_WAIT: Duration = Duration::from_millis(500);

/// An established connection on which the hello has been said.
pub(super) struct Link {
    endpoint: Endpoint,
    connection: Connection,
    control: (SendStream, RecvStream),
    /// The newest server step that was announced.
    announced_step: Arc<AtomicU64>,
    session: SessionId,
}

/// How the server received the hello.
pub(super) enum Reception {
    /// It takes part in the run.
    Welcome(Link, Box<Welcome>),
    /// The run is over.
    Finished,
}

impl Link {
    /// Connects, each attempt to the next address of the host, and says hello; waits at most `patience` for the server to
    /// answer the first packets.
    pub(super) async fn open(
        join: &JoinString,
        options: &WorkerOptions,
        resume: Option<SessionId>,
        (attempt, patience): (u64, Duration),
    ) -> Result<Reception, Lost> {
        let address = resolve(join, attempt).await?;
        let endpoint = client_endpoint(address, join.pin, options.identity.as_deref(), IDLE_MAX)
            .map_err(WorkerError::Endpoint)?;
        let connecting = endpoint
            .connect(address, "sanderling")
            .map_err(|error| Lost::ForNow(format!("cannot connect to {}: {error}", join)))?;
        let connection = match tokio::time::timeout(CONNECT_WAIT.min(patience), connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(Lost::ForNow("the server does not answer".to_owned())),
        };
        let (mut up, mut down) = connection.open_bi().await?;
        up.write_all(&[StreamKind::Control as u8]).await.map_err(MessageError::from)?;
        let software = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned();
        let token = join.token.as_ref().map_or("", |token| token.reveal()).to_owned();
        send(&mut up, &Hello { token, resume, software }).await?;
        match receive(&mut down).await? {
            Greeting::Welcome(welcome) => {
                let announced_step = Arc::new(AtomicU64::new(0));
                tokio::spawn(listen_for_steps(connection.clone(), announced_step.clone()));
                let session = welcome.session;
                let control = (up, down);
                Ok(Reception::Welcome(
                    Self { endpoint, connection, control, announced_step, session },
                    welcome,
                ))
            }
            Greeting::WrongToken if join.token.is_none() => Err(WorkerError::NoToken.into()),
            Greeting::WrongToken => Err(WorkerError::WrongToken.into()),
            Greeting::Full { sessions_max } => Err(Lost::ForNow(format!(
                "the server has no room: all of its {sessions_max} places are taken"
            ))),
            Greeting::NameFull { sessions_max } => Err(Lost::ForNow(format!(
                "the server has no room: all of the {sessions_max} places that workers with this token or certificate may \
                 have are taken"
            ))),
            Greeting::Finished => {
                CloseCode::Goodbye.close(&connection, "goodbye");
                endpoint.wait_idle().await;
                Ok(Reception::Finished)
            }
        }
    }

    /// Confirms layout and initial model, and learns whether to fetch a base model (then its step) or to go on.
    pub(super) async fn confirm(&mut self, ready: Ready) -> Result<Option<Step>, Lost> {
        send(&mut self.control.0, &ready).await?;
        match receive(&mut self.control.1).await? {
            Start::Fetch { step } => Ok(Some(step)),
            Start::Resume => Ok(None),
            Start::LayoutMismatch => Err(WorkerError::LayoutMismatch.into()),
            Start::InitialMismatch => Err(WorkerError::InitialMismatch.into()),
        }
    }

    /// What is sent for a push.
    pub(super) fn frame(push: &Push) -> Vec<u8> {
        let mut frame = vec![StreamKind::Exchange as u8];
        push.encode(&mut frame);
        frame
    }

    /// One exchange.
    pub(super) async fn exchange(&self, frame: Vec<u8>, reply_bytes_max: usize) -> Result<Reply, Lost> {
        let (mut up, mut down) = self.connection.open_bi().await?;
        up.write_chunk(frame.into()).await.map_err(MessageError::from)?;
        // Finishing a stream fails only when it was already reset, which reading will report.
        let _ = up.finish();
        let bytes = receive_rest(&mut down, reply_bytes_max).await?;
        Reply::decode(&bytes)
            .map_err(|error| Lost::ForNow(format!("the server's answer is malformed: {error}")))
    }

    /// One request outside an exchange.
    pub(super) async fn request(&self, request: &Request) -> Result<Response, Lost> {
        let (mut up, mut down) = self.connection.open_bi().await?;
        up.write_all(&[StreamKind::Request as u8]).await.map_err(MessageError::from)?;
        send(&mut up, request).await?;
        let _ = up.finish();
        Ok(receive(&mut down).await?)
    }

    /// Fetches a large object; see [`Download::fetch`].
    pub(super) async fn fetch(
        &self,
        download: &mut Download,
        object: sanderling_common::wire::control::BulkObject,
        bytes_max: u64,
    ) -> Result<Vec<u8>, BulkError> {
        download.fetch(&self.connection, self.session, object, bytes_max).await
    }

    /// Tells whether the server has closed the connection because the run is over.
    pub(super) fn run_is_over(&self) -> impl Fn() -> bool + Send + 'static {
        let connection = self.connection.clone();
        move || {
            let closed = connection.close_reason();
            closed.is_some_and(|reason| CloseCode::of(&reason) == Some(CloseCode::Finished))
        }
    }

    /// The newest step that the server announced, if any announcement has arrived.
    pub(super) fn announced_step(&self) -> Option<Step> {
        Some(self.announced_step.load(Ordering::Relaxed)).filter(|&step| step > 0).map(Step)
    }

    /// Says goodbye, so that the server settles the session at once, and closes.
    pub(super) async fn goodbye(mut self) {
        if send(&mut self.control.0, &Goodbye).await.is_ok() {
            let _ = tokio::time::timeout(GOODBYE_WAIT, self.connection.closed()).await;
        }
        CloseCode::Goodbye.close(&self.connection, "goodbye");
        let _ = tokio::time::timeout(GOODBYE_WAIT, self.endpoint.wait_idle()).await;
    }
}

/// Keeps the newest step of the server's announcements (unreliable datagrams of a little-endian `u64` each).
async fn listen_for_steps(connection: Connection, newest: Arc<AtomicU64>) {
    while let Ok(datagram) = connection.read_datagram().await {
        if let Ok(bytes) = <[u8; 8]>::try_from(&datagram[..]) {
            newest.fetch_max(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }
}

async fn resolve(join: &JoinString, attempt: u64) -> Result<SocketAddr, Lost> {
    let (host, port) = (join.host.clone(), join.port);
    let found = tokio::task::spawn_blocking(move || (host.as_str(), port).to_socket_addrs()).await;
    let found = match found {
        Ok(found) => found,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is being shut down, and this task with it.
        Err(_) => return Err(Lost::ForNow("the look-up of the host was cut off".to_owned())),
    };
    let addresses: Vec<SocketAddr> = found.map_or(Vec::new(), Iterator::collect);
    // A host may have addresses that the server does not listen on, or this machine cannot reach.
    let place = attempt.checked_rem(addresses.len() as u64).unwrap_or(0);
    let address = addresses.get(place as usize).copied();
    address.ok_or_else(|| Lost::ForNow(format!("the host {} cannot be found", join.host)))
}

/// A server with another certificate or protocol, or one that refuses this worker's certificate, will be no other on the
/// next try; the last may show only after the handshake, which is over for this side before the server has looked. Anything
/// else may pass: one that refuses a connection, for example, is full of strangers or about to go.
impl From<quinn::ConnectionError> for Lost {
    fn from(error: quinn::ConnectionError) -> Self {
        match CloseCode::of(&error) {
            Some(CloseCode::Finished) => Self::Finished,
            Some(CloseCode::NotAdmitted) => WorkerError::NotAdmitted(describe(&error)).into(),
            Some(CloseCode::Revoked) => WorkerError::Revoked(describe(&error)).into(),
            None if is_tls_alert(&error) => WorkerError::Handshake(describe(&error)).into(),
            _ => Self::ForNow(describe(&error)),
        }
    }
}

impl From<MessageError> for Lost {
    fn from(error: MessageError) -> Self {
        let lost = match &error {
            MessageError::Read(quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(lost)))
            | MessageError::Write(quinn::WriteError::ConnectionLost(lost))
            | MessageError::Frame(quinn::ReadToEndError::Read(quinn::ReadError::ConnectionLost(lost))) => {
                lost
            }
            _ => return Self::ForNow(error.to_string()),
        };
        lost.clone().into()
    }
}

#[cfg(test)]
mod tests {
    use quinn::{ConnectionError, TransportErrorCode};

    use super::*;

    #[test]
    fn only_tls_errors_are_final() {
        let error = |code: TransportErrorCode| ConnectionError::TransportError(code.into());
        for alert in [42, 48, 116, 120] {
            let lost = Lost::from(error(TransportErrorCode::crypto(alert)));
            assert!(matches!(lost, Lost::ForGood(_)), "{alert}: {lost:?}");
        }
        let refused = error(TransportErrorCode::CONNECTION_REFUSED);
        for passing in [refused, ConnectionError::TimedOut, ConnectionError::Reset] {
            let lost = Lost::from(passing.clone());
            assert!(matches!(lost, Lost::ForNow(_)), "{passing}: {lost:?}");
        }
    }
}
