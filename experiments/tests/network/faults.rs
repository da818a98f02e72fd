//! Workers that are killed and links that break.

use std::time::Duration;

use sanderling_common::join::JoinString;
use sanderling_worker::net::{WorkerError, work};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::relay::Relay;
use crate::support::{Scene, Serving, options, worker};

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
    let relay = Relay::start(&serving.join, 0.0).await;
    let worker = worker(&relay.join);
    serving.reach(50).await;
    relay.set_blackout(true);
    tokio::time::sleep(Duration::from_millis(5500)).await;
    relay.set_blackout(false);
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped, summary.sessions), (300, 0, 1));
    let report = worker.await.unwrap().unwrap();
    assert_eq!((report.sessions, report.exchanges), (1, 300));
    assert!(report.reconnects >= 1, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_datagrams_lose_no_update() {
    let scene = Scene::new(150);
    let serving = Serving::start(&scene);
    let relay = Relay::start(&serving.join, 0.05).await;
    let workers: Vec<_> = (0..2).map(|_| worker(&relay.join)).collect();
    let summary = serving.outcome().await.summary;
    assert_eq!((summary.steps, summary.skipped), (150, 0));
    assert!(relay.lost() > 10, "{} datagrams were lost", relay.lost());
    for worker in workers {
        worker.await.unwrap().unwrap();
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
