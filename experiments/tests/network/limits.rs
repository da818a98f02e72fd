//! What is too much, or too slow: peers that flood, trickle, and never read cost the run nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, ConnectionError, Endpoint, TransportConfig, TransportErrorCode};
use sanderling_common::ids::Step;
use sanderling_common::join::JoinString;
use sanderling_common::wire::Refusal;
use sanderling_common::wire::control::StreamKind;
use sanderling_common::wire::frame::Reply;
use sanderling_transport::{CloseCode, client_tls};

use crate::peer::{Peer, first_push, frame};
use crate::support::{PATIENCE, Scene, Serving, worker};

async fn closed_as_too_slow(peer: &Peer) {
    let closed = tokio::time::timeout(PATIENCE, peer.connection.closed()).await;
    let closed = closed.expect("the server hangs up");
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::TooSlow), "{closed}");
}

/// Both a push that comes byte by byte and a stream on which nothing more comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_trickles_loses_its_connection() {
    let scene = Scene::new(5).with("[server]\nlease_ms = 1000");
    let serving = Serving::start(&scene);
    for kind in [StreamKind::Exchange, StreamKind::Request, StreamKind::Bulk] {
        let (peer, welcome) = Peer::admitted(&serving.join).await;
        let push = frame(&first_push(&peer, &welcome).await);
        let (mut up, _down) = peer.connection.open_bi().await.unwrap();
        up.write_all(&[kind as u8]).await.unwrap();
        let trickle = async {
            for byte in push {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if kind == StreamKind::Exchange && up.write_all(&[byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await
        };
        tokio::select! {
            () = trickle => {}
            () = closed_as_too_slow(&peer) => {}
        }
    }
    let report = worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(report.exchanges, 5);
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A connection on which the server may send no more than this unread.
async fn connect_narrowly(join: &JoinString, window_bytes: u32) -> (Endpoint, quinn::Connection) {
    let address: SocketAddr = format!("{}:{}", join.host, join.port).parse().unwrap();
    let mut config = ClientConfig::new(Arc::new(client_tls(join.pin, None).unwrap()));
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(window_bytes.into())
        .keep_alive_interval(Some(Duration::from_millis(200)));
    config.transport_config(Arc::new(transport));
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(config);
    let connection = endpoint.connect(address, "sanderling").unwrap().await.unwrap();
    (endpoint, connection)
}

/// The peer loses its connection, and the push that it had sent counts, once: its answer is there when it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_reads_its_answer_loses_its_connection_and_not_its_push() {
    let scene = Scene::new(5).with("[exchange]\nkeep = 1.0\nsecondary = 1.0\n[server]\nlease_ms = 8000");
    let serving = Serving::start(&scene);
    // Wide enough for the welcome, too narrow for an answer.
    let (endpoint, connection) = connect_narrowly(&serving.join, 8 << 10).await;
    let hello = Peer::hello(endpoint, connection, &serving.join, None).await;
    let (mut peer, welcome) = hello.unwrap_or_else(|greeting| panic!("not admitted: {greeting:?}"));
    peer.begin(&welcome).await;
    let push = first_push(&peer, &welcome).await;
    let (mut up, down) = peer.connection.open_bi().await.unwrap();
    up.write_all(&[StreamKind::Exchange as u8]).await.unwrap();
    up.write_all(&frame(&push)).await.unwrap();
    up.finish().unwrap();
    closed_as_too_slow(&peer).await;
    drop((peer, down));

    let (endpoint, connection) = Peer::connect(&serving.join).await;
    let hello = Peer::hello(endpoint, connection, &serving.join, Some(welcome.session)).await;
    let (mut peer, again) = hello.unwrap_or_else(|greeting| panic!("not admitted: {greeting:?}"));
    assert!(again.resumed && again.session == welcome.session);
    peer.ready(again.layout_hash, again.initial.sha256()).await;
    let reply = peer.say(StreamKind::Exchange as u8, &frame(&push)).await.expect("repeats are answered");
    assert!(reply.len() > 8 << 10, "the answer has {} bytes, which the window would have held", reply.len());
    let Reply::Answer(answer) = Reply::decode(&reply).unwrap() else { panic!("the answer was stored") };
    assert_eq!((answer.seq, answer.step), (push.seq, Step(1)));
    drop(peer);
    let report = worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(report.exchanges, 4, "the fifth was the peer's");
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A peer that is gone before its push is answered does not take the push with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_completed_though_its_connection_is_gone() {
    let mut serving = Serving::start(&Scene::new(5).with("[server]\nlease_ms = 60000"));
    let (peer, welcome) = Peer::admitted(&serving.join).await;
    let push = first_push(&peer, &welcome).await;
    let (mut up, down) = peer.connection.open_bi().await.unwrap();
    up.write_all(&[&[StreamKind::Exchange as u8][..], &frame(&push)].concat()).await.unwrap();
    up.finish().unwrap();
    // The server has all of it.
    up.stopped().await.unwrap();
    CloseCode::ServerStopping.close(&peer.connection, "gone");
    drop((peer, down));
    serving.reach(1).await;

    let (endpoint, connection) = Peer::connect(&serving.join).await;
    let hello = Peer::hello(endpoint, connection, &serving.join, Some(welcome.session)).await;
    let (mut peer, again) = hello.unwrap_or_else(|greeting| panic!("not admitted: {greeting:?}"));
    peer.ready(again.layout_hash, again.initial.sha256()).await;
    let reply = peer.say(StreamKind::Exchange as u8, &frame(&push)).await.expect("repeats are answered");
    assert!(matches!(Reply::decode(&reply).unwrap(), Reply::Answer(answer) if answer.step == Step(1)));
    drop(peer);
    serving.kill().await;
}

/// Beyond its burst an address has to wait, and whoever belongs gets in all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_handshakes_is_refused_and_a_worker_gets_in() {
    const FLOOD: usize = 400;
    let serving = Serving::start(
        &Scene::new(5).with("[run]\nworkers = 1\n[server]\nsessions_max = 1\nlease_ms = 60000"),
    );
    let address: SocketAddr = format!("{}:{}", serving.join.host, serving.join.port).parse().unwrap();
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint
        .set_default_client_config(ClientConfig::new(Arc::new(client_tls(serving.join.pin, None).unwrap())));
    let mut attempts = tokio::task::JoinSet::new();
    for _ in 0..FLOOD {
        let connecting = endpoint.connect(address, "sanderling").unwrap();
        attempts.spawn(async move { connecting.await.map(drop) });
    }
    let (mut taken, mut refused) = (0, 0);
    while let Some(attempt) = attempts.join_next().await {
        match attempt.unwrap() {
            Ok(()) => taken += 1,
            Err(ConnectionError::ConnectionClosed(close))
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(taken >= 64 && refused > 0, "{taken} were taken, {refused} refused");
    // It comes from the same address.
    assert_eq!(worker(&serving.join).await.unwrap().unwrap().exchanges, 5);
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A value that may not be applied is refused with the reason, counted, and makes no step.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_may_not_be_applied_is_refused_and_counted() {
    let scene = Scene::new(5).with("[exchange]\nkeep = 1.0\nvalues_up = 'f32'");
    let serving = Serving::start(&scene);
    let (peer, welcome) = Peer::admitted(&serving.join).await;
    let mut push = first_push(&peer, &welcome).await;
    let last = push.payload.len() - 4;
    push.payload[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    let reply = peer.say(StreamKind::Exchange as u8, &frame(&push)).await.expect("pushes are answered");
    assert_eq!(Reply::decode(&reply).unwrap(), Reply::Refused(Refusal::BadPayload));
    drop(peer);
    assert_eq!(worker(&serving.join).await.unwrap().unwrap().exchanges, 5);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.refused), (5, 1));
}
