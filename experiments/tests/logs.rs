//! What is logged, at the most talkative, and no token in it. A test of its own, because a process has one log.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::join::{JoinString, Token};
use sanderling_server::admission::{Name, Passes};
use sanderling_server::net::Server;
use sanderling_worker::net::{WorkerOptions, work};
use tokio::sync::watch;
use tracing::level_filters::LevelFilter;

/// No part of what the two programs say of themselves.
const SECRETS: [&str; 3] =
    ["the-shared-0123456789abcdef", "a-wrong-0123456789abcdef", "of-its-own-0123456789abcdef"];

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run(folder: &tempfile::TempDir, steps: u64, settings: &str) -> RunConfig {
    let file = format!(
        "[run]\nworkers = 1\nruns_dir = '{}'\n[data]\nbatch_size = 1\n[model]\nhidden_size = 8\nlayers = 1\nheads = 2\n\
         kv_heads = 1\nintermediate_size = 8\nexperts = 2\ncontext = 16\n[training]\nsteps = {steps}\neval_every = {steps}\n\
         [server]\n{settings}\n",
        folder.path().join("runs").display()
    );
    parse(&file).unwrap().resolve().unwrap()
}

/// Tries to work with a token; what came of it, as people and as developers are told.
async fn try_to_work(join: &JoinString, token: &str) -> String {
    let join = JoinString { token: Some(token.parse().unwrap()), ..join.clone() };
    let options = WorkerOptions { give_up_after: Duration::from_secs(60), ..WorkerOptions::default() };
    let (_stop, stopped) = watch::channel(false);
    let outcome = work(&join, &options, stopped).await;
    let told = outcome.as_ref().map_or_else(ToString::to_string, |report| format!("{report:?}"));
    format!("{join} {join:?} {outcome:?} {told}")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_ever_logged() {
    let buffer = Buffer::default();
    let writer = buffer.clone();
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let folder = tempfile::tempdir().unwrap();
    let [shared, wrong, own] = SECRETS;
    let mut told = String::new();

    let token: Token = shared.parse().unwrap();
    let state = format!("state_dir = '{}'", folder.path().join("state").display());
    let server = Server::start(run(&folder, 4, &state), Some(token)).unwrap();
    let join = server.join().clone();
    let (_stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(async move { server.serve(stopped, |_| {}).await });
    told += &try_to_work(&join, wrong).await;
    told += &try_to_work(&join, shared).await;
    told += &format!("{:?}", serving.await.unwrap().unwrap().summary);
    let kept = sanderling_server::storage::StateFolder::open(&folder.path().join("state")).unwrap();
    told += &format!("{kept:?} {:?}", kept.identity().unwrap());

    let tokens = folder.path().join("tokens.toml");
    let name: Name = "node-1".parse().unwrap();
    Passes::edit(&tokens, |passes| passes.add(&name, &own.parse().unwrap())).unwrap();
    let settings = format!("tokens_file = '{}'", tokens.display());
    let server = Server::start(run(&folder, 10_000_000, &settings), None).unwrap();
    let join = server.join().clone();
    let (stop, stopped) = watch::channel(false);
    let (told_done, mut done) = watch::channel(0);
    let serving = tokio::spawn(async move {
        server
            .serve(stopped, |progress| {
                told_done.send_replace(progress.done);
            })
            .await
    });
    let working = tokio::spawn(async move {
        let first = try_to_work(&join, own).await;
        first + &try_to_work(&join, own).await
    });
    done.wait_for(|&done| done > 3).await.unwrap();
    Passes::edit(&tokens, |passes| passes.revoke(&name, &tokens)).unwrap();
    told += &working.await.unwrap();
    stop.send_replace(true);
    let _ = serving.await.unwrap();

    let log = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("node-1") && log.contains("TRACE"), "the log is talkative");
    for secret in SECRETS {
        assert!(!told.contains(secret), "{told}");
        let line = log.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{line:?}");
    }
}
