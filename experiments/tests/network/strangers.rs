//! Workers that do not belong, and peers that do not keep to the protocol.

use std::sync::Arc;
use std::time::Duration;

use sanderling_common::ids::{BatchId, Seq, SessionId, Step};
use sanderling_common::join::JoinString;
use sanderling_common::layout::LayoutHash;
use sanderling_common::wire::control::{BulkHeader, BulkObject, BulkRequest, Request, Start, StreamKind};
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Push, Refusal};
use sanderling_transport::CloseCode;
use sanderling_worker::core::{WorkerCore, WorkerSettings};
use sanderling_worker::net::{WorkerError, WorkerOptions, work};
use tokio::sync::watch;

use crate::peer::{Peer, encoded};
use crate::support::{PATIENCE, Scene, Serving, options, worker};

async fn join_with(join: &JoinString, options: WorkerOptions) -> WorkerError {
    let (_stop, stopped) = watch::channel(false);
    let joined = tokio::time::timeout(PATIENCE, work(join, &options, stopped));
    joined.await.expect("a worker that cannot join says so").expect_err("it cannot join")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_or_certificate_is_refused_at_once() {
    let scene = Scene::new(5);
    let serving = Serving::start(&scene);
    let wrong_token = JoinString { token: Some("0123456789abcdef".parse().unwrap()), ..serving.join.clone() };
    let error = join_with(&wrong_token, options()).await;
    assert!(matches!(error, WorkerError::WrongToken), "{error}");

    let mut wrong_pin = serving.join.clone();
    wrong_pin.pin[0] ^= 1;
    let error = join_with(&wrong_pin, options()).await;
    assert!(matches!(error, WorkerError::Handshake(_)), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");

    // The run is none the worse.
    worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_server_gives_up_in_the_end() {
    let scene = Scene::new(5);
    let join = scene.server().join().clone();
    let options = WorkerOptions { give_up_after: Duration::from_millis(300), ..options() };
    let error = join_with(&join, options).await;
    assert!(matches!(error, WorkerError::GaveUp { .. }), "{error}");
    assert!(!error.to_string().contains(join.token.unwrap().reveal()), "the token is in {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker_too_many_waits_for_a_place() {
    let scene = Scene::new(5).with("[run]\nworkers = 1\n[server]\nsessions_max = 1");
    let serving = Serving::start(&scene);
    let (peer, _) = Peer::admitted(&serving.join).await;
    let options = WorkerOptions { give_up_after: Duration::from_millis(300), ..options() };
    let error = join_with(&serving.join, options).await;
    assert!(error.to_string().contains("no room"), "{error}");
    drop(peer);
    worker(&serving.join).await.unwrap().unwrap();
    serving.outcome().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn getting_ready_may_take_longer_than_the_lease_and_giving_up_on_it_frees_the_place() {
    let scene = Scene::new(5).with("[run]\nworkers = 1\n[server]\nsessions_max = 1\nlease_ms = 1000");
    let serving = Serving::start(&scene);
    let (mut slow, welcome) = Peer::welcomed(&serving.join).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    slow.begin(&welcome).await;
    // Its session began, so it goes on for a while; then there is room for one that never begins.
    drop(slow);
    let stalled = loop {
        let (endpoint, connection) = Peer::connect(&serving.join).await;
        if let Ok(stalled) = Peer::hello(endpoint, connection, &serving.join, None).await {
            break stalled;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    drop(stalled);
    let report = worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(report.exchanges, 5);
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_says_no_hello_is_hung_up_on() {
    let scene = Scene::new(5).with("[server]\nlease_ms = 1000");
    let serving = Serving::start(&scene);
    let (_endpoint, connection) = Peer::connect(&serving.join).await;
    let closed = tokio::time::timeout(PATIENCE, connection.closed()).await.expect("the server hangs up");
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::TooSlow), "{closed}");
    worker(&serving.join).await.unwrap().unwrap();
    serving.outcome().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gives_up_on_a_silent_server_when_it_said_it_would() {
    // It takes whatever comes and says nothing.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let scene = Scene::new(5);
    let mut join = Serving::start(&scene).join;
    join.port = silent.local_addr().unwrap().port();
    let options = WorkerOptions { give_up_after: Duration::from_secs(1), ..options() };
    let error = join_with(&join, options).await;
    // One wait for the first packets alone takes ten seconds where nothing bounds it.
    assert!(matches!(error, WorkerError::GaveUp { seconds: ..8, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_the_connection_and_nothing_else() {
    let scene = Scene::new(5);
    let serving = Serving::start(&scene);
    // Instead of a hello.
    for garbage in [&[][..], &[9], &[1], &[1, 255, 255, 255, 255], &[1, 4, 0, 0, 0, 1, 2, 3, 4], &[2, 1, 2]] {
        let (_endpoint, connection) = Peer::connect(&serving.join).await;
        let (mut up, _down) = connection.open_bi().await.unwrap();
        up.write_all(garbage).await.unwrap();
        up.finish().unwrap();
        tokio::time::timeout(PATIENCE, connection.closed()).await.expect("the server hangs up");
    }
    // After a proper hello.
    let long = vec![0xa5; 1 << 16];
    for (kind, bytes) in
        [(2, &b"not a push"[..]), (2, &long), (3, &[0xff; 40]), (4, &[1, 0, 0, 0, 77]), (1, &[]), (77, &[])]
    {
        let (peer, _) = Peer::admitted(&serving.join).await;
        assert_eq!(peer.say(kind, bytes).await.filter(|answer| !answer.is_empty()), None, "kind {kind}");
        let closed = tokio::time::timeout(PATIENCE, peer.connection.closed());
        closed.await.expect("the server hangs up");
    }
    worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A worker that never heard how its session starts hears it when it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_lost_is_told_again() {
    let scene = Scene::new(5);
    let serving = Serving::start(&scene);
    let (peer, first) = Peer::admitted(&serving.join).await;
    drop(peer);
    let (endpoint, connection) = Peer::connect(&serving.join).await;
    let hello = Peer::hello(endpoint, connection, &serving.join, Some(first.session)).await;
    let (mut peer, again) = hello.unwrap_or_else(|greeting| panic!("not admitted: {greeting:?}"));
    assert!(again.resumed && again.session == first.session);
    let start = peer.ready(again.layout_hash, again.initial.sha256()).await;
    assert_eq!(start, Start::Fetch { step: Step(0) });
    drop(peer);
    worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A program that lays the model out otherwise, or initialises it otherwise, takes no part.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_makes_another_model_is_sent_away() {
    let scene = Scene::new(5);
    let serving = Serving::start(&scene);
    let (mut peer, welcome) = Peer::welcomed(&serving.join).await;
    let start = peer.ready(LayoutHash([0; 32]), welcome.initial.sha256()).await;
    assert_eq!(start, Start::LayoutMismatch);
    for other in [None, Some([0; 32])] {
        let (mut peer, welcome) = Peer::welcomed(&serving.join).await;
        assert_eq!(peer.ready(welcome.layout_hash, other).await, Start::InitialMismatch);
    }
    worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_cannot_speak_for_another_session() {
    let scene = Scene::new(5);
    let serving = Serving::start(&scene);
    let (victim, welcome) = Peer::admitted(&serving.join).await;
    let push = Push {
        session: welcome.session,
        seq: Seq(1),
        batch: BatchId(0),
        step: Step(0),
        loss: 1.0,
        tokens: 1,
        dropped: 0.0,
        known_staleness: 0,
        skipped: true,
        replica_hash: None,
        payload: Vec::new(),
    };
    let mut frame = Vec::new();
    push.encode(&mut frame);
    let (thief, own) = Peer::admitted(&serving.join).await;
    assert_ne!(own.session, welcome.session);
    assert_eq!(thief.say(StreamKind::Exchange as u8, &frame).await.filter(|answer| !answer.is_empty()), None);
    tokio::time::timeout(PATIENCE, thief.connection.closed()).await.expect("the server hangs up");

    let (thief, own) = Peer::admitted(&serving.join).await;
    let request = encoded(&Request::Work(welcome.session));
    assert_eq!(
        thief.say(StreamKind::Request as u8, &request).await.filter(|answer| !answer.is_empty()),
        None
    );
    assert_ne!(own.session, SessionId(0));

    // A bulk request for another's base, or from beyond the end, is answered with nothing.
    let (peer, own) = Peer::admitted(&serving.join).await;
    for (session, offset) in [(welcome.session, 0), (own.session, u64::MAX)] {
        let request = encoded(&BulkRequest { session, object: BulkObject::Base, offset });
        let answer = peer.say(StreamKind::Bulk as u8, &request).await.expect("bulk requests are answered");
        assert_eq!(answer, encoded(&BulkHeader::NotFound));
    }
    drop((peer, victim));
    worker(&serving.join).await.unwrap().unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A push made from another model than the server's replica is applied once, and noted; its session ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_from_the_wrong_model_is_refused_and_costs_the_run_nothing() {
    let scene = Scene::new(6).with("[exchange]\nreplica_check_every = 1\n[training]\neval_every = 1");
    let serving = Serving::start(&scene);
    let (peer, welcome) = Peer::admitted(&serving.join).await;
    let layout = Arc::new(welcome.model.layout().unwrap());
    let settings = WorkerSettings::from(&welcome.run);
    let wrong = vec![0.0; layout.len()];
    let mut core = WorkerCore::new(layout.clone(), &settings, welcome.session, wrong, Step(0));
    core.add_work(&peer.work(&welcome).await).unwrap();
    let batch = core.next_batch().expect("batches are left");
    core.view();
    core.handle_gradient(batch, &vec![1e-3; layout.len()], 4.0, 0.0, 64, 0).unwrap();
    let mut frame = Vec::new();
    core.pending().expect("a push was made").encode(&mut frame);
    let reply = peer.say(StreamKind::Exchange as u8, &frame).await.expect("pushes are answered");
    assert_eq!(Reply::decode(&reply).unwrap(), Reply::Refused(Refusal::ReplicaMismatch));

    // The step was made, so it is evaluated, by whoever comes next.
    let (peer, welcome) = Peer::admitted(&serving.join).await;
    let job = peer.work(&welcome).await.evaluation.expect("an evaluation is due");
    assert_eq!(job.step, Step(1));
    drop(peer);
    worker(&serving.join).await.unwrap().unwrap();
    let outcome = serving.outcome().await;
    let summary = &outcome.summary;
    assert_eq!((summary.steps, summary.tokens, summary.completed), (6, 6 * 64, true));
    assert_eq!(outcome.evaluations.iter().map(|line| line.steps).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
}
