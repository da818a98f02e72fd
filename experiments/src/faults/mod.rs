//! Everything that can go wrong, in one thread and in virtual time: the shipped cores of server and workers, the shipped
//! journal and checkpoints on a disk in memory, and a scheduler that decides by a seed what happens next and what breaks.
//!
//! | fault | what happens |
//! | --- | --- |
//! | messages | they are delayed, overtake each other, come twice, or are lost with their connection, at any point of an exchange |
//! | workers | they are killed at any point, also while they write their place down, and come back with or without it |
//! | server | its process is killed between any two steps; or its machine loses power, and with it, all or some, what was not synced |
//! | disk | it fills up in the middle of a record or a checkpoint |
//!
//! After every event the replicas of workers that wait for nothing are compared with their models, bit for bit; after
//! every recovery and at the end, the model with the fold over all records that were ever safe, worked out by hand
//! (`oracle`). When the faults are over, the run must come to its end with every batch done once.
//!
//! One seed is one course of events: it can be run again and looked at.

mod disk;
mod messages;
mod oracle;
mod server;
mod worker;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use sanderling_server::core::Mutation;

/// What happened in a trial, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// Things that happened.
    pub events: u64,
    /// Updates applied.
    pub steps: u64,
    /// Answers that workers applied.
    pub answers: u64,
    /// Server processes that were killed.
    pub server_kills: u64,
    /// Power cuts at the server.
    pub power_cuts: u64,
    /// Files that a power cut tore.
    pub torn_files: u64,
    /// Of those, files of which the rest was garbled.
    pub garbled_files: u64,
    /// Files that vanished, or came back, with a power cut.
    pub lost_names: u64,
    /// Disks that filled up, ending the server.
    pub full_disks: u64,
    /// Recoveries, from a checkpoint or from the first record.
    pub recoveries: u64,
    /// Of those, from a checkpoint.
    pub from_checkpoint: u64,
    /// Checkpoints that were written.
    pub checkpoints: u64,
    /// Worker processes that were killed.
    pub worker_kills: u64,
    /// Of those, while they wrote their place down.
    pub torn_places: u64,
    /// Connections that were cut.
    pub cuts: u64,
    /// Messages that were lost with them.
    pub lost_messages: u64,
    /// Messages that came twice.
    pub repeated_messages: u64,
    /// Messages that overtook another of their connection.
    pub overtaking_messages: u64,
    /// Sessions that lost their lease.
    pub expired_sessions: u64,
}

impl Tally {
    /// All kinds with their names.
    pub fn kinds(&self) -> [(&'static str, u64); 19] {
        [
            ("events", self.events),
            ("updates applied", self.steps),
            ("answers applied", self.answers),
            ("server processes killed", self.server_kills),
            ("power cuts", self.power_cuts),
            ("files torn", self.torn_files),
            ("files garbled", self.garbled_files),
            ("file names lost or back", self.lost_names),
            ("disks full", self.full_disks),
            ("recoveries", self.recoveries),
            ("recoveries from a checkpoint", self.from_checkpoint),
            ("checkpoints written", self.checkpoints),
            ("worker processes killed", self.worker_kills),
            ("workers' places torn", self.torn_places),
            ("connections cut", self.cuts),
            ("messages lost", self.lost_messages),
            ("messages repeated", self.repeated_messages),
            ("messages overtaking", self.overtaking_messages),
            ("leases expired", self.expired_sessions),
        ]
    }

    /// Adds another trial's.
    pub fn add(&mut self, other: &Self) {
        let Self {
            events,
            steps,
            answers,
            server_kills,
            power_cuts,
            torn_files,
            garbled_files,
            lost_names,
            full_disks,
            recoveries,
            from_checkpoint,
            checkpoints,
            worker_kills,
            torn_places,
            cuts,
            lost_messages,
            repeated_messages,
            overtaking_messages,
            expired_sessions,
        } = self;
        *events += other.events;
        *steps += other.steps;
        *answers += other.answers;
        *server_kills += other.server_kills;
        *power_cuts += other.power_cuts;
        *torn_files += other.torn_files;
        *garbled_files += other.garbled_files;
        *lost_names += other.lost_names;
        *full_disks += other.full_disks;
        *recoveries += other.recoveries;
        *from_checkpoint += other.from_checkpoint;
        *checkpoints += other.checkpoints;
        *worker_kills += other.worker_kills;
        *torn_places += other.torn_places;
        *cuts += other.cuts;
        *lost_messages += other.lost_messages;
        *repeated_messages += other.repeated_messages;
        *overtaking_messages += other.overtaking_messages;
        *expired_sessions += other.expired_sessions;
    }
}

/// Something that must never be true was.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Violation {
    /// The trial.
    pub seed: u64,
    /// Events before it.
    pub events: u64,
    /// What was wrong.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, events, what } = self;
        write!(f, "seed {seed}, after {events} events: {what}")
    }
}

/// One trial; `trace` is told every event.
///
/// # Errors
/// The first [`Violation`]; a panic, of whatever is tried, is one too.
///
/// # Panics
/// If a mutation is asked for in a build without the feature `mutations`.
pub fn trial(seed: u64, mutation: Option<Mutation>, trace: &mut dyn FnMut(&str)) -> Result<Tally, Violation> {
    let _mutated = mutation.map(Mutation::switch_on);
    let mut events = 0;
    let mut counted = |event: &str| {
        events += 1;
        trace(event);
    };
    // Nothing of the world is looked at after a panic.
    let run = AssertUnwindSafe(|| world::World::new(seed, mutation, &mut counted).run());
    catch_unwind(run).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a word");
        Err(Violation { seed, events, what: format!("panicked: {said}") })
    })
}
