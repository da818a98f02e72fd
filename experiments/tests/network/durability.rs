//! Nobody learns of a decision before it is kept: a server whose disk takes its time.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use sanderling::faults::Mutation;
use sanderling_common::wire::EvaluationJob;
use sanderling_common::wire::control::{EvaluationReport, Greeting, Request, StreamKind, Welcome};
use sanderling_common::wire::frame::Reply;
use sanderling_server::net::Server;
use sanderling_server::storage::{Directory, Disk, DiskFile};

use crate::peer::{Peer, encoded, first_push, frame};
use crate::support::{PATIENCE, Scene, Serving};

/// An answer that has not come after so long waits for the disk.
const WAITS: Duration = Duration::from_millis(700);

/// Holds up the syncs of a disk.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_shut: bool,
    /// Since it was shut: appended to a file,
    appended: bool,
    /// and asked to sync one.
    entered: bool,
    /// A sync is held up, or has not noticed yet that it no longer is.
    is_held: bool,
}

/// The gate is shut until this is dropped.
struct Shut<'a>(&'a Gate);

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.0.state().is_shut = false;
        self.0.changed.notify_all();
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap()
    }

    fn try_shut(&self) -> bool {
        let mut state = self.state();
        let is_free = !state.is_held;
        if is_free {
            *state = GateState { is_shut: true, ..GateState::default() };
        }
        is_free
    }

    /// Waits until the sync that was held up before is through: it would be taken for one that comes now.
    async fn shut(&self) -> Shut<'_> {
        let through = async {
            while !self.try_shut() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, through).await.expect("syncs end when they may");
        Shut(self)
    }

    /// Waits until a record was appended and its sync is held up.
    async fn reached(&self) {
        let reached = async {
            loop {
                let GateState { appended, entered, .. } = *self.state();
                if appended && entered {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.expect("what is decided is written and synced");
    }
}

/// A directory behind a gate.
#[derive(Debug)]
struct HeldDisk(Directory, Arc<Gate>);

#[derive(Debug)]
struct HeldFile(<Directory as Disk>::File, Arc<Gate>);

impl Disk for HeldDisk {
    type File = HeldFile;

    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }

    fn create(&self, name: &str) -> io::Result<HeldFile> {
        Ok(HeldFile(self.0.create(name)?, self.1.clone()))
    }

    fn replace(&self, name: &str) -> io::Result<HeldFile> {
        Ok(HeldFile(self.0.replace(name)?, self.1.clone()))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.0.read(name)
    }

    fn truncate(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.0.truncate(name, bytes)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.0.sync_names()
    }
}

impl DiskFile for HeldFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.1.state().appended = true;
        self.0.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.1.state();
        (state.entered, state.is_held) = (true, true);
        let mut state = self.1.changed.wait_while(state, |state| state.is_shut).unwrap();
        state.is_held = false;
        drop(state);
        self.0.sync()
    }
}

/// What was answered although the disk had not synced what the answer tells.
struct Early {
    gate: Arc<Gate>,
    waits: Duration,
    found: Vec<&'static str>,
}

impl Early {
    /// Does something while no sync gets through, and lets it through when the answer has had its time to come early.
    async fn ask<T>(&mut self, what: &'static str, act: impl Future<Output = T>) -> T {
        let gate = self.gate.clone();
        let shut = gate.shut().await;
        tokio::pin!(act);
        let late = async {
            gate.reached().await;
            tokio::time::sleep(self.waits).await;
        };
        let early = tokio::select! {
            answer = &mut act => Some(answer),
            () = late => None,
        };
        drop(shut);
        if let Some(answer) = early {
            self.found.push(what);
            return answer;
        }
        tokio::time::timeout(PATIENCE, act).await.unwrap_or_else(|_| panic!("{what} is answered in the end"))
    }
}

fn evaluated(welcome: &Welcome, job: EvaluationJob) -> Vec<u8> {
    let (layers, experts) = (welcome.run.model.layers, welcome.run.model.experts);
    let (expert_share, router_entropy) = (vec![vec![0.25; experts]; layers], vec![1.0; layers]);
    let report = EvaluationReport { job, loss: 2.0, tokens: 10, expert_share, router_entropy };
    encoded(&Request::Evaluated(welcome.session, Box::new(report)))
}

/// A run of one batch with everything that a worker can be told of it, each while the disk syncs nothing. Returns what was
/// told all the same.
async fn told_early(mutation: Option<Mutation>) -> Vec<&'static str> {
    let scene = Scene::new(1).with("[server]\nlease_ms = 60000\ncheckpoint_every_ms = 0");
    let state = scene.path("state");
    let scene = scene.with(&format!("[server]\nstate_dir = '{}'", state.display()));
    let gate = Arc::new(Gate::default());
    let mutated = mutation.map(Mutation::switch_on);
    let disk = |directory| HeldDisk(directory, gate.clone());
    let serving = Serving::of(Server::start_on(scene.resolved(), None, disk).unwrap());
    drop(mutated);
    let join = &serving.join;
    // Where an answer is expected to come early, it is waited for.
    let waits = if mutation.is_some() { PATIENCE } else { WAITS };
    let mut early = Early { gate: gate.clone(), waits, found: Vec::new() };

    let (mut peer, welcome) = early.ask("a welcome", Peer::welcomed(join)).await;
    peer.begin(&welcome).await;
    early.ask("work", peer.work(&welcome)).await;
    let push = frame(&first_push(&peer, &welcome).await);
    let say_push = || peer.say(StreamKind::Exchange as u8, &push);
    let answer = early.ask("an answer", say_push()).await.expect("pushes are answered");
    assert!(matches!(Reply::decode(&answer), Ok(Reply::Answer(_))));
    // What is asked for at the same time makes a record that is held up, so that the repeat has something to wait for.
    let repeat = async {
        let beside = async {
            peer.work(&welcome).await;
            std::future::pending().await
        };
        let repeat = async {
            gate.reached().await;
            say_push().await
        };
        tokio::select! {
            again = repeat => again,
            () = beside => None,
        }
    };
    let again = early.ask("an answer again", repeat).await;
    assert_eq!(again, Some(answer));

    let report = async |job| peer.say(StreamKind::Request as u8, &evaluated(&welcome, job)).await;
    let validation = peer.work(&welcome).await.evaluation.expect("the model is to be evaluated");
    report(validation).await.expect("reports are answered");
    let test = peer.work(&welcome).await.evaluation.expect("the best model is to be tested");
    let end = async {
        let beside = async {
            report(test).await;
            std::future::pending().await
        };
        let hello = async {
            gate.reached().await;
            let (endpoint, connection) = Peer::connect(join).await;
            Peer::hello(endpoint, connection, join, None).await.map(drop)
        };
        tokio::select! {
            greeting = hello => greeting,
            () = beside => Ok(()),
        }
    };
    let greeting = early.ask("the end", end).await;
    assert!(matches!(greeting, Err(Greeting::Finished)), "{greeting:?}");
    drop(peer);
    assert!(serving.outcome().await.summary.completed);
    early.found
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_learns_of_a_decision_before_it_is_synced() {
    assert_eq!(told_early(None).await, [""; 0]);
}

/// The test above would notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_before_it_keeps_is_found() {
    let found = told_early(Some(Mutation::AnswerBeforeJournal)).await;
    assert_eq!(found, ["a welcome", "work", "an answer", "an answer again", "the end"]);
}
