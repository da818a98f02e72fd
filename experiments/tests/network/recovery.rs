//! Servers that are killed and started again on their state folder.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sanderling_common::folder_lock::FolderLockError;
use sanderling_common::ids::BatchId;
use sanderling_common::join::JoinString;
use sanderling_common::layout::Layout;
use sanderling_common::wire::EvaluationJob;
use sanderling_common::wire::control::EvaluationReport;
use sanderling_server::net::{Outcome, Server, ServerError};
use sanderling_server::storage::StateError;
use sanderling_worker::data::Batch;
use sanderling_worker::engine::{Compute, Engine};
use sanderling_worker::model::{ModelError, StepLoss};
use sanderling_worker::net::{StandIn, WorkerError, WorkerOptions, WorkerReport};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, Scene, Serving, options, worker_with};

/// A server in a runtime of its own, which can be ended in the middle of anything.
struct Doomed {
    runtime: Runtime,
    join: JoinString,
    /// Updates and skipped batches, and workers.
    seen: watch::Receiver<(u64, u32)>,
    outcome: JoinHandle<Result<Outcome, ServerError>>,
    stop: watch::Sender<bool>,
}

impl Doomed {
    fn start(scene: &Scene) -> Self {
        let runtime = Runtime::new().unwrap();
        let begun = Instant::now();
        let server = loop {
            // The system may take a moment to free the port of the one that was killed.
            match runtime.block_on(async { Server::start(scene.resolved(), None) }) {
                Ok(server) => break server,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let (stop, stopped) = watch::channel(false);
        let (told, seen) = watch::channel((0, 0));
        let join = server.join().clone();
        let outcome = runtime.spawn(server.serve(stopped, move |progress| {
            told.send_replace((progress.done, progress.workers));
        }));
        Self { runtime, join, seen, outcome, stop }
    }

    fn reach(&mut self, done: u64) {
        self.see(|(now, _)| now >= done);
    }

    /// Until so many workers are there, each of which has had the time to hear of its session: one that was opened, and not told of
    /// when its server was killed, is nobody's.
    fn welcome(&mut self, workers: u32) {
        let (done, _) = self.see(|(_, there)| there >= workers);
        self.reach(done + 20);
    }

    fn see(&mut self, is_so: impl Fn((u64, u32)) -> bool) -> (u64, u32) {
        let seen = async {
            tokio::time::timeout(PATIENCE, self.seen.wait_for(|&now| is_so(now)))
                .await
                .map(|now| *now.unwrap())
        };
        self.runtime.block_on(seen).expect("the run goes on")
    }

    fn kill(self) {
        self.runtime.shutdown_background();
    }

    fn outcome(self) -> Outcome {
        let ended = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, self.outcome).await });
        ended.expect("the run ends").unwrap().unwrap()
    }
}

fn scene(steps: u64, durability: &str) -> Scene {
    let scene =
        Scene::new(steps).with("[training]\neval_every = 100\n[server]\nlease_ms = 10000\nshards = 2");
    let state = scene.path("state");
    scene.with(&format!("[server]\nstate_dir = '{}'\ndurability = '{durability}'", state.display()))
}

/// Workers of the test's own runtime, and what they report in the end.
fn with_workers<T>(join: &JoinString, count: usize, run: impl FnOnce() -> T) -> (T, Vec<(u64, u64)>) {
    let runtime = Runtime::new().unwrap();
    // The system may keep the port of a server that was killed for a while.
    let options = WorkerOptions { give_up_after: 2 * PATIENCE, ..options() };
    let start = || worker_with(join, options.clone());
    let workers: Vec<_> = runtime.block_on(async { (0..count).map(|_| start()).collect() });
    let result = run();
    let reports = workers.into_iter().map(|worker| {
        let report = runtime.block_on(worker).unwrap().unwrap();
        (report.sessions, report.reconnects)
    });
    (result, reports.collect())
}

/// The model's replicas are compared every five pushes, so a server that came back with another model, or other
/// replicas, would void the sessions.
#[test]
fn a_server_that_is_killed_goes_on_with_every_session() {
    // With checkpoints all the time, now and then, and none.
    for (durability, every_ms) in [("group", 0), ("group", 7), ("async", 150)] {
        // A lease that a busy machine does not let run out.
        let lease = "lease_ms = 60000";
        let scene =
            scene(600, durability).with(&format!("[server]\n{lease}\ncheckpoint_every_ms = {every_ms}"));
        let mut server = Doomed::start(&scene);
        let join = server.join.clone();
        let (outcome, reports) = with_workers(&join, 3, || {
            server.welcome(3);
            for done in [60, 200, 330] {
                server.reach(done);
                server.kill();
                server = Doomed::start(&scene);
                assert_eq!(server.join, join, "workers find it where it was");
            }
            server.outcome()
        });
        let summary = &outcome.summary;
        let counts = (summary.steps, summary.skipped, summary.sessions);
        assert_eq!(counts, (600, 0, 3), "{durability}, {reports:?}");
        assert_eq!(summary.tokens, 600 * 2 * 32);
        assert!(summary.seconds > summary.training_seconds && summary.traffic.bytes_up > 0);
        assert!(reports.iter().all(|(sessions, _)| *sessions == 1), "{reports:?}");
        assert!(reports.iter().any(|(_, reconnects)| *reconnects > 0), "{reports:?}");
        let curve = std::fs::read_to_string(scene.results().join("metrics.jsonl")).unwrap();
        let steps = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["steps"].clone();
        let mut steps: Vec<u64> = curve.lines().map(|line| steps(line).as_u64().unwrap()).collect();
        steps.sort_unstable();
        assert_eq!(steps, [100, 200, 300, 400, 500, 600], "every evaluation once");
        let first = scene.path("state/journal-00000000000000000000");
        assert_eq!(first.exists(), every_ms == 0, "what checkpoints cover is removed");
    }
}

/// One checkpoint that cannot be read has a predecessor; without any the journal alone does.
#[test]
fn a_damaged_checkpoint_costs_nothing() {
    let scene = scene(400, "group").with("[server]\ncheckpoint_every_ms = 30\nkeep_journal = true");
    let mut server = Doomed::start(&scene);
    let join = server.join.clone();
    let checkpoints = scene.path("state/checkpoints");
    let names = || {
        let entries = std::fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().path());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    let (outcome, reports) = with_workers(&join, 2, || {
        server.welcome(2);
        for (done, damaged) in [(80, 1), (200, usize::MAX)] {
            server.reach(done);
            server.kill();
            for name in names().iter().rev().take(damaged) {
                let mut bytes = std::fs::read(name).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(name, bytes).unwrap();
            }
            server = Doomed::start(&scene);
        }
        server.outcome()
    });
    assert_eq!((outcome.summary.steps, outcome.summary.skipped, outcome.summary.sessions), (400, 0, 2));
    assert!(reports.iter().all(|(sessions, _)| *sessions == 1), "{reports:?}");
    let kept = names().iter().filter(|name| name.to_string_lossy().contains("state-")).count();
    assert_eq!(kept, sanderling_server::storage::CHECKPOINTS_KEPT);
}

/// Without a journal the run begins anew, and workers with it.
#[test]
fn without_durability_a_run_starts_again() {
    // Enough that the run is not over before its server is killed.
    let scene = scene(1500, "none");
    let mut server = Doomed::start(&scene);
    let join = server.join.clone();
    // One, because without it the run cannot end before it has noticed.
    let (outcome, reports) = with_workers(&join, 1, || {
        server.reach(30);
        server.kill();
        Doomed::start(&scene).outcome()
    });
    assert_eq!((outcome.summary.steps, outcome.summary.completed), (1500, true));
    assert_eq!(reports[0].0, 2, "{reports:?}");
}

/// A run with a state folder is not ended by stopping its server.
#[test]
fn a_server_that_is_stopped_goes_on_when_it_is_started_again() {
    let scene = scene(1500, "group");
    let mut server = Doomed::start(&scene);
    let join = server.join.clone();
    let (outcome, reports) = with_workers(&join, 2, || {
        server.reach(100);
        server.stop.send_replace(true);
        let so_far = server.outcome().summary;
        assert!(!so_far.completed && so_far.steps >= 100, "{so_far:?}");
        Doomed::start(&scene).outcome()
    });
    assert_eq!((outcome.summary.steps, outcome.summary.completed), (1500, true));
    assert!(reports.iter().all(|(sessions, _)| *sessions == 1), "{reports:?}");
}

/// What is done is done: a server that is started again when the run is over says so again.
#[test]
fn a_finished_run_stays_finished() {
    let scene = scene(20, "group");
    let server = Doomed::start(&scene);
    let join = server.join.clone();
    let (first, _) = with_workers(&join, 1, || server.outcome());
    let path = scene.results().join("summary.json");
    let summary = std::fs::read_to_string(&path).unwrap();
    let again = Doomed::start(&scene).outcome();
    assert_eq!((again.summary.steps, again.summary.val_loss), (20, first.summary.val_loss));
    assert_eq!(again.parameters, first.parameters);
    // The bytes of evaluations and goodbyes, which come after the last decision, are not forgotten.
    assert_eq!(again.summary.traffic, first.summary.traffic);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), summary);
}

#[test]
fn folders_of_other_runs_and_of_other_servers_are_refused() {
    let scene = scene(5, "group");
    let runtime = Runtime::new().unwrap();
    let start = |settings: &str| {
        let scene = scene_of(&scene, settings);
        loop {
            match runtime.block_on(async { Server::start(scene.clone(), None).map(drop) }) {
                // The system may take a moment to free the port of the one before.
                Err(ServerError::Endpoint(_)) => std::thread::sleep(Duration::from_millis(20)),
                outcome => break outcome,
            }
        }
    };
    let first = runtime.block_on(async { Server::start(scene.resolved(), None).unwrap() });
    assert!(matches!(start(""), Err(ServerError::State(StateError::Lock(FolderLockError::Locked(_))))));
    drop(first);
    let error = start("[training]\nmomentum = 0.25").unwrap_err().to_string();
    assert!(error.contains("momentum") && error.contains("0.25"), "{error}");
    let journal = std::fs::read_dir(scene.path("state")).unwrap().map(|entry| entry.unwrap().path());
    let journal = journal.filter(|path| path.to_string_lossy().contains("journal-")).max().unwrap();
    std::fs::write(
        &journal,
        b"sndrjrnl\x09\x00\x00\x00 a journal of another time, and longer than its header",
    )
    .unwrap();
    let error = start("").unwrap_err().to_string();
    assert!(error.contains("journal format 9"), "{error}");
    let checkpoint = scene.path("state/checkpoints/state-00000000000000000007");
    std::fs::write(checkpoint, b"sndrstat\x09\x00\x00\x00 a checkpoint of another time").unwrap();
    let error = start("").unwrap_err().to_string();
    assert!(error.contains("record 7") && error.contains("format 9"), "{error}");
}

/// The error of a server that is to go on, or to begin, with further settings.
fn refused(runtime: &Runtime, scene: &Scene, settings: &str) -> String {
    loop {
        let run = scene_of(scene, settings);
        match runtime.block_on(async { Server::start(run, None).map(drop) }) {
            // The system may take a moment to free the port of the one before.
            Err(ServerError::Endpoint(_)) => std::thread::sleep(Duration::from_millis(20)),
            outcome => break outcome.unwrap_err().to_string(),
        }
    }
}

/// The names in a folder.
fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What a run has left is not begun anew in silence because a part of it is missing, or not looked at.
#[test]
fn a_folder_with_a_part_of_a_run_is_refused_as_it_is() {
    let scene = scene(5, "group");
    let runtime = Runtime::new().unwrap();
    let server = Doomed::start(&scene);
    let join = server.join.clone();
    with_workers(&join, 1, || server.outcome());
    let state = scene.path("state");
    let error = refused(&runtime, &scene, "[server]\ndurability = 'none'");
    assert!(error.contains("durability = none") && error.contains("state"), "{error}");

    let identity = std::fs::read(state.join("identity.json")).unwrap();
    std::fs::remove_file(state.join("identity.json")).unwrap();
    let before = names(&state);
    let error = refused(&runtime, &scene, "");
    assert!(error.contains("identity.json"), "{error}");
    assert_eq!(names(&state), before, "nothing is written");
    std::fs::write(state.join("identity.json"), identity).unwrap();

    for name in names(&state).iter().filter(|name| name.starts_with("journal-")) {
        std::fs::remove_file(state.join(name)).unwrap();
    }
    let error = refused(&runtime, &scene, "");
    assert!(error.contains("checkpoint of record") && error.contains("no journal"), "{error}");
}

/// Checkpoints elsewhere hold no secrets, so that a run cannot be gone on with from them alone, and is not begun beside them.
#[test]
fn a_run_is_not_begun_where_the_checkpoints_of_another_are() {
    let scene = scene(5, "group");
    let store = scene.path("store");
    let scene = scene.with(&format!("[server]\ncheckpoint_url = 'file://{}'", store.display()));
    let runtime = Runtime::new().unwrap();
    let server = Doomed::start(&scene);
    let join = server.join.clone();
    with_workers(&join, 1, || server.outcome());
    let [of_the_run] = &names(&store)[..] else { panic!("a run has a folder") };
    let kept = names(&store.join(of_the_run));
    assert!(kept.contains(&"run.toml".to_owned()) && kept.iter().any(|name| name.starts_with("state-")));
    let file = std::fs::read_to_string(store.join(of_the_run).join("run.toml")).unwrap();
    assert_eq!(sanderling_common::config::parse(&file).unwrap().resolve().unwrap().training.steps, 5);

    let error =
        refused(&runtime, &scene, &format!("[server]\nstate_dir = '{}'", scene.path("new").display()));
    assert!(error.contains("checkpoints of another run") && error.contains("state folder"), "{error}");
    assert_eq!(names(&scene.path("new")), ["lock"], "nothing is begun");
    // With its state folder the run goes on.
    assert_eq!(Doomed::start(&scene).outcome().summary.steps, 5);
}

/// A token that was given once is the run's until another is.
#[test]
fn a_token_that_is_changed_stays_changed() {
    let scene = scene(5, "group");
    let runtime = Runtime::new().unwrap();
    let start = |token: Option<&str>| loop {
        let token = token.map(|token| token.parse().unwrap());
        match runtime.block_on(async { Server::start(scene.resolved(), token) }) {
            // The system may take a moment to free the port of the one before.
            Err(ServerError::Endpoint(_)) => std::thread::sleep(Duration::from_millis(20)),
            server => break server.unwrap().join().token.as_ref().unwrap().reveal().to_owned(),
        }
    };
    let told = [Some("the-first-token-of-all"), None, Some("the-second-token-of-all"), None].map(start);
    assert_eq!(
        told,
        [
            "the-first-token-of-all",
            "the-first-token-of-all",
            "the-second-token-of-all",
            "the-second-token-of-all"
        ]
    );
}

#[cfg(unix)]
#[test]
fn what_is_kept_is_its_owners() {
    use std::os::unix::fs::PermissionsExt;
    let scene = scene(5, "group");
    let server = Doomed::start(&scene);
    let (join, place) = (server.join.clone(), scene.path("worker"));
    let worker = DoomedWorker::start(&join, &place);
    server.outcome();
    worker.report().unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let state = scene.path("state");
    assert_eq!([&state, &state.join("checkpoints"), &place].map(|path| mode(path)), [0o700; 3]);
    for name in names(&state).iter().filter(|name| name.starts_with("journal-") || name.ends_with(".json")) {
        assert_eq!(mode(&state.join(name)), 0o600, "{name}");
    }
}

fn scene_of(scene: &Scene, settings: &str) -> sanderling_common::config::RunConfig {
    let stated = sanderling_common::config::parse(settings).unwrap();
    let file = sanderling_common::config::parse(&scene.resolved().to_toml()).unwrap();
    stated.or(file).resolve().unwrap()
}

/// A worker in a runtime of its own, which can be ended in the middle of anything.
struct DoomedWorker {
    runtime: Runtime,
    killed: Arc<AtomicBool>,
    task: JoinHandle<Result<WorkerReport, WorkerError>>,
}

/// Computes, but for batches from a certain one on waits until its worker is killed: a runtime that is shut down goes on for
/// a while, and would come to the end of a short run.
struct Waiting {
    engine: Engine,
    from: u64,
    killed: Arc<AtomicBool>,
    is_to_wait: AtomicBool,
}

impl Compute for Waiting {
    type Vector = [f32];

    fn layout(&self) -> &Arc<Layout> {
        self.engine.layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        self.is_to_wait.store(id.0 >= self.from, Ordering::Relaxed);
        self.engine.batch(id)
    }

    fn take_gradient(&mut self, parameters: &[f32], batch: &Batch) -> Result<StepLoss, ModelError> {
        while self.is_to_wait.load(Ordering::Relaxed) && !self.killed.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.engine.take_gradient(parameters, batch)
    }

    fn gradient(&self) -> &[f32] {
        self.engine.gradient()
    }

    fn evaluate_while(
        &mut self,
        parameters: &[f32],
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        self.engine.evaluate_while(parameters, job, keep_going)
    }
}

impl DoomedWorker {
    fn start(join: &JoinString, state: &std::path::Path) -> Self {
        Self::start_until(join, state, u64::MAX)
    }

    /// One that does no batch from `from` on.
    fn start_until(join: &JoinString, state: &std::path::Path, from: u64) -> Self {
        let runtime = Runtime::new().unwrap();
        let killed = Arc::new(AtomicBool::new(false));
        let shared = killed.clone();
        let stand_in = StandIn(Arc::new(move |engine| {
            let is_to_wait = AtomicBool::new(false);
            Box::new(Waiting { engine, from, killed: shared.clone(), is_to_wait })
        }));
        let options =
            WorkerOptions { state_dir: Some(state.to_owned()), stand_in: Some(stand_in), ..options() };
        let entered = runtime.enter();
        let task = worker_with(join, options);
        drop(entered);
        Self { runtime, killed, task }
    }

    fn kill(self) {
        self.runtime.shutdown_background();
        self.killed.store(true, Ordering::Relaxed);
    }

    fn report(self) -> Result<WorkerReport, WorkerError> {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap() })
    }
}

/// With one worker there is but one order of events, so the model tells whether anything was repeated, skipped or lost.
#[test]
fn a_worker_that_is_killed_goes_on_in_its_session() {
    for method in ["dgs-adam", "dgc-async", "dgs"] {
        let settings =
            format!("[run]\nworkers = 1\n[training]\nmethod = '{method}'\n[server]\nlease_ms = 20000");
        let models = [vec![], vec![20, 60, 61, 90]].map(|kills| {
            let scene = Scene::new(200).with(&settings);
            let state = scene.path("worker");
            let runtime = Runtime::new().unwrap();
            let serving = runtime.block_on(async { Serving::start(&scene) });
            // Those that are to be killed cannot come to the end of the run before.
            let start = |killed: usize| match kills.get(killed) {
                Some(_) => DoomedWorker::start_until(&serving.join, &state, 150),
                None => DoomedWorker::start(&serving.join, &state),
            };
            let mut worker = start(0);
            for (number, &done) in kills.iter().enumerate() {
                runtime.block_on(serving.progress.clone().wait_for(|&now| now >= done)).unwrap();
                worker.kill();
                worker = start(number + 1);
            }
            let outcome = runtime.block_on(serving.outcome());
            assert_eq!((outcome.summary.steps, outcome.summary.sessions), (200, 1), "{method}, {kills:?}");
            assert_eq!(worker.report().unwrap().sessions, u64::from(kills.is_empty()));
            assert!(!state.join("push-0").exists(), "a session that is over leaves nothing behind");
            outcome.parameters
        });
        assert!(models[0] == models[1], "{method}");
    }
}

/// Where the server knows nothing of the session, there is nothing to go on with.
#[test]
fn a_worker_whose_session_is_forgotten_begins_another() {
    let scene = scene(1500, "none");
    let mut server = Doomed::start(&scene);
    let (join, state) = (server.join.clone(), scene.path("worker"));
    let worker = DoomedWorker::start(&join, &state);
    server.reach(30);
    worker.kill();
    server.kill();
    let server = Doomed::start(&scene);
    let worker = DoomedWorker::start(&join, &state);
    let outcome = server.outcome();
    assert_eq!((outcome.summary.steps, outcome.summary.sessions), (1500, 1));
    assert_eq!(worker.report().unwrap().sessions, 1);
}
