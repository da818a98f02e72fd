//! Peers that say whatever a test wants them to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::join::JoinString;
use sanderling_common::layout::LayoutHash;
use sanderling_common::wire::control::{
    Greeting, Hello, Ready, Request, Response, Start, StreamKind, Welcome,
};
use sanderling_common::wire::{Push, Work};
use sanderling_transport::{client_endpoint, receive, send};
use sanderling_worker::core::{WorkerCore, WorkerSettings};

/// A connection on which anything can be said.
pub(crate) struct Peer {
    pub(crate) connection: Connection,
    // Both keep the connection open.
    control: (SendStream, RecvStream),
    _endpoint: Endpoint,
}

impl Peer {
    pub(crate) async fn connect(join: &JoinString) -> (Endpoint, Connection) {
        let address: SocketAddr = format!("{}:{}", join.host, join.port).parse().unwrap();
        let endpoint = client_endpoint(address, join.pin, None, Duration::from_secs(10)).unwrap();
        let connection = endpoint.connect(address, "sanderling").unwrap().await.unwrap();
        (endpoint, connection)
    }

    /// Says hello properly, and does not get ready. Returns how it was greeted instead, if it was not welcome.
    pub(crate) async fn hello(
        endpoint: Endpoint,
        connection: Connection,
        join: &JoinString,
        resume: Option<SessionId>,
    ) -> Result<(Self, Welcome), Greeting> {
        let (mut up, mut down) = connection.open_bi().await.unwrap();
        up.write_all(&[StreamKind::Control as u8]).await.unwrap();
        let token = join.token.as_ref().map_or("", |token| token.reveal()).to_owned();
        send(&mut up, &Hello { token, resume, software: "a test".to_owned() }).await.unwrap();
        match receive(&mut down).await.unwrap() {
            Greeting::Welcome(welcome) => {
                Ok((Self { connection, control: (up, down), _endpoint: endpoint }, *welcome))
            }
            greeting => Err(greeting),
        }
    }

    pub(crate) async fn welcomed(join: &JoinString) -> (Self, Welcome) {
        let (endpoint, connection) = Self::connect(join).await;
        let welcomed = Self::hello(endpoint, connection, join, None).await;
        welcomed.unwrap_or_else(|greeting| panic!("not admitted: {greeting:?}"))
    }

    /// Gets ready too.
    pub(crate) async fn admitted(join: &JoinString) -> (Self, Welcome) {
        let (mut peer, welcome) = Self::welcomed(join).await;
        peer.begin(&welcome).await;
        (peer, welcome)
    }

    pub(crate) async fn begin(&mut self, welcome: &Welcome) {
        let start = self.ready(welcome.layout_hash, welcome.initial.sha256()).await;
        assert!(matches!(start, Start::Fetch { .. }));
    }

    /// Says what it has made of the server's description.
    pub(crate) async fn ready(&mut self, layout_hash: LayoutHash, initial_sha256: Option<[u8; 32]>) -> Start {
        let (up, down) = &mut self.control;
        send(up, &Ready { layout_hash, initial_sha256 }).await.unwrap();
        receive(down).await.unwrap()
    }

    /// Asks for work.
    pub(crate) async fn work(&self, welcome: &Welcome) -> Work {
        let request = encoded(&Request::Work(welcome.session));
        let response = self.say(StreamKind::Request as u8, &request).await.expect("work is handed out");
        let Response::Work(work) = decode_message(&response) else { panic!("the session exists") };
        work
    }

    /// Opens a stream of a kind and sends bytes on it; returns what comes back, if anything does.
    pub(crate) async fn say(&self, kind: u8, bytes: &[u8]) -> Option<Vec<u8>> {
        let (mut up, mut down) = self.connection.open_bi().await.ok()?;
        up.write_all(&[kind]).await.ok()?;
        // The server may have given up on the connection before all was sent.
        up.write_all(bytes).await.ok()?;
        up.finish().ok()?;
        down.read_to_end(1 << 20).await.ok()
    }
}

/// The first push of a worker that has the initial model.
pub(crate) async fn first_push(peer: &Peer, welcome: &Welcome) -> Push {
    let layout = Arc::new(welcome.model.layout().unwrap());
    let settings = WorkerSettings::from(&welcome.run);
    let initial = vec![0.0; layout.len()];
    let mut core = WorkerCore::new(layout.clone(), &settings, welcome.session, initial, Step(0));
    core.add_work(&peer.work(welcome).await).unwrap();
    let batch = core.next_batch().expect("batches are left");
    core.view();
    let gradient: Vec<f32> = (0..layout.len()).map(|index| 1e-3 + 1e-6 * (index % 97) as f32).collect();
    core.handle_gradient(batch, &gradient, 4.0, 0.0, 64, 0).unwrap();
    core.pending().expect("a push was made").clone()
}

pub(crate) fn frame(push: &Push) -> Vec<u8> {
    let mut frame = Vec::new();
    push.encode(&mut frame);
    frame
}

pub(crate) fn encoded(message: &impl serde::Serialize) -> Vec<u8> {
    sanderling_common::wire::control::encode(message)
}

/// A control message as it comes over a stream, after its length.
pub(crate) fn decode_message<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> T {
    sanderling_common::wire::control::decode(&bytes[4..]).unwrap()
}
