//! Invariants 3 and 7: what was written down of a server's decisions makes the same server again, bit for bit, whenever it was
//! killed, and the run goes on as if nothing had been.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sanderling_common::ids::Step;
use sanderling_common::method::Method;
use sanderling_common::wire::{Refusal, Split, Work};
use sanderling_server::core::{
    Effect, ImageError, Log, NoLog, Note, Record, Replay, ReplayError, SerialServer, ServerSettings,
};
use sanderling_server::recorder::Books;
use sanderling_server::storage::{CheckpointFileError, RestoredState, RunId, Stamp, StateCheckpoint};

use crate::cluster::{Cluster, exact, layout, server_settings, worker_settings};

const SIZES: [usize; 4] = [31, 1, 120, 7];
const ELEMENTS: usize = 159;
const WORKERS: usize = 3;
const RUN: RunId = RunId([3; 16]);

/// The bytes of the records, in order.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<Vec<u8>>>>);

impl Log for Kept {
    fn append(&self, record: &Record<'_>, _: Effect) {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        self.0.lock().unwrap().push(bytes);
    }
}

impl Kept {
    fn records(&self) -> Vec<Record<'static>> {
        self.0.lock().unwrap().iter().map(|bytes| Record::decode(bytes).unwrap()).collect()
    }

    fn forget_last(&self) -> Record<'static> {
        Record::decode(&self.0.lock().unwrap().pop().unwrap()).unwrap()
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Exchange,
    /// The answer is lost, and the push repeated.
    LostAnswer,
    /// The worker is killed; another joins.
    Killed,
    /// The worker asks what there is to do, and evaluates it if it is that.
    Asks,
    /// The server is killed between two exchanges.
    Crash,
    /// The server is killed when the push was written down and its answer was not.
    CrashBeforeAnswer,
    /// The server is killed before the push was written down.
    CrashBeforePush,
}

fn events() -> impl Strategy<Value = Vec<(usize, u64, Event)>> {
    let event = prop_oneof![
        6 => Just(Event::Exchange),
        2 => Just(Event::LostAnswer),
        1 => Just(Event::Killed),
        3 => Just(Event::Asks),
        1 => Just(Event::Crash),
        1 => Just(Event::CrashBeforeAnswer),
        1 => Just(Event::CrashBeforePush),
    ];
    prop::collection::vec((0..WORKERS, any::<u64>(), event), 1..25)
}

fn gradient(seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    (0..ELEMENTS).map(|_| next()).collect()
}

struct Play {
    cluster: Cluster,
    kept: Kept,
    theta: Vec<f32>,
    secondary: bool,
}

impl Play {
    fn new(secondary: bool) -> Self {
        let theta = gradient(1);
        let settings = worker_settings(Method::DgsAdam, 0.01, 0.7, exact(0.1));
        let mut server = server_settings(secondary.then(|| exact(0.2)));
        (server.shards, server.workers_have_initial, server.work.eval_every) = (2, true, 3);
        let (kept, layout) = (Kept::default(), layout(&SIZES));
        let log = Box::new(kept.clone());
        let cluster = Cluster::with_log(&layout, &theta, &server, settings, WORKERS, log);
        Self { cluster, kept, theta, secondary }
    }

    /// The same run in another number of shards.
    fn settings(&self, shards: usize) -> ServerSettings {
        let mut server = server_settings(self.secondary.then(|| exact(0.2)));
        (server.shards, server.workers_have_initial, server.work.eval_every) = (shards, true, 3);
        server
    }

    fn replayed(&self) -> Replay {
        self.replay(&self.kept.records())
    }

    fn replay(&self, records: &[Record<'static>]) -> Replay {
        let mut replay = Replay::new(&self.cluster.layout, &self.theta, &self.settings(3));
        records.iter().for_each(|record| assert!(replay.apply(record).is_ok()));
        replay
    }

    /// The bytes of a checkpoint of the first records.
    fn checkpoint(&self, records: &[Record<'static>]) -> Option<Vec<u8>> {
        let image = self.replay(records).image()?;
        let (position, stamp) = (records.len() as u64, Stamp { seconds: 1.5, bytes_up: 2, bytes_down: 3 });
        let mut bytes = Vec::new();
        StateCheckpoint { position, stamp, books: Books::default(), image }.write(RUN, &mut bytes).unwrap();
        Some(bytes)
    }

    fn restored(&self, checkpoint: &[u8], settings: &ServerSettings) -> Result<Replay, ImageError> {
        let state = RestoredState::read(RUN, checkpoint, checkpoint.len() as u64).unwrap();
        assert_eq!(state.stamp, Stamp { seconds: 1.5, bytes_up: 2, bytes_down: 3 });
        Replay::restore(&self.cluster.layout, &self.theta, settings, state.image)
    }

    /// The server is gone; another one is made of the records.
    fn crash(&mut self) {
        let replay = self.replayed();
        let server = SerialServer::from_recovered(replay.finish(Box::new(self.kept.clone())));
        self.cluster.server = server;
    }

    fn play(&mut self, worker: usize, seed: u64, event: Event) {
        // A worker that is given an evaluation does that first.
        while self.cluster.members[worker].core.next_batch().is_none() {
            self.ask(worker);
        }
        match event {
            Event::Exchange => drop(self.cluster.exchange(worker, &gradient(seed))),
            Event::LostAnswer => {
                self.cluster.compute(worker, &gradient(seed));
                let lost = self.cluster.send(worker).unwrap();
                assert_eq!(self.cluster.send(worker).unwrap(), lost);
                self.cluster.members[worker].core.handle_answer(&lost).unwrap();
            }
            Event::Killed => self.cluster.replace(worker),
            Event::Asks => self.ask(worker),
            Event::Crash => self.crash(),
            Event::CrashBeforeAnswer => {
                self.cluster.compute(worker, &gradient(seed));
                let lost = self.cluster.send(worker).unwrap();
                let forgotten = std::iter::from_fn(|| Some(self.kept.forget_last()));
                let mut forgotten = forgotten.take_while(|record| !is_answer(record));
                assert!(forgotten.all(|record| !matches!(record, Record::Pushed(_))));
                self.crash();
                let answer = self.cluster.send(worker).unwrap();
                assert_eq!((answer.step, &answer.payload), (lost.step, &lost.payload));
                self.cluster.members[worker].core.handle_answer(&answer).unwrap();
            }
            Event::CrashBeforePush => {
                self.cluster.compute(worker, &gradient(seed));
                let count = self.kept.records().len();
                self.cluster.send(worker).unwrap();
                self.kept.0.lock().unwrap().truncate(count);
                self.crash();
                let answer = self.cluster.send(worker).unwrap();
                self.cluster.members[worker].core.handle_answer(&answer).unwrap();
            }
        }
    }

    fn ask(&mut self, worker: usize) {
        let member = &mut self.cluster.members[worker];
        let session = member.session;
        let work = self.cluster.server.core().work(member.session).unwrap();
        member.core.add_work(&work).unwrap();
        if let Some(job) = work.evaluation {
            let report = sanderling_common::wire::control::EvaluationReport {
                job,
                loss: 1.0 / (job.step.0 + 1) as f64,
                tokens: 1,
                expert_share: vec![vec![0.5, 0.5]],
                router_entropy: vec![0.1],
            };
            self.cluster.server.core().report(session, &report);
        }
    }

    /// The server and the one that its records make agree in everything that can be asked of them.
    fn assert_recoverable(&self) {
        self.assert_same(self.replayed().server());
    }

    fn assert_same(&self, made: &SerialServer) {
        let server = &self.cluster.server;
        assert_eq!(bits(&server.theta()), bits(&made.theta()));
        assert_eq!(server.core().standing(), made.core().standing());
        assert_eq!(server.core().best(), made.core().best());
        assert_eq!(server.core().sessions(), made.core().sessions());
        for (number, member) in self.cluster.members.iter().enumerate() {
            assert_eq!(server.core().worker(member.session), Some(member.id));
            assert_eq!(made.core().worker(member.session), Some(member.id));
            assert_eq!(bits(&server.replica(member.id)), bits(&made.replica(member.id)));
            self.cluster.assert_replica(number);
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn is_answer(record: &Record<'_>) -> bool {
    matches!(record, Record::Noted(note) if matches!(**note, Note::Answered(..)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn makes_the_same_server_again(events in events(), secondary: bool) {
        let mut play = Play::new(secondary);
        for &(worker, seed, event) in &events {
            play.play(worker, seed, event);
            play.assert_recoverable();
        }
        // What every session is to do next is the same too.
        let made = play.replayed();
        for member in &play.cluster.members {
            let work = |server: &SerialServer| server.core().work(member.session).unwrap();
            let (live, made): (Work, Work) = (work(&play.cluster.server), work(made.server()));
            prop_assert_eq!(live, made);
        }
    }

    /// Wherever a checkpoint was taken, it and the records after it make the server that all records make, down to the
    /// answers that are stored and those under way.
    #[test]
    fn a_checkpoint_stands_for_what_came_before(events in events(), secondary: bool, place in 0.0..1.0_f64) {
        let mut play = Play::new(secondary);
        events.iter().for_each(|&(worker, seed, event)| play.play(worker, seed, event));
        let records = play.kept.records();
        let mut place = (place * records.len() as f64) as usize;
        let checkpoint = loop {
            // None is taken while a model that is to be evaluated is on its way.
            match play.checkpoint(&records[..place]) {
                Some(checkpoint) => break checkpoint,
                None => place -= 1,
            }
        };
        let mut replay = play.restored(&checkpoint, &play.settings(1)).unwrap();
        records[place..].iter().for_each(|record| assert!(replay.apply(record).is_ok()));
        play.assert_same(replay.server());
        // Everything that is stored is the same too: a checkpoint of the one is a checkpoint of the other.
        let state = |mut replay: Replay| {
            let image = replay.image().unwrap();
            let mut bytes = Vec::new();
            let (position, stamp, books) = (0, Stamp::default(), Books::default());
            StateCheckpoint { position, stamp, books, image }.write(RUN, &mut bytes).unwrap();
            bytes
        };
        // Of the same number of shards, which the parts of models are of; the bytes do not tell.
        prop_assert!(state(replay) == state(play.replayed()));
        let mut other = play.settings(1);
        other.work.total_batches += 1;
        prop_assert_eq!(play.restored(&checkpoint, &other).unwrap_err(), ImageError::Work);
    }

    /// Whatever befalls the bytes of a checkpoint, it is not taken for one.
    #[test]
    fn a_damaged_checkpoint_is_refused(place in 0.0..1.0_f64, bit in 0..8_u32, cut: bool) {
        let mut play = Play::new(true);
        for (worker, event) in [(0, Event::Exchange), (1, Event::LostAnswer), (2, Event::Asks)] {
            play.play(worker, 9, event);
        }
        let checkpoint = play.checkpoint(&play.kept.records()[..WORKERS + 1]).unwrap();
        let place = (place * checkpoint.len() as f64) as usize;
        let mut damaged = checkpoint.clone();
        damaged[place] ^= 1 << bit;
        if cut {
            damaged.truncate(place);
        }
        let read = |bytes: &[u8]| RestoredState::read(RUN, bytes, bytes.len() as u64);
        prop_assert!(read(&checkpoint).is_ok());
        prop_assert!(read(&damaged).is_err());
        let other = RestoredState::read(RunId([4; 16]), &checkpoint[..], checkpoint.len() as u64);
        prop_assert!(matches!(other, Err(CheckpointFileError::OtherRun)));
    }

    /// A crash may leave any number of records; each of them is a server that can go on.
    #[test]
    fn every_prefix_is_a_server(events in events(), secondary: bool) {
        let mut play = Play::new(secondary);
        events.iter().for_each(|&(worker, seed, event)| play.play(worker, seed, event));
        let records = play.kept.records();
        for count in 0..=records.len() {
            let mut server = server_settings(secondary.then(|| exact(0.2)));
            (server.workers_have_initial, server.work.eval_every) = (true, 3);
            let mut replay = Replay::new(&play.cluster.layout, &play.theta, &server);
            records[..count].iter().for_each(|record| assert!(replay.apply(record).is_ok()));
            let recovered = replay.finish(Box::new(NoLog));
            prop_assert_eq!(recovered.core.sessions(), recovered.sessions);
        }
    }
}

#[test]
fn records_that_do_not_follow_are_an_error() {
    let mut play = Play::new(true);
    play.play(0, 5, Event::Exchange);
    let records = play.kept.records();
    let replay = |records: &[Record<'static>]| {
        let mut replay = Replay::new(&play.cluster.layout, &play.theta, &server_settings(None));
        records.iter().try_for_each(|record| replay.apply(record).map(drop))
    };
    let push = records.iter().position(|record| matches!(record, Record::Pushed(_))).unwrap();
    let unknown = replay(&records[push..]).unwrap_err();
    assert!(matches!(unknown, ReplayError::Refused { refusal: Refusal::UnknownSession, .. }), "{unknown}");
    let without: Vec<_> = records.iter().filter(|r| !matches!(r, Record::Pushed(_))).cloned().collect();
    assert!(matches!(replay(&without).unwrap_err(), ReplayError::Unasked(_)));
    let reopened = replay(&[&records[..1], &records[..1]].concat()).unwrap_err();
    assert!(matches!(reopened, ReplayError::Reopened(_)), "{reopened}");
    let mut twice = records[..=push].to_vec();
    twice.push(records[push].clone());
    let twice = replay(&twice).unwrap_err();
    assert!(matches!(twice, ReplayError::Refused { refusal: Refusal::InFlight, .. }), "{twice}");
}

/// A session that ends while its push is being answered must not take the last evaluation with it.
#[test]
fn a_session_that_ends_before_its_answer_is_given_no_evaluation() {
    let mut play = Play::new(true);
    for seed in 0..2 {
        play.play(0, seed, Event::Exchange);
    }
    play.cluster.compute(1, &gradient(9));
    let mut push = play.cluster.members[1].core.pending().unwrap().clone();
    push.replica_hash = None;
    let core = play.cluster.server.core();
    let mut ticket = None;
    core.admit(&push, |new| ticket = Some(new.clone())).unwrap();
    core.snapshot_ready(Step(3));
    core.close_session(push.session, |_| {});
    assert_eq!(core.complete(&ticket.unwrap(), &Default::default()), Err(Refusal::UnknownSession));
    let work = core.work(play.cluster.members[0].session).unwrap();
    assert_eq!(work.evaluation.map(|job| (job.step, job.split)), Some((Step(3), Split::Validation)));
}
