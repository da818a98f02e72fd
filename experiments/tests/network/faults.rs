//! Workers that are killed and links that break.

use std::time::Duration;

use sanderling::relay::Conditions;
use sanderling_common::join::JoinString;
use sanderling_worker::net::{WorkerError, work};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::support::{Scene, Serving, options, relayed, worker};

/// A worker in a runtime of its own, so that it can end as a killed process does: without a word.
fn doomed_worker(join: &JoinString) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let join = join.clone();
    runtime.spawn(async move {
        let (_stop, stopped) = watch::channel(false);
        work(&join, &options(), stopped).await
    });
    runtime
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_nothing_but_its_time() {
    // Longer than a loaded machine leaves a worker without a processor, which would cost a living one its session too.
    let scene = Scene::new(400).with("[server]\nlease_ms = 8000");
    let mut serving = Serving::start(&scene);
    let victim = doomed_worker(&serving.join);
    // Alone at first, so that it has done its part whichever of the two is faster.
    serving.reach(20).await;
    let survivor = worker(&serving.join);
    serving.reach(60).await;
    victim.shutdown_background();
    serving.reach(120).await;
    // It comes back as somebody new: a killed process remembers nothing.
    let successor = worker(&serving.join);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.completed), (400, 0, true));
    assert_eq!(summary.sessions, 3);
    let exchanges = survivor.await.unwrap().unwrap().exchanges + successor.await.unwrap().unwrap().exchanges;
    assert!(exchanges < 400, "the victim did its part before it was killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loses_its_link_resumes_its_session() {
    // The connection is lost after half a lease, the session only after the other half.
    let scene = Scene::new(300).with("[server]\nlease_ms = 10000");
    let mut serving = Serving::start(&scene);
    let (relay, join) = relayed(&serving.join, Conditions::default()).await;
    let worker = worker(&join);
    serving.reach(50).await;
    relay.set(|link| link.is_cut = true);
    tokio::time::sleep(Duration::from_millis(5500)).await;
    relay.set(|link| link.is_cut = false);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.sessions), (300, 0, 1));
    let report = worker.await.unwrap().unwrap();
    assert_eq!((report.sessions, report.exchanges), (1, 300));
    assert!(report.reconnects >= 1, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_for_longer_than_the_lease_costs_the_session_and_no_batch() {
    let scene = Scene::new(300).with("[server]\nlease_ms = 2000");
    let mut serving = Serving::start(&scene);
    let (relay, join) = relayed(&serving.join, Conditions::default()).await;
    let worker = worker(&join);
    serving.reach(50).await;
    relay.set(|link| link.is_cut = true);
    tokio::time::sleep(Duration::from_millis(4500)).await;
    relay.set(|link| link.is_cut = false);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.tokens), (300, 0, 300 * 2 * 32));
    assert!(summary.sessions >= 2 && relay.counts().cut_off > 0, "{summary:?}");
    worker.await.unwrap().unwrap();
}

/// Whatever a link does, every batch is done once, in the sessions that there were: the scene compares replicas every five
/// pushes, and voids the session of a worker whose model is another.
async fn trains_over(conditions: Conditions, steps: u64) -> sanderling::relay::Counts {
    let scene = Scene::new(steps).with("[server]\nlease_ms = 20000");
    let serving = Serving::start(&scene);
    let (relay, join) = relayed(&serving.join, conditions).await;
    let workers: Vec<_> = (0..2).map(|_| worker(&join)).collect();
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.sessions), (steps, 0, 2));
    for worker in workers {
        assert_eq!(worker.await.unwrap().unwrap().sessions, 1);
    }
    relay.counts()
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_that_are_lost_doubled_late_and_out_of_order_lose_no_update() {
    let (jitter, delay) = (Duration::from_millis(10), Duration::from_millis(10));
    let conditions =
        Conditions { loss: 0.1, duplicates: 0.05, reordering: 0.1, delay, jitter, ..Conditions::default() };
    let counts = trains_over(conditions, 30).await;
    assert!(counts.lost > 10 && counts.duplicated > 10 && counts.held_back > 10, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_narrow_link_loses_no_update() {
    let rate = Some(60_000.0);
    let counts =
        trains_over(Conditions { bytes_per_second: rate, queue_bytes: 8 << 10, ..Conditions::default() }, 40)
            .await;
    assert!(counts.overflowed > 0, "{counts:?}");
}

/// Routers forget which port was whose. QUIC knows a connection by more than its address.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_over_the_same_connection_when_its_port_changes() {
    let scene = Scene::new(600).with("[server]\nlease_ms = 20000");
    let mut serving = Serving::start(&scene);
    // So slow that there is always something under way.
    let conditions = Conditions { delay: Duration::from_millis(2), ..Conditions::default() };
    let (relay, join) = relayed(&serving.join, conditions).await;
    let workers: Vec<_> = (0..2).map(|_| worker(&join)).collect();
    for done in (20..500).step_by(40) {
        serving.reach(done).await;
        relay.rebind();
    }
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.sessions), (600, 0, 2));
    let counts = relay.counts();
    assert!(counts.rebinds >= 12, "{counts:?}");
    for worker in workers {
        let report = worker.await.unwrap().unwrap();
        assert_eq!((report.sessions, report.reconnects), (1, 0), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_a_run_that_diverges_says_so_and_gives_up() {
    let scene = Scene::new(50).with("[training]\nmethod = 'asgd'\nlearning_rate = 1e30\nwarmup_steps = 0");
    let serving = Serving::start(&scene);
    let error = worker(&serving.join).await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Diverged(_)), "{error}");
    assert!(error.to_string().contains("lower learning_rate"), "{error}");
    serving.stop.send_replace(true);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.completed, summary.val_loss), (0, false, None));
}
