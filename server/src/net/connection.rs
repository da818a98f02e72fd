//! One worker's connection: hello, then a task per stream until it ends, or the worker may not take part any more.

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
    CloseCode, MessageError, describe, is_tls_alert, read_kind, receive, receive_at_most, secure_random,
    send, trust,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{timeout, timeout_at};
use tracing::{debug, info, warn};

use super::admission::{Denied, Pass};
use super::bulk;
use super::hub::{Hub, OpenError, Opened};
use super::pace::Pace;

/// A request for work is answered with nothing after this share of the lease, so that the worker asks again and both
/// sides know that the other is there.
const WORK_WAIT_SHARE: u32 = 4;

/// From the first packet to the end of the hello a peer may take this long, or a lease where that is shorter. What comes
/// after it may take any time, since a worker may have to fetch and build a large model; one that falls silent meanwhile
/// loses its connection like any other.
pub(super) const HELLO_WAIT: Duration = Duration::from_secs(20);

/// The largest hello: a token and a name.
pub(super) const HELLO_BYTES_MAX: usize = 4096;

/// A worker that was told to finish may take this long to close its connection.
const GOODBYE_WAIT: Duration = Duration::from_secs(2);

/// Exchanges of one connection that are read, applied and answered at a time; a worker has one anyway. Further ones wait
/// unread.
pub(super) const EXCHANGES_PER_CONNECTION: usize = 1;

/// Why a connection was given up by this side.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("{}", describe(.0))]
    Connection(#[from] quinn::ConnectionError),
    #[error("the hello took too long")]
    HelloTooSlow,
    #[error("a stream stood still for too long")]
    TooSlow,
    #[error("the first stream was not the control stream")]
    NoControlStream,
    #[error("not admitted: {0}")]
    NotAdmitted(&'static str),
    #[error(transparent)]
    Denied(#[from] Denied),
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
            Self::HelloTooSlow | Self::TooSlow => CloseCode::TooSlow,
            Self::Denied(Denied::RevokedToken(_) | Denied::RevokedCertificate(_)) => CloseCode::Revoked,
            error if error.is_violation() => CloseCode::Protocol,
            _ => CloseCode::NotAdmitted,
        }
    }
}

/// Serves one worker until its connection ends, then settles its session. `stranger` is held until the peer is admitted,
/// and a place among the members' connections from then on.
pub(super) async fn serve(
    hub: Arc<Hub>,
    incoming: Incoming,
    (stranger, members): (OwnedSemaphorePermit, Arc<Semaphore>),
) {
    let address = incoming.remote_address();
    let deadline = Instant::now() + HELLO_WAIT.min(hub.lease());
    let connection = match timeout_at(deadline.into(), incoming.into_future()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) if is_tls_alert(&error) => return warn!(%address, "turned away: {}", describe(&error)),
        Ok(Err(error)) => return debug!(%address, "no connection: {}", describe(&error)),
        Err(_) => return debug!(%address, "no connection: the handshake took too long"),
    };
    let introduced = timeout_at(deadline.into(), introduce(&hub, &connection, members)).await;
    let (hello, mut control, pass, _member) = match introduced.unwrap_or(Err(PeerError::HelloTooSlow)) {
        Ok(introduced) => introduced,
        Err(error) => {
            turn_away(&connection, &error).await;
            return hub.count_closed(&connection);
        }
    };
    drop(stranger);
    let mut seat = match place(&hub, &connection, (&hello, &pass), &mut control.0).await {
        Ok(seat) => seat,
        Err(error) => {
            turn_away(&connection, &error).await;
            return hub.count_closed(&connection);
        }
    };
    debug!("{} says hello: {}", seat.worker, hello.software);
    let revoked = hub.admission().revoked(&pass);
    tokio::pin!(revoked);
    let confirmed = tokio::select! {
        confirmed = confirm(&seat, &mut control) => confirmed,
        denied = &mut revoked => Err(denied.into()),
    };
    if let Err(error) = confirmed {
        seat.for_good |= matches!(error, PeerError::Denied(_));
        return turn_away(&connection, &error).await;
    }
    seat.for_good = false;
    match pass.name() {
        Some(name) => info!(%address, "{} joined as {name}", seat.worker),
        None => info!(%address, "{} joined", seat.worker),
    }
    // The control stream stays open as long as the connection; its sending half is kept for that alone.
    let (left, denied) = tokio::select! {
        goodbye = receive::<Goodbye>(&mut control.1) => (goodbye.is_ok(), None),
        () = streams(&seat) => (false, None),
        denied = &mut revoked => (true, Some(PeerError::from(denied))),
    };
    // The session of one that may not take part any more ends too, so that what it holds goes to others at once.
    seat.for_good = left;
    match denied {
        Some(error) => {
            error.close_code().close(&connection, &error.to_string());
            info!("{} is sent away: {error}", seat.worker);
        }
        None if seat.for_good => {
            CloseCode::Goodbye.close(&connection, "goodbye");
            info!("{} left", seat.worker);
        }
        None => info!("{} lost its connection", seat.worker),
    }
}

/// Ends a connection that is not admitted. The worker has been told in a message; it gets the time to read it.
async fn turn_away(connection: &Connection, error: &PeerError) {
    warn!(address = %connection.remote_address(), "turned away: {error}");
    // What is revoked is told by the close itself.
    if error.close_code() != CloseCode::Revoked {
        let _ = timeout(GOODBYE_WAIT, connection.closed()).await;
    }
    error.close_code().close(connection, &error.to_string());
}

/// Both halves of the control stream: down and up.
type Control = (SendStream, RecvStream);

/// A peer that is admitted: its hello, by what, and its place among the members' connections.
type Introduced = (Hello, Control, Pass, OwnedSemaphorePermit);

/// The hello of a peer that is to be admitted.
async fn introduce(
    hub: &Hub,
    connection: &Connection,
    members: Arc<Semaphore>,
) -> Result<Introduced, PeerError> {
    let (mut down, mut up) = connection.accept_bi().await?;
    if read_kind(&mut up).await? != StreamKind::Control {
        return Err(PeerError::NoControlStream);
    }
    let hello: Hello = receive_at_most(&mut up, HELLO_BYTES_MAX).await?;
    let pass = match hub.admission().admit(&hello.token, connection) {
        Ok(pass) => pass,
        Err(denied) => {
            let told = denied == Denied::WrongToken;
            let error = PeerError::from(denied);
            if told {
                send(&mut down, &Greeting::WrongToken).await?;
            } else {
                // Before the stream ends, which would be all that the worker hears.
                error.close_code().close(connection, &error.to_string());
            }
            return Err(error);
        }
    };
    let Ok(member) = members.try_acquire_owned() else {
        let sessions_max = hub.run().server.sessions_max;
        send(&mut down, &Greeting::Full { sessions_max }).await?;
        return Err(PeerError::NotAdmitted("too many connections"));
    };
    trust(connection);
    Ok((hello, (down, up), pass, member))
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
    /// Lets one exchange through at a time.
    exchanges: Arc<Semaphore>,
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
    (hello, pass): (&Hello, &Pass),
    down: &mut SendStream,
) -> Result<Seat<'a>, PeerError> {
    if hub.is_finished() {
        // The end is a decision like any other.
        hub.kept().await;
        send(down, &Greeting::Finished).await?;
        hello.resume.into_iter().for_each(|session| hub.came_back(session));
        return Err(PeerError::NotAdmitted("the run is over"));
    }
    let exchanges = Arc::new(Semaphore::new(EXCHANGES_PER_CONNECTION));
    if let Some(session) = hello.resume
        && let Some(worker) = hub.resume(session, connection)
    {
        if let Some(name) = pass.name() {
            hub.note_holder(session, name);
        }
        // The start of an earlier connection may have been lost on the way.
        let base_step = hub.base_step(session);
        let (resumed, for_good) = (true, false);
        return Ok(Seat { hub, connection, session, worker, resumed, base_step, exchanges, for_good });
    }
    let session = SessionId(random_u64());
    // It is there before the session, which opening takes a while for.
    let (worker, resumed, base_step, for_good) = (WorkerId(0), false, None, true);
    let mut seat = Seat { hub, connection, session, worker, resumed, base_step, exchanges, for_good };
    if let Some(name) = pass.name()
        && !hub.claim(session, name)
    {
        let sessions_max = hub.run().sessions_per_name();
        send(down, &Greeting::NameFull { sessions_max }).await?;
        return Err(PeerError::NotAdmitted("no room for its name"));
    }
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
    let hub = seat.hub;
    let welcome = Welcome {
        worker: seat.worker,
        session: seat.session,
        resumed: seat.resumed,
        run: hub.run().for_workers(),
        text_sha256: hub.corpus().sha256(),
        model: hub.model().clone(),
        initial: hub.initial().clone(),
        layout_hash: hub.layout_hash(),
    };
    send(down, &Greeting::Welcome(Box::new(welcome))).await?;
    let ready: Ready = tokio::select! {
        ready = receive(up) => ready?,
        () = streams(seat) => return Err(connection_lost(seat.connection).into()),
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
async fn streams(seat: &Seat<'_>) {
    let session = seat.session;
    while let Ok((down, up)) = seat.connection.accept_bi().await {
        let (hub, connection, exchanges) =
            (seat.hub.clone(), seat.connection.clone(), seat.exchanges.clone());
        tokio::spawn(async move {
            if let Err(error) = stream(&hub, session, &exchanges, (down, up)).await {
                if error.is_violation() || matches!(error, PeerError::TooSlow) {
                    warn!("{session}: {error}");
                    error.close_code().close(&connection, &error.to_string());
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
    exchanges: &Semaphore,
    (mut down, mut up): (SendStream, RecvStream),
) -> Result<(), PeerError> {
    let pace = Pace::begin(hub.lease());
    match pace.message(read_kind(&mut up)).await? {
        StreamKind::Control => return Err(PeerError::NoControlStream),
        StreamKind::Exchange => {
            let _turn = exchanges.acquire().await.expect("the semaphore is never closed");
            let bytes = Pace::begin(hub.lease()).receive_rest(&mut up, hub.frame_bytes_max()).await?;
            let push = Push::decode(&bytes)?;
            drop(bytes);
            if push.session != session {
                return Err(PeerError::ForeignSession);
            }
            let reply = exchange(hub, push).await;
            Pace::begin(hub.lease()).send(&mut down, reply).await?;
        }
        StreamKind::Request => {
            let response = respond(hub, session, pace.message(receive(&mut up)).await?).await?;
            Pace::begin(hub.lease()).message(send(&mut down, &response)).await?;
        }
        StreamKind::Bulk => {
            let request = pace.message(receive(&mut up)).await?;
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
