//! The simulator against a real run: the same order of events gives the same bits.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use sanderling::simulation::follow;
use sanderling::task::LanguageTask;
use sanderling_server::core::{Effect, Log, Record};
use sanderling_server::storage::{Directory, Journal, JournalError, SEGMENT_BYTES, Stamp, StateFolder};

use crate::support::{Scene, Serving, worker};

/// Collects what the simulator decides.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Vec<Record<'static>>>>);

impl Log for Told {
    fn append(&self, record: &Record<'_>, _: Effect) {
        self.0.lock().unwrap().push(owned(record));
    }
}

fn owned(record: &Record<'_>) -> Record<'static> {
    match record {
        Record::Pushed(push) => Record::Pushed(Cow::Owned(push.clone().into_owned())),
        Record::Noted(note) => Record::Noted(Cow::Owned(note.clone().into_owned())),
    }
}

/// What the server of a run has written down, from its first decision on.
fn records(scene: &Scene) -> Vec<Record<'static>> {
    let folder = scene.path("state");
    let identity = StateFolder::open(&folder).unwrap().identity().unwrap().unwrap();
    let journal = Journal::new(Arc::new(Directory::new(&folder)), identity.run, SEGMENT_BYTES);
    let mut records = Vec::new();
    let read = journal.read(0, |_, body| {
        let (_, record) = Stamp::split(body).unwrap();
        records.push(Record::decode(record).unwrap());
        Ok::<_, JournalError>(())
    });
    assert_eq!(read.unwrap().next, records.len() as u64);
    records
}

/// Trains over QUIC, and then again in the order that came about.
async fn compare(method: &str, local_steps: u64) {
    let scene = Scene::new(150);
    let state = scene.path("state");
    let scene = scene.with(&format!(
        "[training]\nmethod = '{method}'\nlocal_steps = {local_steps}\n[server]\nshards = 2\nkeep_journal = true\nstate_dir = '{}'",
        state.display()
    ));
    let serving = Serving::start(&scene);
    let workers: Vec<_> = (0..3).map(|_| worker(&serving.join)).collect();
    let outcome = serving.outcome().await;
    for worker in workers {
        worker.await.unwrap().unwrap();
    }

    let (run, corpus) = (scene.resolved(), outcome.corpus);
    let mut task = LanguageTask::new(&run, Arc::new(corpus)).unwrap();
    let (real, told) = (records(&scene), Told::default());
    let theta = follow(&run, &mut task, real.iter().map(owned), Box::new(told.clone())).unwrap();
    let pushes = real.iter().filter(|record| matches!(record, Record::Pushed(_))).count();
    assert_eq!(pushes, 150);
    let of_a_batch = u64::from(run.data.batch_size) * run.model.context as u64;
    assert_eq!(outcome.summary.tokens, 150 * local_steps * of_a_batch);
    let told = told.0.lock().unwrap();
    for (number, (real, told)) in real.iter().zip(&*told).enumerate() {
        // Payloads are too long to be looked at.
        assert!(real == told, "record {number} differs");
    }
    assert_eq!(real.len(), told.len());
    // It was evaluated once, at the end, so that the best model is the last.
    assert_eq!(outcome.parameters, theta);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_run_of_dgs_is_simulated_bit_for_bit() {
    compare("dgs", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_run_of_dgs_adam_is_simulated_bit_for_bit() {
    compare("dgs-adam", 1).await;
}

/// What a worker did by itself between two exchanges is told by the second.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_run_with_local_steps_is_simulated_bit_for_bit() {
    compare("dgs-adam", 3).await;
}
