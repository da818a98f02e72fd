//! Whether what is left after a soak is what must be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use sanderling_common::config::{self, STATE_RUN_FILE};
use sanderling_common::ids::{BatchId, Seq, SessionId};
use sanderling_common::origin::Origin;
use sanderling_server::core::{Effect, Image, Record, Replay, ServerSettings};
use sanderling_server::storage::{
    CheckpointStore, Directory, Journal, Position, RestoredState, SEGMENT_BYTES, Stamp, StateFolder,
};

/// The share of pushes at the beginning and at the end whose losses are compared.
const SHARE: usize = 10;

/// The last push of a session that was answered, as a worker knew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// Whose.
    pub session: SessionId,
    /// Its number; 0 if none was.
    pub seq: Seq,
}

impl Acknowledged {
    /// What the place of a worker tells that is not running: the push in it was written down before it was sent, and so
    /// after the one before was answered.
    ///
    /// # Errors
    /// If the place cannot be read.
    pub(super) fn of_place(folder: &Path, pin: [u8; 32]) -> anyhow::Result<Option<Self>> {
        let place = sanderling_worker::storage::StateFolder::open(folder, pin)?.load()?;
        Ok(place.map(|worker| Self { session: worker.session(), seq: Seq(worker.push.seq.0 - 1) }))
    }
}

/// What a state folder holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Findings {
    /// Decisions in the journal.
    pub records: u64,
    /// Pushes among them.
    pub pushes: u64,
    /// Updates applied.
    pub steps: u64,
    /// Sessions that were opened.
    pub sessions: u64,
    /// Decisions that the checkpoint covers which was compared.
    pub checkpoint: u64,
    /// Workers' replicas that were compared.
    pub replicas: u64,
    /// Places of workers that were killed or asked to end, whose acknowledged pushes were looked for.
    pub places: u64,
    /// Mean training loss of the first tenth of the pushes.
    pub first_loss: f64,
    /// Of the last tenth.
    pub last_loss: f64,
    /// Seconds that replaying the whole journal took.
    pub replay_seconds: f64,
}

/// Reads a run's journal from its first record to its last, makes every decision again, and compares the state that this
/// comes to with the server's last checkpoint, bit for bit. `acknowledged` are pushes of which some worker knew that they
/// count: the journal must hold them.
///
/// # Errors
/// What does not hold, as a sentence.
pub fn verify(folder: &Path, acknowledged: &[Acknowledged]) -> anyhow::Result<Findings> {
    let started = std::time::Instant::now();
    let state = StateFolder::open(folder)?;
    let identity = state.identity()?.context("there is no run in the state folder")?;
    let path = folder.join(STATE_RUN_FILE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let run = config::parse(&text)?.resolve()?;
    let origin = Origin::open(&run)?;
    let corpus = origin.corpus(&run)?;
    let beginning = origin.begin(&run, corpus.vocabulary().len())?;
    let layout = Arc::new(beginning.model.layout()?);
    let checkpoint = last_checkpoint(folder, &run.server.checkpoint_url, &identity)?;
    let mut replay = Replay::new(&layout, &beginning.parameters, &ServerSettings::from(&run));
    let (mut ledger, mut findings) = (Ledger::default(), Findings::default());
    let journal = Journal::new(Arc::new(Directory::new(folder)), identity.run, SEGMENT_BYTES);
    let mut compared = false;
    let mut compare = |replay: &mut Replay, position: Position| -> anyhow::Result<u64> {
        if position != checkpoint.position {
            return Ok(0);
        }
        compared = true;
        let image = replay.image().context("a checkpoint was taken while a model was on its way")?;
        same(&image, &checkpoint)
    };
    let read = journal.read(0, |position, body| {
        let (_, record) = Stamp::split(body).with_context(|| format!("record {position} is too short"))?;
        let record = Record::decode(record).with_context(|| format!("record {position}"))?;
        let effect = replay.apply(&record).with_context(|| format!("record {position}"))?;
        ledger.take(&record, effect).with_context(|| format!("record {position}"))?;
        findings.replicas += compare(&mut replay, position + 1)?;
        anyhow::Ok(())
    })?;
    ensure!(
        compared,
        "the journal ends at record {}, before the checkpoint of {}",
        read.next,
        checkpoint.position
    );
    findings.records = read.next;
    findings.checkpoint = checkpoint.position;
    acknowledged.iter().try_for_each(|push| ledger.check(*push))?;
    findings.places = acknowledged.len() as u64;
    ledger.conclude(&mut findings)?;
    findings.replay_seconds = started.elapsed().as_secs_f64();
    Ok(findings)
}

fn last_checkpoint(
    folder: &Path,
    url: &str,
    identity: &sanderling_server::storage::Identity,
) -> anyhow::Result<RestoredState> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = CheckpointStore::open(folder, url, identity.run)?;
        let last = store.positions().await?.pop().context("the server left no checkpoint")?;
        Ok(store.read(last).await?)
    })
}

/// Compares the state that the journal makes with the one that was written down; returns how many replicas there were.
fn same(made: &Image, kept: &RestoredState) -> anyhow::Result<u64> {
    let kept = &kept.image;
    let flat =
        |parts: &[Arc<Vec<f32>>]| parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<_>>();
    same_bits("the model", &flat(&made.theta), &kept.theta)?;
    ensure!(made.core.step() == kept.core.step(), "the checkpoint is of another step than the journal makes");
    ensure!(
        made.core.sessions().eq(kept.core.sessions()),
        "the checkpoint has other sessions than the journal makes"
    );
    ensure!(
        made.core.answers().eq(kept.core.answers()),
        "the checkpoint has other answers than the journal makes"
    );
    ensure!(
        made.under_way == kept.under_way,
        "the checkpoint has other pushes under way than the journal makes"
    );
    ensure!(made.replicas.len() == kept.replicas.len(), "the checkpoint has another number of replicas");
    for ((worker, parts), (of, replica)) in made.replicas.iter().zip(&kept.replicas) {
        ensure!(worker == of, "the checkpoint has other workers than the journal makes");
        same_bits(&format!("the replica of {worker}"), &flat(parts), replica)?;
    }
    Ok(kept.replicas.len() as u64)
}

fn same_bits(what: &str, made: &[f32], kept: &[f32]) -> anyhow::Result<()> {
    ensure!(
        made.len() == kept.len(),
        "{what} has {} elements, and {} by the journal",
        kept.len(),
        made.len()
    );
    match made.iter().zip(kept).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(at) => bail!("element {at} of {what} is {}, and {} by the journal", kept[at], made[at]),
    }
}

/// Counts by hand what the records say.
#[derive(Default)]
struct Ledger {
    next: BTreeMap<SessionId, Seq>,
    /// The last push of every session that had one, also of those that ended.
    last: BTreeMap<SessionId, Seq>,
    batches: BTreeSet<BatchId>,
    losses: Vec<f32>,
    pushes: u64,
    steps: u64,
    sessions: u64,
}

impl Ledger {
    fn take(&mut self, record: &Record<'_>, effect: Effect) -> anyhow::Result<()> {
        use sanderling_server::core::Note;
        match record {
            Record::Pushed(push) => {
                let (session, seq) = (push.session, push.seq);
                let next = self.next.get_mut(&session).with_context(|| format!("{session} is not open"))?;
                ensure!(seq == *next, "{seq} of {session} was applied where {next} was next");
                *next = Seq(next.0 + 1);
                self.last.insert(session, seq);
                ensure!(self.batches.insert(push.batch), "{} was done twice", push.batch);
                self.pushes += 1;
                let Effect::Pushed { step, applies, .. } = effect else { bail!("a push had no effect") };
                self.steps += u64::from(applies);
                ensure!(step.0 == self.steps, "{step} came where {} was next", self.steps);
                if applies {
                    self.losses.push(push.loss);
                }
            }
            Record::Noted(note) => match **note {
                Note::Opened(session) => {
                    self.sessions += 1;
                    self.next.insert(session, Seq(1));
                }
                Note::Closed(session) => drop(self.next.remove(&session)),
                _ => {}
            },
        }
        Ok(())
    }

    fn check(&self, Acknowledged { session, seq }: Acknowledged) -> anyhow::Result<()> {
        let last = self.last.get(&session).copied().unwrap_or(Seq(0));
        ensure!(last >= seq, "{seq} of {session} was acknowledged, and the journal ends for it at {last}");
        Ok(())
    }

    fn conclude(&self, findings: &mut Findings) -> anyhow::Result<()> {
        let tenth = self.losses.len() / SHARE;
        ensure!(tenth > 0, "{} updates are too few to see a loss go down", self.losses.len());
        let mean = |losses: &[f32]| losses.iter().copied().map(f64::from).sum::<f64>() / losses.len() as f64;
        findings.first_loss = mean(&self.losses[..tenth]);
        findings.last_loss = mean(&self.losses[self.losses.len() - tenth..]);
        (findings.pushes, findings.steps, findings.sessions) = (self.pushes, self.steps, self.sessions);
        ensure!(
            findings.last_loss < findings.first_loss,
            "the loss went from {:.3} to {:.3}",
            findings.first_loss,
            findings.last_loss
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_push_that_the_journal_lacks_is_found() {
        let (one, two) = (SessionId(1), SessionId(2));
        let ledger = Ledger { last: BTreeMap::from([(one, Seq(7))]), ..Ledger::default() };
        let check = |session, seq| ledger.check(Acknowledged { session, seq: Seq(seq) });
        assert!(check(one, 6).is_ok() && check(one, 7).is_ok() && check(two, 0).is_ok());
        for (session, seq) in [(one, 8), (two, 1)] {
            let error = check(session, seq).unwrap_err().to_string();
            assert!(error.contains(&format!("push {seq} of {session} was acknowledged")), "{error}");
        }
    }
}
