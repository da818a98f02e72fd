//! Server and worker say everything that they can, down to the packets, and no token is in it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::join::{JoinString, Token, hex};
use sanderling_server::admission::{Name, Passes, TokenDigest};
use sanderling_server::net::Server;
use sanderling_worker::net::{WorkerError, WorkerOptions, work};
use tokio::sync::watch;
use tracing::level_filters::LevelFilter;

/// No test takes anywhere near as long; one that hangs fails.
const PATIENCE: Duration = Duration::from_secs(120);

const RIGHT: &str = "right-0a1b2c3d4e5f";
const WRONG: &str = "wrong-1f2e3d4c5b6a";
const REVOKED: &str = "revoked-9a8b7c6d5e";

/// Everything that was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn run(folder: &Path, steps: u64, settings: &str) -> RunConfig {
    let text = folder.join("text.txt");
    std::fs::write(&text, &Corpus::bundled().bytes()[..30_000]).unwrap();
    let file = format!(
        "[run]\nruns_dir = '{}'\nworkers = 1\n[data]\ntext = '{}'\nbatch_size = 2\n[model]\ncontext = 32\n\
         hidden_size = 32\nlayers = 1\nheads = 2\nkv_heads = 1\nintermediate_size = 32\nexperts = 4\n\
         [training]\nsteps = {steps}\neval_every = {steps}\nwarmup_steps = 5\n{settings}",
        folder.join("runs").display(),
        text.display()
    );
    parse(&file).unwrap().adopt().unwrap().resolve().unwrap()
}

async fn join(server: &JoinString, token: &str) -> Result<(), WorkerError> {
    let join = JoinString { token: Some(token.parse().unwrap()), ..server.clone() };
    let (_stop, stopped) = watch::channel(false);
    let options = WorkerOptions::default();
    let worked = tokio::time::timeout(PATIENCE, work(&join, &options, stopped));
    worked.await.expect("a worker ends").map(drop)
}

/// One token for all, a right and a wrong one.
async fn serve_with_a_shared_token(folder: &Path) {
    let state = folder.join("state").display().to_string();
    let run = run(folder, 3, &format!("[server]\nstate_dir = '{state}'"));
    let server = Server::start(run, Some(RIGHT.parse().unwrap())).unwrap();
    let address = server.join().clone();
    tracing::info!("{address} {address:?}");
    let (_stop, stopped) = watch::channel(false);
    let served = tokio::spawn(server.serve(stopped, |_| ()));
    assert!(matches!(join(&address, WRONG).await, Err(WorkerError::WrongToken)));
    join(&address, RIGHT).await.unwrap();
    served.await.unwrap().unwrap();
}

/// A token that is revoked while its worker works, and is shown again.
async fn serve_with_tokens_of_their_own(folder: &Path) {
    let (path, name) = (folder.join("tokens.toml"), "node-1".parse::<Name>().unwrap());
    let token: Token = REVOKED.parse().unwrap();
    Passes::edit(&path, |passes| passes.add(&name, &token)).unwrap();
    let run = run(folder, 10_000_000, &format!("[server]\ntokens_file = '{}'", path.display()));
    let server = Server::start(run, None).unwrap();
    let address = server.join().clone();
    let (_stop, stopped) = watch::channel(false);
    let (done, mut progress) = watch::channel(0);
    let served = tokio::spawn(server.serve(stopped, move |progress| {
        done.send_replace(progress.done);
    }));
    let worker = {
        let address = address.clone();
        tokio::spawn(async move { join(&address, REVOKED).await })
    };
    progress.wait_for(|&done| done >= 2).await.unwrap();
    Passes::edit(&path, |passes| passes.revoke(&name, &path)).unwrap();
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Revoked(_))));
    assert!(matches!(join(&address, REVOKED).await, Err(WorkerError::WrongToken)));
    served.abort();
    assert!(served.await.unwrap_err().is_cancelled());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_ever_logged() {
    let log = Log::default();
    let writer = log.clone();
    // The same as the programs install, with all that every crate has to say.
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let folders = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    tokio::time::timeout(PATIENCE, serve_with_a_shared_token(folders.0.path())).await.unwrap();
    tokio::time::timeout(PATIENCE, serve_with_tokens_of_their_own(folders.1.path())).await.unwrap();

    let text = log.text();
    // It was listened to, from the programs down to the packets.
    for words in ["turned away: wrong token", "joined as node-1", "the token of node-1 was revoked"] {
        assert!(text.contains(words), "{words:?} was not logged");
    }
    assert!(text.contains("TRACE") && text.contains("quinn"), "packets were not logged");
    for token in [RIGHT, WRONG, REVOKED] {
        // As it is, as bytes in hexadecimal and as a list of bytes, and its hash as the tokens file has it.
        let bytes = format!("{:?}", token.as_bytes());
        let bytes = bytes.trim_matches(['[', ']']);
        for shown in [token, &hex(token.as_bytes()), bytes, &String::from(TokenDigest::of(token))] {
            assert!(!text.contains(shown), "{token} was logged as {shown}");
        }
    }
}
