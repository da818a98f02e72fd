//! What must be true, whatever happened: worked out beside the code that is tried, as plainly as can be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sanderling_common::ids::{BatchId, Seq, SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::sparse::decode;
use sanderling_server::core::{Note, Record};
use sanderling_server::storage::Position;

use super::server::ServerProcess;

/// Remembers every record that was ever safe, and everything that was acknowledged.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// The records of the run by position, of which the first `safe` were synced.
    records: Vec<Vec<u8>>,
    safe: Position,
    /// What a recovery has read so far, with the position of the first.
    read: Vec<(Position, Vec<u8>)>,
    /// The step of every answer that a worker has applied.
    acknowledged: BTreeMap<(SessionId, Seq), Step>,
}

impl Oracle {
    /// A server has synced its journal.
    pub(super) fn synced_by(&mut self, server: &mut ServerProcess) {
        self.records.truncate(self.safe as usize);
        self.records.extend(server.newly_synced());
        self.safe = server.synced();
        assert_eq!(self.records.len() as Position, self.safe, "the simulation knows what it has synced");
    }

    /// A worker has applied the answer to a push.
    pub(super) fn acknowledged(&mut self, session: SessionId, seq: Seq, step: Step) -> Result<(), String> {
        match self.acknowledged.insert((session, seq), step) {
            Some(other) if other != step => {
                Err(format!("{seq} of {session} was answered with {other} and with {step}"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn recovery_begins(&mut self) {
        self.read.clear();
    }

    pub(super) fn recovers(&mut self, position: Position, body: &[u8]) {
        self.read.push((position, body.to_vec()));
    }

    /// A recovery from a checkpoint of `from` records has come to the end of the journal.
    pub(super) fn recovered(&mut self, from: Position, next: Position) -> Result<(), String> {
        if next < self.safe || from > self.records.len() as Position {
            return Err(format!("{} records were safe, {next} were recovered, from {from} on", self.safe));
        }
        for (position, body) in std::mem::take(&mut self.read) {
            match self.records.get(position as usize) {
                Some(known) if position < self.safe && *known != body => {
                    return Err(format!("record {position} is another than the one that was synced"));
                }
                Some(_) if position < self.safe => {}
                _ => {
                    self.records.truncate(position as usize);
                    self.records.push(body);
                }
            }
        }
        self.records.truncate(next as usize);
        if self.records.len() as Position != next {
            return Err(format!("{} records are known and {next} were recovered", self.records.len()));
        }
        // They are on the disk for good: reading found them after a crash, and nothing is written there again.
        self.safe = next;
        Ok(())
    }

    /// Folds all records by hand and compares with the server's model.
    pub(super) fn check(&self, layout: &Arc<Layout>, initial: &[f32], theta: &[f32]) -> Result<(), String> {
        let fold = self.fold(layout, initial)?;
        for (&(session, seq), &step) in &self.acknowledged {
            match fold.steps.get(&(session, seq)) {
                Some(&kept) if kept == step => {}
                Some(kept) => {
                    return Err(format!("{seq} of {session} was answered with {step} and is {kept}"));
                }
                None => return Err(format!("{seq} of {session} was acknowledged and is lost")),
            }
        }
        let differs = fold.theta.iter().zip(theta).position(|(a, b)| a.to_bits() != b.to_bits());
        match differs {
            None => Ok(()),
            Some(at) => Err(format!(
                "element {at} of the model is {}, and the fold over the records makes it {}",
                theta[at], fold.theta[at]
            )),
        }
    }

    /// The batches that are done, of all records.
    pub(super) fn batches(&self) -> Result<BTreeSet<BatchId>, String> {
        let mut batches = BTreeSet::new();
        for record in self.decoded() {
            if let Record::Pushed(push) = record?
                && !batches.insert(push.batch)
            {
                return Err(format!("{} was done twice", push.batch));
            }
        }
        Ok(batches)
    }

    fn decoded(&self) -> impl Iterator<Item = Result<Record<'static>, String>> {
        self.records.iter().map(|body| Record::decode(body).map_err(|error| error.to_string()))
    }

    fn fold(&self, layout: &Arc<Layout>, initial: &[f32]) -> Result<Fold, String> {
        let (next, steps) = (BTreeMap::new(), BTreeMap::new());
        let mut fold = Fold { theta: initial.to_vec(), step: Step(0), next, steps };
        for record in self.decoded() {
            match record? {
                Record::Pushed(push) => {
                    let next = fold.next.get_mut(&push.session);
                    let next =
                        next.ok_or_else(|| format!("a push of {}, which was not open", push.session))?;
                    if push.seq != *next {
                        return Err(format!(
                            "{} of {} was applied, and {next} is next",
                            push.seq, push.session
                        ));
                    }
                    *next = Seq(next.0 + 1);
                    if !push.skipped {
                        let update = decode(layout, 0..layout.tensors().len(), &push.payload);
                        let update = update.map_err(|error| error.to_string())?;
                        let dense = update.to_dense(layout);
                        fold.theta.iter_mut().zip(dense).for_each(|(theta, update)| *theta -= update);
                        fold.step = Step(fold.step.0 + 1);
                    }
                    fold.steps.insert((push.session, push.seq), fold.step);
                }
                Record::Noted(note) => match *note {
                    Note::Opened(session) => drop(fold.next.insert(session, Seq(1))),
                    Note::Closed(session) => drop(fold.next.remove(&session)),
                    _ => {}
                },
            }
        }
        Ok(fold)
    }
}

struct Fold {
    theta: Vec<f32>,
    step: Step,
    /// The next push of every open session.
    next: BTreeMap<SessionId, Seq>,
    steps: BTreeMap<(SessionId, Seq), Step>,
}
