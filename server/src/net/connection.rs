//! One worker's connection: hello, then a task per stream until it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Connection, Incoming, RecvStream, SendStream};
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::wire::control::{
    Goodbye, Greeting, Hello, Ready, Request, Response, Start, StreamKind, Welcome,
};
use sanderling_common::wire::frame::{Reply, WireError};
use sanderling_common::wire::{Push, Refusal};
use sanderling_transport::{
    CloseCode, MessageError, describe, read_kind, receive, receive_at_most, receive_rest, secure_random,
    send, trust,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{timeout, timeout_at};
use tracing::{debug, info, warn};

use super::bulk;
use super::hub::{Hub, OpenError, Opened};

/// A request for work is answered with nothing after this share of the lease, so that the worker asks again and both
/// sides know that the other is there.
const WORK_WAIT_SHARE: u32 = 4;

/// From the first packet to the end of the hello a peer may take this long, or a lease where that is shorter. What comes
/// after it may take any time, since a worker may have to fetch and build a large model; one that falls silent meanwhile
/// loses its connection like any other.
const HELLO_WAIT: Duration = Duration::from_secs(20);

/// The largest hello: a token and a name.
const HELLO_BYTES_MAX: usize = 4096;

/// A worker that was told to finish may take this long to close its connection.
const GOODBYE_WAIT: Duration = Duration::from_secs(2);

/// Why a connection was given up by this side.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("{}", describe(.0))]
    Connection(#[from] quinn::ConnectionError),
    #[error("the hello took too long")]
    HelloTooSlow,
    #[error("the first stream was not the control stream")]
    NoControlStream,
    #[error("not admitted: {0}")]
    NotAdmitted(&'static str),
    #[error("malformed push: {0}")]
    Push(#[from] WireError),
    #[error("a request for another session than this connection's")]
    ForeignSession,
    #[error("the answer cannot be sent: {0}")]
    Write(#[from] quinn::WriteError),
}

impl PeerError {
    /// Whether the peer broke the protocol, as opposed to the network having broken the connection.
    fn is_violation(&self) -> bool {
        match self {
            Self::Message(error) => error.is_violation(),
            Self::NoControlStream | Self::Push(_) | Self::ForeignSession => true,
            _ => false,
        }
    }

    /// What the peer is to make of it.
    fn close_code(&self) -> CloseCode {
        match self {
            Self::HelloTooSlow => CloseCode::TooSlow,
            error if error.is_violation() => CloseCode::Protocol,
            _ => CloseCode::NotAdmitted,
        }
    }
}

/// Serves one worker until its connection ends, then settles its session. `stranger` is held until the peer has shown
/// the token.
pub(super) async fn serve(hub: Arc<Hub>, incoming: Incoming, stranger: OwnedSemaphorePermit) {
    let address = incoming.remote_address();
    let deadline = Instant::now() + HELLO_WAIT.min(hub.lease());
    let connection = match timeout_at(deadline.into(), incoming.into_future()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return debug!(%address, "no connection: {}", describe(&error)),
        Err(_) => return debug!(%address, "no connection: the handshake took too long"),
    };
    let introduced = timeout_at(deadline.into(), introduce(&hub, &connection)).await;
    let (hello, mut control) = match introduced.unwrap_or(Err(PeerError::HelloTooSlow)) {
        Ok(introduced) => introduced,
        Err(error) => {
            turn_away(&connection, &error).await;
            return hub.count_closed(&connection);
        }
    };
    drop(stranger);
    let mut seat = match place(&hub, &connection, &hello, &mut control.0).await {
        Ok(seat) => seat,
        Err(error) => {
            turn_away(&connection, &error).await;
            return hub.count_closed(&connection);
        }
    };
    debug!("{} says hello: {}", seat.worker, hello.software);
    if let Err(error) = confirm(&seat, &mut control).await {
        return turn_away(&connection, &error).await;
    }
    seat.for_good = false;
    info!(%address, "{} joined", seat.worker);
    // The control stream stays open as long as the connection; its sending half is kept for that alone.
    seat.for_good = tokio::select! {
        goodbye = receive::<Goodbye>(&mut control.1) => goodbye.is_ok(),
        () = streams(&hub, &connection, seat.session) => false,
    };
    if seat.for_good {
        CloseCode::Goodbye.close(&connection, "goodbye");
    }
    info!("{} {}", seat.worker, if seat.for_good { "left" } else { "lost its connection" });
}

/// Ends a connection that is not admitted. The worker has been told in a message; it gets the time to read it.
async fn turn_away(connection: &Connection, error: &PeerError) {
    warn!(address = %connection.remote_address(), "turned away: {error}");
    let _ = timeout(GOODBYE_WAIT, connection.closed()).await;
    error.close_code().close(connection, &error.to_string());
}

/// Both halves of the control stream: down and up.
type Control = (SendStream, RecvStream);

/// The hello of a peer that has the token.
async fn introduce(hub: &Hub, connection: &Connection) -> Result<(Hello, Control), PeerError> {
    let (mut down, mut up) = connection.accept_bi().await?;
    if read_kind(&mut up).await? != StreamKind::Control {
        return Err(PeerError::NoControlStream);
    }
    let hello: Hello = receive_at_most(&mut up, HELLO_BYTES_MAX).await?;
    if !hub.token().matches(&hello.token) {
        send(&mut down, &Greeting::WrongToken).await?;
        return Err(PeerError::NotAdmitted("wrong token"));
    }
    trust(connection);
    Ok((hello, (down, up)))
}

/// A worker's place in the run. However it is left, also by a future that is dropped, its session is settled.
struct Seat<'a> {
    hub: &'a Arc<Hub>,
    connection: &'a Connection,
    session: SessionId,
    worker: WorkerId,
    /// Whether the session was there before this connection.
    resumed: bool,
    /// The step of the session's base model; none for one that has pushed already, and so has had it.
    base_step: Option<Step>,
    /// Whether the session ends with the connection: one that never began is of no use to anybody, nor is one that was
    /// said goodbye to.
    for_good: bool,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.hub.detach(self.session, self.connection, self.for_good);
    }
}

/// Finds or makes the place for a worker, or tells it why there is none.
async fn place<'a>(
    hub: &'a Arc<Hub>,
    connection: &'a Connection,
    hello: &Hello,
    down: &mut SendStream,
) -> Result<Seat<'a>, PeerError> {
    if hub.is_finished() {
        send(down, &Greeting::Finished).await?;
        hello.resume.into_iter().for_each(|session| hub.came_back(session));
        return Err(PeerError::NotAdmitted("the run is over"));
    }
    if let Some(session) = hello.resume
        && let Some(worker) = hub.resume(session, connection)
    {
        // The start of an earlier connection may have been lost on the way.
        let base_step = hub.base_step(session);
        return Ok(Seat { hub, connection, session, worker, resumed: true, base_step, for_good: false });
    }
    let session = SessionId(random_u64());
    // It is there before the session, which opening takes a while for.
    let (worker, resumed, base_step, for_good) = (WorkerId(0), false, None, true);
    let mut seat = Seat { hub, connection, session, worker, resumed, base_step, for_good };
    match hub.open(session, connection).await {
        Ok(Opened { worker, step }) => {
            (seat.worker, seat.base_step) = (worker, Some(step));
            Ok(seat)
        }
        Err(OpenError::Full { sessions_max }) => {
            send(down, &Greeting::Full { sessions_max }).await?;
            Err(PeerError::NotAdmitted("no room"))
        }
    }
}

fn random_u64() -> u64 {
    u64::from_le_bytes(secure_random())
}

/// Welcome, ready, start. Between welcome and ready the worker may have to fetch the text, so other streams are
/// served meanwhile.
async fn confirm(seat: &Seat<'_>, (down, up): &mut Control) -> Result<(), PeerError> {
    let (hub, connection) = (seat.hub, seat.connection);
    let welcome = Welcome {
        worker: seat.worker,
        session: seat.session,
        resumed: seat.resumed,
        run: hub.run().clone(),
        text_sha256: hub.corpus().sha256(),
        model: hub.model().clone(),
        initial: hub.initial().clone(),
        layout_hash: hub.layout_hash(),
    };
    send(down, &Greeting::Welcome(Box::new(welcome))).await?;
    let ready: Ready = tokio::select! {
        ready = receive(up) => ready?,
        () = streams(hub, connection, seat.session) => return Err(connection_lost(connection).into()),
    };
    if ready.layout_hash != hub.layout_hash() {
        send(down, &Start::LayoutMismatch).await?;
        return Err(PeerError::NotAdmitted(
            "its layout is not this run's; use the same release on both sides",
        ));
    }
    if ready.initial_sha256 != hub.initial().sha256() {
        send(down, &Start::InitialMismatch).await?;
        return Err(PeerError::NotAdmitted(
            "it makes another initial model; use the same release on both sides",
        ));
    }
    let start = seat.base_step.map_or(Start::Resume, |step| Start::Fetch { step });
    Ok(send(down, &start).await?)
}

fn connection_lost(connection: &Connection) -> MessageError {
    let error = connection.close_reason().unwrap_or(quinn::ConnectionError::LocallyClosed);
    MessageError::Write(quinn::WriteError::ConnectionLost(error))
}

/// Serves the streams of a connection until it ends. QUIC bounds how many a peer may have open.
async fn streams(hub: &Arc<Hub>, connection: &Connection, session: SessionId) {
    while let Ok((down, up)) = connection.accept_bi().await {
        let (hub, connection) = (hub.clone(), connection.clone());
        tokio::spawn(async move {
            if let Err(error) = stream(&hub, session, down, up).await {
                if error.is_violation() {
                    warn!("{session}: {error}");
                    CloseCode::Protocol.close(&connection, &error.to_string());
                } else {
                    debug!("{session}: {error}");
                }
            }
        });
    }
}

async fn stream(
    hub: &Arc<Hub>,
    session: SessionId,
    mut down: SendStream,
    mut up: RecvStream,
) -> Result<(), PeerError> {
    match read_kind(&mut up).await? {
        StreamKind::Control => return Err(PeerError::NoControlStream),
        StreamKind::Exchange => {
            let bytes = receive_rest(&mut up, hub.frame_bytes_max()).await?;
            let push = Push::decode(&bytes)?;
            if push.session != session {
                return Err(PeerError::ForeignSession);
            }
            let reply = exchange(hub, push).await;
            down.write_chunk(reply).await?;
        }
        StreamKind::Request => {
            let response = respond(hub, session, receive(&mut up).await?).await?;
            send(&mut down, &response).await?;
        }
        StreamKind::Bulk => {
            let request = receive(&mut up).await?;
            bulk::serve(hub, session, request, &mut down).await?;
        }
    }
    // Finishing fails only when the worker reset the stream; then nobody waits for the rest.
    let _ = down.finish();
    Ok(())
}

async fn exchange(hub: &Arc<Hub>, push: Push) -> bytes::Bytes {
    let session = push.session;
    match hub.push(push).await {
        Ok(answer) => answer,
        Err(refusal) => {
            if refusal != Refusal::InFlight {
                warn!("{session}: a push was refused: {refusal}");
            }
            {
                let mut frame = Vec::new();
                Reply::Refused(refusal).encode(&mut frame);
                frame.into()
            }
        }
    }
}

async fn respond(hub: &Arc<Hub>, session: SessionId, request: Request) -> Result<Response, PeerError> {
    let claimed = match &request {
        Request::Work(claimed) | Request::Evaluated(claimed, _) => *claimed,
    };
    if claimed != session {
        return Err(PeerError::ForeignSession);
    }
    if let Request::Evaluated(_, report) = request {
        hub.evaluated(session, &report);
    }
    let deadline = Instant::now() + hub.lease() / WORK_WAIT_SHARE;
    Ok(hub.wait_for_work(session, deadline).await.map_or(Response::UnknownSession, Response::Work))
}
