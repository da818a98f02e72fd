//! One worker's connection: hello, then a task per stream until it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Connection, Incoming, RecvStream, SendStream};
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::wire::control::{
    Goodbye, Greeting, Hello, Initial, Ready, Request, Response, Start, StreamKind, Welcome,
};
use sanderling_common::wire::frame::{Reply, WireError};
use sanderling_common::wire::{Push, Refusal};
use sanderling_transport::{CloseCode, MessageError, describe, read_kind, receive, receive_rest, send};
use tracing::{debug, info, warn};

use super::bulk;
use super::hub::{Hub, OpenError, Opened};

/// A request for work is answered with nothing after this share of the lease, so that the worker asks again and both
/// sides know that the other is there.
const WORK_WAIT_SHARE: u32 = 4;

/// A worker that was told to finish may take this long to close its connection.
const GOODBYE_WAIT: Duration = Duration::from_secs(2);

/// Why a connection was given up by this side.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("{}", describe(.0))]
    Connection(#[from] quinn::ConnectionError),
    #[error("the hello took longer than the lease")]
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
}

/// Serves one worker until its connection ends, then settles its session.
pub(super) async fn serve(hub: Arc<Hub>, incoming: Incoming) {
    let address = incoming.remote_address();
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => return debug!(%address, "no connection: {}", describe(&error)),
    };
    let greeted = tokio::time::timeout(hub.lease(), greet(&hub, &connection)).await;
    let admitted = match greeted.unwrap_or(Err(PeerError::HelloTooSlow)) {
        Ok(admitted) => admitted,
        Err(error) => {
            warn!(%address, "turned away: {error}");
            // The worker has been told in a message; give it the time to read it.
            let _ = tokio::time::timeout(GOODBYE_WAIT, connection.closed()).await;
            let code = if error.is_violation() { CloseCode::Protocol } else { CloseCode::NotAdmitted };
            code.close(&connection, &error.to_string());
            return hub.count_closed(&connection);
        }
    };
    let Admitted { session, worker, mut control } = admitted;
    info!(%address, "{worker} joined");
    let said_goodbye = tokio::select! {
        goodbye = receive::<Goodbye>(&mut control.1) => goodbye.is_ok(),
        () = streams(&hub, &connection, session) => false,
    };
    if said_goodbye {
        CloseCode::Goodbye.close(&connection, "goodbye");
    }
    hub.detach(session, &connection, said_goodbye);
    info!("{worker} {}", if said_goodbye { "left" } else { "lost its connection" });
}

struct Admitted {
    session: SessionId,
    worker: WorkerId,
    // The stream stays open as long as the connection; its sending half is kept for that alone.
    control: (SendStream, RecvStream),
}

/// Hello, welcome, ready, start.
async fn greet(hub: &Arc<Hub>, connection: &Connection) -> Result<Admitted, PeerError> {
    let (mut down, mut up) = connection.accept_bi().await?;
    if read_kind(&mut up).await? != StreamKind::Control {
        return Err(PeerError::NoControlStream);
    }
    let hello: Hello = receive(&mut up).await?;
    let place = match place(hub, connection, &hello).await {
        Ok(place) => place,
        Err((greeting, reason)) => {
            send(&mut down, &greeting).await?;
            return Err(PeerError::NotAdmitted(reason));
        }
    };
    let (session, worker) = (place.session, place.worker);
    debug!("{worker} says hello: {}", hello.software);
    let resumed = place.new_from.is_none();
    let confirmed = confirm(hub, connection, &place, (&mut down, &mut up)).await;
    match confirmed {
        Ok(()) => Ok(Admitted { session, worker, control: (down, up) }),
        Err(error) => {
            // A session that never began is of no use to anybody.
            hub.detach(session, connection, !resumed);
            Err(error)
        }
    }
}

/// A worker's place in the run.
struct Place {
    session: SessionId,
    worker: WorkerId,
    /// The step of the base model of a session that begins; none for one that is resumed.
    new_from: Option<Step>,
}

/// Finds or makes the place for a worker, or says why there is none.
async fn place(
    hub: &Arc<Hub>,
    connection: &Connection,
    hello: &Hello,
) -> Result<Place, (Greeting, &'static str)> {
    if !hub.token().matches(&hello.token) {
        return Err((Greeting::WrongToken, "wrong token"));
    }
    if hub.is_finished() {
        return Err((Greeting::Finished, "the run is over"));
    }
    if let Some(session) = hello.resume
        && let Some(worker) = hub.resume(session, connection)
    {
        return Ok(Place { session, worker, new_from: None });
    }
    match hub.open(connection).await {
        Ok(Opened { session, worker, step }) => Ok(Place { session, worker, new_from: Some(step) }),
        Err(OpenError::Full { sessions_max }) => Err((Greeting::Full { sessions_max }, "no room")),
    }
}

/// Welcome, ready, start. Between welcome and ready the worker may have to fetch the text, so other streams are
/// served meanwhile.
async fn confirm(
    hub: &Arc<Hub>,
    connection: &Connection,
    place: &Place,
    (down, up): (&mut SendStream, &mut RecvStream),
) -> Result<(), PeerError> {
    let welcome = Welcome {
        worker: place.worker,
        session: place.session,
        resumed: place.new_from.is_none(),
        run: hub.run().clone(),
        text_sha256: hub.corpus().sha256(),
        model: hub.model().clone(),
        initial: hub.initial().clone(),
        layout_hash: hub.layout_hash(),
    };
    send(down, &Greeting::Welcome(Box::new(welcome))).await?;
    let ready: Ready = tokio::select! {
        ready = receive(up) => ready?,
        () = streams(hub, connection, place.session) => return Err(connection_lost(connection).into()),
    };
    if ready.layout_hash != hub.layout_hash() {
        send(down, &Start::LayoutMismatch).await?;
        return Err(PeerError::NotAdmitted(
            "its layout is not this run's; use the same release on both sides",
        ));
    }
    let made = match hub.initial() {
        Initial::Sent => None,
        Initial::Upcycled(upcycling) => Some(upcycling.sha256),
    };
    if ready.initial_sha256 != made {
        send(down, &Start::InitialMismatch).await?;
        return Err(PeerError::NotAdmitted(
            "it upcycles to another model; use the same release on both sides",
        ));
    }
    let start = place.new_from.map_or(Start::Resume, |step| Start::Fetch { step });
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
        hub.evaluated(&report);
    }
    let deadline = Instant::now() + hub.lease() / WORK_WAIT_SHARE;
    Ok(hub.wait_for_work(session, deadline).await.map_or(Response::UnknownSession, Response::Work))
}
