//! Who is admitted: client certificates, tokens of workers' own, and both taken back while the run goes on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sanderling_common::join::{JoinString, Token};
use sanderling_common::wire::control::Greeting;
use sanderling_server::admission::{Name, Passes};
use sanderling_server::net::Server;
use sanderling_transport::{Authority, ClientIdentity, CloseCode};
use sanderling_worker::net::{WorkerError, WorkerOptions, WorkerReport};

use crate::peer::Peer;
use crate::support::{PATIENCE, Scene, Serving, options, worker_with};

/// More steps than any test waits for.
const ENDLESS: u64 = 10_000_000;

async fn joined(join: &JoinString, options: WorkerOptions) -> Result<WorkerReport, WorkerError> {
    let joined = tokio::time::timeout(PATIENCE, worker_with(join, options));
    joined.await.expect("it ends").expect("a worker does not panic")
}

/// With a token behind the join string, or another one in its place.
fn with_token(join: &JoinString, token: &Token) -> JoinString {
    JoinString { token: Some(token.clone()), ..join.clone() }
}

fn token(text: &str) -> Token {
    text.parse().unwrap()
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn presenting(authority: &Authority, name: &str) -> WorkerOptions {
    let pair = authority.sign(name, 1).unwrap();
    let identity = ClientIdentity::from_pem(pair.certificate.as_bytes(), pair.key.as_bytes()).unwrap();
    WorkerOptions { identity: Some(Arc::new(identity)), ..options() }
}

/// A scene whose server admits by certificates of the authority.
fn with_authority(scene: Scene, authority: &Authority) -> Scene {
    let path = scene.path("ca.pem");
    std::fs::write(&path, authority.to_pem().certificate).unwrap();
    scene.with(&format!("[server]\nclient_ca = '{}'", path.display()))
}

/// A scene whose server admits by a tokens file with these tokens, and the file.
fn with_tokens(scene: Scene, tokens: &[(&str, &Token)]) -> (Scene, PathBuf) {
    let path = scene.path("tokens.toml");
    Passes::edit(&path, |_| Ok(())).unwrap();
    tokens.iter().for_each(|(name, token)| add(&path, name, token));
    (scene.with(&format!("[server]\ntokens_file = '{}'", path.display())), path)
}

fn add(path: &Path, owner: &str, token: &Token) {
    Passes::edit(path, |passes| passes.add(&name(owner), token)).unwrap();
}

fn revoke(path: &Path, owner: &str) {
    Passes::edit(path, |passes| passes.revoke(&name(owner), path)).unwrap();
}

fn says(error: &WorkerError, words: &str) {
    let said = error.to_string();
    assert!(said.contains(words) && !said.contains('\n'), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_certificates_of_the_authority_are_admitted() {
    let (ours, theirs) = (Authority::generate(1).unwrap(), Authority::generate(1).unwrap());
    let serving = Serving::start(&with_authority(Scene::new(5), &ours));
    assert_eq!(serving.join.token, None, "certificates admit, so there is no token");

    let error = joined(&serving.join, options()).await.unwrap_err();
    assert!(matches!(error, WorkerError::Handshake(_)), "{error}");
    says(&error, "--certificate");
    // A token is none instead.
    let error = joined(&with_token(&serving.join, &token("0123456789abcdef")), options()).await.unwrap_err();
    says(&error, "--certificate");
    let error = joined(&serving.join, presenting(&theirs, "node-1")).await.unwrap_err();
    assert!(matches!(error, WorkerError::Handshake(_)), "{error}");
    says(&error, "not signed by");
    // The server is still known by its pin.
    let mut other = serving.join.clone();
    other.pin[0] ^= 1;
    let error = joined(&other, presenting(&ours, "node-1")).await.unwrap_err();
    says(&error, "not the one of the join string");

    // What admits nobody harms nobody: a token beside the certificate is not looked at.
    let join = with_token(&serving.join, &token("0123456789abcdef"));
    assert_eq!(joined(&join, presenting(&ours, "node-1")).await.unwrap().exchanges, 5);
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

/// A server without a CA asks for no certificate, and takes none for a token.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_no_token() {
    let authority = Authority::generate(1).unwrap();
    let serving = Serving::start(&Scene::new(5));
    let open = JoinString { token: None, ..serving.join.clone() };
    let error = joined(&open, presenting(&authority, "node-1")).await.unwrap_err();
    assert!(matches!(error, WorkerError::NoToken), "{error}");
    joined(&serving.join, presenting(&authority, "node-1")).await.unwrap();
    assert_eq!(serving.outcome().await.summary.steps, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_revoked_ends_its_workers_connection() {
    let authority = Authority::generate(1).unwrap();
    let (scene, file) = with_tokens(with_authority(Scene::new(ENDLESS), &authority), &[]);
    let mut serving = Serving::start(&scene);
    let one = worker_with(&serving.join, presenting(&authority, "node-1"));
    let two = worker_with(&serving.join, presenting(&authority, "node-2"));
    serving.reach(5).await;
    assert!(Passes::edit(&file, |passes| Ok(passes.revoke_certificate(&name("node-1")))).unwrap());

    let ended = tokio::time::timeout(PATIENCE, one).await.expect("it is sent away").unwrap();
    let error = ended.unwrap_err();
    assert!(matches!(error, WorkerError::Revoked(_)), "{error}");
    says(&error, "the certificate of node-1 was revoked");
    // Nor does it come in again, with whatever certificate of that name.
    let error = joined(&serving.join, presenting(&authority, "node-1")).await.unwrap_err();
    assert!(matches!(error, WorkerError::Revoked(_)), "{error}");
    // The other goes on.
    let done = *serving.progress.borrow();
    serving.reach(done + 5).await;
    assert!(!two.is_finished());
    two.abort();
    serving.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_workers_own_come_and_go_while_the_run_goes_on() {
    let (first, second, third) =
        (token("token-of-node-1"), token("token-of-node-2"), token("token-of-node-3"));
    let (scene, file) = with_tokens(Scene::new(ENDLESS), &[("node-1", &first), ("node-2", &second)]);
    let mut serving = Serving::start(&scene);
    assert_eq!(serving.join.token, None, "there is none that all share");
    let error = joined(&serving.join, options()).await.unwrap_err();
    assert!(matches!(error, WorkerError::NoToken), "{error}");
    let error = joined(&with_token(&serving.join, &third), options()).await.unwrap_err();
    assert!(matches!(error, WorkerError::WrongToken), "{error}");

    let one = worker_with(&with_token(&serving.join, &first), options());
    let two = worker_with(&with_token(&serving.join, &second), options());
    serving.reach(5).await;
    add(&file, "node-3", &third);
    let three = loop {
        let three = worker_with(&with_token(&serving.join, &third), options());
        tokio::time::sleep(Duration::from_millis(500)).await;
        if !three.is_finished() {
            break three;
        }
        // The file was not looked at again yet.
        assert!(matches!(three.await.unwrap(), Err(WorkerError::WrongToken)));
    };

    revoke(&file, "node-1");
    let ended = tokio::time::timeout(PATIENCE, one).await.expect("it is sent away").unwrap();
    let error = ended.unwrap_err();
    assert!(matches!(error, WorkerError::Revoked(_)), "{error}");
    says(&error, "the token of node-1 was revoked");
    let error = joined(&with_token(&serving.join, &first), options()).await.unwrap_err();
    assert!(matches!(error, WorkerError::WrongToken), "{error}");

    let done = *serving.progress.borrow();
    serving.reach(done + 5).await;
    assert!(!two.is_finished() && !three.is_finished());
    // A name whose token is another one now is another worker.
    revoke(&file, "node-2");
    add(&file, "node-2", &token("another-of-node-2"));
    let ended = tokio::time::timeout(PATIENCE, two).await.expect("it is sent away").unwrap();
    assert!(matches!(ended, Err(WorkerError::Revoked(_))));
    three.abort();
    serving.kill().await;
}

/// Whoever has got hold of one token cannot take everybody's places with it.
#[tokio::test(flavor = "multi_thread")]
async fn one_name_has_only_so_many_places() {
    let (first, second) = (token("token-of-node-1"), token("token-of-node-2"));
    let tokens = [("node-1", &first), ("node-2", &second)];
    let hello = async |join: &JoinString| {
        let (endpoint, connection) = Peer::connect(join).await;
        Peer::hello(endpoint, connection, join, None).await
    };
    for (setting, allowed) in [(0, 1), (2, 2)] {
        let settings = format!(
            "[run]\nworkers = 1\n[server]\nlease_ms = 60000\nsessions_max = 4\nsessions_per_name_max = {setting}"
        );
        let (scene, _) = with_tokens(Scene::new(5).with(&settings), &tokens);
        let serving = Serving::start(&scene);
        let (of_first, of_second) = (with_token(&serving.join, &first), with_token(&serving.join, &second));
        let mut peers = Vec::new();
        for _ in 0..allowed {
            peers.push(Peer::welcomed(&of_first).await);
        }
        let greeting = hello(&of_first).await.map(drop).unwrap_err();
        assert_eq!(greeting, Greeting::NameFull { sessions_max: allowed });
        peers.push(Peer::welcomed(&of_second).await);
        // A place that is left is free again, once the server has seen it.
        drop(peers.swap_remove(0));
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while hello(&of_first).await.is_err() {
            assert!(tokio::time::Instant::now() < deadline, "the place stays taken");
            // As often as an address may.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        serving.kill().await;
    }
    // A token that all share is everybody's.
    let settings = "[run]\nworkers = 1\n[server]\nsessions_max = 2\nlease_ms = 60000";
    let serving = Serving::start(&Scene::new(5).with(settings));
    let both = [Peer::welcomed(&serving.join).await, Peer::welcomed(&serving.join).await];
    assert!(hello(&serving.join).await.is_err_and(|greeting| greeting == Greeting::Full { sessions_max: 2 }));
    drop(both);
    serving.kill().await;
}

/// What a worker held when it was sent away is done by another, at once, and nothing of it is counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn the_batches_of_one_that_was_revoked_go_to_others() {
    let (first, second) = (token("token-of-node-1"), token("token-of-node-2"));
    let scene = Scene::new(6).with("[server]\nlease_ms = 3600000");
    let (scene, file) = with_tokens(scene, &[("node-1", &first), ("node-2", &second)]);
    let serving = Serving::start(&scene);
    let (peer, welcome) = Peer::admitted(&with_token(&serving.join, &first)).await;
    assert!(peer.work(&welcome).await != Default::default(), "it holds batches");
    revoke(&file, "node-1");
    let closed = tokio::time::timeout(PATIENCE, peer.connection.closed()).await.expect("it is sent away");
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::Revoked), "{closed}");
    // Its lease of an hour would keep them from the other for longer than the test waits.
    let report = joined(&with_token(&serving.join, &second), options()).await.unwrap();
    assert_eq!(report.exchanges, 6);
    assert_eq!(serving.outcome().await.summary.steps, 6);
}

/// A session that is being set up is ended as well.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_not_ready_yet_is_revoked_too() {
    let first = token("token-of-node-1");
    let (scene, file) = with_tokens(
        Scene::new(5).with("[server]\nsessions_max = 1\n[run]\nworkers = 1"),
        &[("node-1", &first)],
    );
    let serving = Serving::start(&scene);
    let (peer, _) = Peer::welcomed(&with_token(&serving.join, &first)).await;
    let second = token("token-of-node-2");
    revoke(&file, "node-1");
    add(&file, "node-2", &second);
    let closed = tokio::time::timeout(PATIENCE, peer.connection.closed()).await.expect("it is sent away");
    assert_eq!(CloseCode::of(&closed), Some(CloseCode::Revoked), "{closed}");
    // The only place is free again.
    joined(&with_token(&serving.join, &second), options()).await.unwrap();
    serving.outcome().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_would_admit_nobody_are_refused_at_the_start() {
    let refused = |scene: &Scene, token: Option<Token>, words: &[&str]| {
        let error = Server::start(scene.resolved(), token).err().expect("it is refused").to_string();
        assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
    };
    let authority = Authority::generate(1).unwrap();
    let shared = token("0123456789abcdef");
    refused(&with_authority(Scene::new(5), &authority), Some(shared.clone()), &["client_ca", "token"]);
    refused(&with_tokens(Scene::new(5), &[]).0, Some(shared), &["tokens_file", "token"]);

    let absent = Scene::new(5);
    let path = absent.path("absent").display().to_string();
    for key in ["client_ca", "tokens_file"] {
        let scene = Scene::new(5).with(&format!("[server]\n{key} = '{path}'"));
        refused(&scene, None, &[&path]);
    }
    let (scene, file) = with_tokens(Scene::new(5), &[]);
    std::fs::write(&file, "[tokens]\nnode-1 = 'no digest'").unwrap();
    refused(&scene, None, &["tokens.toml", "line 2", "64 hexadecimal"]);
    let scene = with_authority(Scene::new(5), &authority);
    std::fs::write(scene.path("ca.pem"), "no certificate").unwrap();
    refused(&scene, None, &["ca.pem", "certificate"]);
    std::fs::write(scene.path("ca.pem"), authority.sign("node-1", 1).unwrap().certificate).unwrap();
    refused(&scene, None, &["ca.pem", "none that can sign others"]);
    refused(&Scene::new(5).with("[server]\nmemory_max_mb = 100"), None, &["memory_max_mb", "256 workers"]);
}
