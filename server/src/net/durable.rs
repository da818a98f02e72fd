//! Keeping a run's decisions, and going on from them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use sanderling_common::config::{Durability, RunConfig, ServerSettings as Serving};
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::report::one_sentence;
use tracing::{debug, info, warn};

use super::ServerError;
use crate::core::{Effect, Image, Log, Mutation, Note, Record, Replay, ServerCore, ServerSettings, Shard};
use crate::recorder::{Books, PushRecord, Recorder};
use crate::storage::{
    CheckpointFileError, CheckpointStore, Commit, Disk, Journal, JournalError, JournalFailed, Position,
    ReadJournal, RestoredState, RunId, SEGMENT_BYTES, Stamp, StateCheckpoint, StateError, StoreError,
};

/// Records between two lines about a recovery that takes long.
const TELL_EVERY: Position = 10_000;

/// The time and the traffic of a run, over all servers that served it.
#[derive(Debug)]
pub(super) struct Clock {
    started: Instant,
    seconds_before: f64,
    /// The traffic when it was last looked at.
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
}

impl Clock {
    /// Goes on from where an earlier server's stopped.
    fn after(stamp: Stamp) -> Self {
        Self {
            started: Instant::now(),
            seconds_before: stamp.seconds,
            bytes_up: AtomicU64::new(stamp.bytes_up),
            bytes_down: AtomicU64::new(stamp.bytes_down),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    pub(super) fn set_bytes(&self, (up, down): (u64, u64)) {
        self.bytes_up.store(up, Ordering::Relaxed);
        self.bytes_down.store(down, Ordering::Relaxed);
    }

    fn stamp(&self) -> Stamp {
        Stamp {
            seconds: self.seconds(),
            bytes_up: self.bytes_up.load(Ordering::Relaxed),
            bytes_down: self.bytes_down.load(Ordering::Relaxed),
        }
    }
}

/// Books the core's decisions and, where they are kept, writes them into the journal. It is told of them in their order,
/// so that the books are the fold over them, live as in recovery.
#[derive(Debug)]
struct Ledger {
    clock: Arc<Clock>,
    recorder: Arc<Mutex<Recorder>>,
    /// None where nothing is kept.
    commit: Option<Arc<Commit>>,
}

impl Log for Ledger {
    fn append(&self, record: &Record<'_>, effect: Effect) {
        let stamp = self.clock.stamp();
        if let Some(commit) = &self.commit {
            let mut body = Vec::new();
            stamp.encode(&mut body);
            record.encode(&mut body);
            commit.append(&body);
        }
        let mut recorder = self.recorder.lock().expect("no holder of the books panics");
        book(recorder.books_mut(), record, effect, stamp);
    }
}

/// Puts a decision into the books.
fn book(books: &mut Books, record: &Record<'_>, effect: Effect, stamp: Stamp) {
    match record {
        Record::Pushed(push) => {
            let Effect::Pushed { step, staleness, applies, snapshot } = effect else {
                unreachable!("a push has the effect of one")
            };
            // A push that came after an early end is neither applied nor skipped.
            if applies || push.skipped {
                books.pushed(PushRecord::of(push, step, staleness, stamp.seconds));
            }
            if snapshot {
                books.marked(stamp.bytes_up, stamp.bytes_down);
            }
        }
        Record::Noted(note) => match &**note {
            Note::Opened(_) => books.session_opened(),
            Note::Reported(_, report) => books.evaluated(report),
            Note::Stopped => {
                if let Effect::Stopped { snapshot: Some(_) } = effect {
                    books.marked(stamp.bytes_up, stamp.bytes_down);
                }
            }
            Note::Closed(_) | Note::Answered(..) | Note::Asked(_) | Note::SnapshotReady(_) => {}
        },
    }
}

/// Knows when what was decided is kept, and writes down the whole state now and then.
#[derive(Debug)]
pub(super) struct Keeper {
    clock: Arc<Clock>,
    recorder: Arc<Mutex<Recorder>>,
    kept: Option<Kept>,
}

/// Where decisions are kept.
#[derive(Debug)]
struct Kept {
    commit: Arc<Commit>,
    journal: Box<dyn Segments>,
    store: CheckpointStore,
    /// For a store that is elsewhere than the state folder.
    run_file: Option<String>,
    keep_journal: bool,
    /// A defect that tests switch on: nobody waits for anything to be kept.
    hasty: bool,
}

/// What is asked of a journal while another thread writes it, on whatever disk.
trait Segments: std::fmt::Debug + Send + Sync {
    fn remove_before(&self, position: Position) -> Result<(), JournalError>;
}

impl<D: Disk> Segments for Journal<D> {
    fn remove_before(&self, position: Position) -> Result<(), JournalError> {
        self.remove_before(position)
    }
}

/// What was known beside the core when its image was taken.
pub(super) struct Moment {
    position: Position,
    stamp: Stamp,
    books: Books,
}

impl Moment {
    pub(super) fn position(&self) -> Position {
        self.position
    }
}

impl Keeper {
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().expect("no holder of the books panics")
    }

    /// Waits until everything that was decided by now is kept; for ever once nothing can be kept any more, because then
    /// nobody may learn of it. The server is about to end.
    pub(super) async fn kept(&self) {
        if let Some(kept) = &self.kept
            && !kept.hasty
            && kept.commit.kept().await.is_err()
        {
            std::future::pending().await
        }
    }

    /// Whether anything is kept.
    pub(super) fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// Waits until nothing can be kept any more, if that ever happens.
    pub(super) async fn failed(&self) -> JournalFailed {
        match &self.kept {
            Some(kept) => kept.commit.failed().await,
            None => std::future::pending().await,
        }
    }

    /// Writes what was decided by now, and takes no more.
    pub(super) fn close(&self) {
        if let Some(kept) = &self.kept {
            kept.commit.close();
        }
    }

    /// How many decisions there were.
    pub(super) fn position(&self) -> Position {
        self.kept.as_ref().map_or(0, |kept| kept.commit.next())
    }

    /// What is known beside the core; called while the order of steps is held.
    pub(super) fn moment(&self) -> Moment {
        let (stamp, books) = (self.clock.stamp(), self.recorder().books().clone());
        Moment { position: self.position(), stamp, books }
    }

    /// Writes down an image, and removes what it makes superfluous.
    ///
    /// # Errors
    /// A [`StoreError`]; the checkpoints before are there still.
    pub(super) async fn write(&self, moment: Moment, image: Image) -> Result<(), StoreError> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let Moment { position, stamp, books } = moment;
        let started = Instant::now();
        // A checkpoint of what the journal does not hold would leave a gap in it.
        if kept.commit.synced_to(position).await.is_err() {
            return Ok(());
        }
        let checkpoint = StateCheckpoint { position, stamp, books, image };
        if let Some(run_file) = &kept.run_file {
            kept.store.write_run(run_file.clone()).await?;
        }
        kept.store.write(Arc::new(checkpoint)).await?;
        let needed_from = kept.store.remove_old().await?;
        if let Some(needed_from) = needed_from.filter(|_| !kept.keep_journal)
            && let Err(error) = kept.journal.remove_before(needed_from)
        {
            warn!("the part of the journal that is not needed any more stays: {}", one_sentence(&error));
        }
        debug!("wrote the state at record {position} in {:.2} s", started.elapsed().as_secs_f64());
        Ok(())
    }
}

/// What a server begins with.
pub(super) struct Beginnings {
    pub(super) core: ServerCore,
    pub(super) shards: Vec<Shard>,
    pub(super) snapshots: BTreeMap<Step, Arc<[f32]>>,
    /// Of an earlier server, all without a connection.
    pub(super) sessions: Vec<SessionId>,
    pub(super) stamp: Stamp,
    pub(super) keeper: Keeper,
}

/// The run that begins, or is gone on with.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) layout: &'a Arc<Layout>,
    pub(super) run: &'a RunConfig,
    /// The model before the first step.
    pub(super) initial: &'a [f32],
    pub(super) active_parameters: usize,
}

impl Subject<'_> {
    fn recorder(&self, books: Books) -> Arc<Mutex<Recorder>> {
        let recorder = Recorder::new(self.run.clone(), self.layout.len(), self.active_parameters, books);
        Arc::new(Mutex::new(recorder))
    }
}

impl Beginnings {
    /// A run from its first step, of which nothing is kept.
    pub(super) fn fresh(subject: Subject<'_>) -> Self {
        let settings = ServerSettings::from(subject.run);
        let (mut core, shards) = ServerCore::new(subject.layout, subject.initial, &settings);
        let clock = Arc::new(Clock::after(Stamp::default()));
        let recorder = subject.recorder(Books::default());
        core.set_log(Box::new(Ledger { clock: clock.clone(), recorder: recorder.clone(), commit: None }));
        Self {
            core,
            shards,
            snapshots: BTreeMap::new(),
            sessions: Vec::new(),
            stamp: Stamp::default(),
            keeper: Keeper { clock, recorder, kept: None },
        }
    }

    /// The run in a state folder, whose journal is on `disk`, from its last checkpoint to its last record, and the journal
    /// of what comes next.
    pub(super) fn recover<D: Disk + 'static>(
        folder: &Path,
        disk: D,
        id: RunId,
        subject: Subject<'_>,
    ) -> Result<Self, ServerError> {
        let server = &subject.run.server;
        if server.durability == Durability::None {
            return Ok(Self::fresh(subject));
        }
        let started = Instant::now();
        let journal = Journal::new(Arc::new(disk), id, SEGMENT_BYTES);
        let store = CheckpointStore::open(folder, &server.checkpoint_url, id)?;
        let (last, state) = last_checkpoint(folder, &server.checkpoint_url, id)?;
        if let Some(position) = last
            && journal.is_empty()?
        {
            return Err(StateError::NoJournal { path: folder.to_owned(), position }.into());
        }
        let mut past = match state {
            None => Past::none(subject),
            Some(state) => Past::restore(subject, state)?,
        };
        let from = past.position;
        let read = past.read(&journal)?;
        if read.torn_bytes > 0 {
            warn!(
                "the last {} bytes of the journal were no whole record and are left out; a crash in the middle of a write \
                 leaves such an end",
                read.torn_bytes
            );
        }
        let Past { replay, books, stamp, position } = past;
        if position > 0 {
            let (step, seconds) = (replay.server().core().standing().step, started.elapsed().as_secs_f64());
            info!(
                "recovered {step}: a checkpoint of {from} decisions, {} since, in {seconds:.1} s",
                position - from
            );
        }
        let commit = Arc::new(Commit::start(journal.write_from(read.next)?, server.durability));
        let (clock, recorder) = (Arc::new(Clock::after(stamp)), subject.recorder(books));
        let ledger =
            Ledger { clock: clock.clone(), recorder: recorder.clone(), commit: Some(commit.clone()) };
        let recovered = replay.finish(Box::new(ledger));
        let (journal, hasty) = (Box::new(journal), Mutation::AnswerBeforeJournal.is_on());
        let run_file = (!server.checkpoint_url.is_empty()).then(|| {
            let mut run = subject.run.clone();
            run.make_paths_absolute();
            run.to_toml()
        });
        let kept = Kept { commit, journal, store, run_file, keep_journal: server.keep_journal, hasty };
        Ok(Self {
            core: recovered.core,
            shards: recovered.shards,
            snapshots: recovered.snapshots,
            sessions: recovered.sessions,
            stamp,
            keeper: Keeper { clock, recorder, kept: Some(kept) },
        })
    }
}

/// Checks that a run that begins does so beside nobody's checkpoints.
///
/// # Errors
/// A [`StoreError`].
pub(super) fn check_beginning(server: &Serving) -> Result<(), StoreError> {
    match server.checkpoint_url.as_str() {
        "" => Ok(()),
        url => on_another_thread(CheckpointStore::check_empty(url)),
    }
}

/// The position of the last checkpoint, and the last that can be read; none if there is none. One that is damaged is passed
/// over, since its predecessor and the journal are there; a newer release's is an error, since what follows it may be newer
/// too.
fn last_checkpoint(
    folder: &Path,
    url: &str,
    id: RunId,
) -> Result<(Option<Position>, Option<RestoredState>), ServerError> {
    on_another_thread(async {
        let store = CheckpointStore::open(folder, url, id)?;
        let positions = store.positions().await?;
        let last = positions.last().copied();
        for position in positions.into_iter().rev() {
            match store.read(position).await {
                Ok(state) => return Ok((last, Some(state))),
                Err(error @ StoreError::File { source: CheckpointFileError::Newer(_), .. }) => {
                    return Err(error.into());
                }
                Err(error) => warn!("{}; going back to the one before", one_sentence(&error)),
            }
        }
        Ok((last, None))
    })
}

/// Waits for a future although the caller's runtime has this thread, and may have no other.
fn on_another_thread<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("the system has what a runtime needs").block_on(future)
        });
        thread.join().expect("reading checkpoints does not panic")
    })
}

/// The fold over the records so far.
struct Past {
    replay: Replay,
    books: Books,
    stamp: Stamp,
    /// Records that it is of.
    position: Position,
}

impl Past {
    fn none(Subject { layout, run, initial, .. }: Subject<'_>) -> Self {
        let replay = Replay::new(layout, initial, &ServerSettings::from(run));
        Self { replay, books: Books::default(), stamp: Stamp::default(), position: 0 }
    }

    fn restore(
        Subject { layout, run, initial, .. }: Subject<'_>,
        state: RestoredState,
    ) -> Result<Self, ServerError> {
        let RestoredState { position, stamp, books, image } = state;
        let of_another_run = |source| ServerError::Checkpoint { position, source };
        let replay = Replay::restore(layout, initial, &ServerSettings::from(run), image);
        Ok(Self { replay: replay.map_err(of_another_run)?, books, stamp, position })
    }

    /// Takes the records that follow.
    fn read<D: Disk>(&mut self, journal: &Journal<D>) -> Result<ReadJournal, ServerError> {
        journal.read(self.position, |position, body| {
            let damaged = |what: String| ServerError::Record { position, what };
            let (stamp, record) = Stamp::split(body).ok_or_else(|| damaged("it is too short".to_owned()))?;
            let record = Record::decode(record).map_err(|error| damaged(error.to_string()))?;
            let effect = self.replay.apply(&record).map_err(|error| damaged(error.to_string()))?;
            book(&mut self.books, &record, effect, stamp);
            (self.stamp, self.position) = (stamp, position + 1);
            if self.position.is_multiple_of(TELL_EVERY) {
                info!("recovered {} decisions", self.position);
            }
            Ok(())
        })
    }
}
