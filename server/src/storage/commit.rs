//! Writing and syncing beside those who wait for it: whatever is appended while a sync is under way shares the next one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sanderling_common::config::Durability;
use tokio::sync::watch;

use super::disk::Disk;
use super::journal::{JournalError, Position, Writer, encode_record};

/// With [`Durability::Async`], what was written is synced this often: what a power cut can cost.
pub const ASYNC_SYNC_EVERY: Duration = Duration::from_millis(200);

/// The journal cannot be written any more, and nothing more can be acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the journal cannot be written ({0}); free some space or repair the disk, then start the server again"
)]
pub struct JournalFailed(String);

/// Records that are not written yet: at most those of a push and an answer per session, since a worker sends nothing
/// more until it is answered.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    count: u64,
    next: Position,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics while it holds the queue")
    }
}

#[derive(Clone, Debug)]
struct Progress {
    /// Records before this one are kept.
    kept: Position,
    /// Records before this one are on the disk for good.
    synced: Position,
    failure: Option<JournalFailed>,
}

/// A journal with a thread that writes it.
#[derive(Debug)]
pub struct Commit {
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Commit {
    /// Starts the thread. [`Durability::None`] is for whoever has no journal.
    ///
    /// # Panics
    /// If the system has no thread to give.
    pub fn start<D: Disk + 'static>(writer: Writer<D>, durability: Durability) -> Self {
        let next = writer.next();
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { next, ..Queue::default() }),
            filled: Condvar::new(),
        });
        let (told, progress) = watch::channel(Progress { kept: next, synced: next, failure: None });
        let queue = shared.clone();
        let work = move || {
            if let Err(error) = write(&queue, writer, durability, &told) {
                queue.queue().closed = true;
                told.send_modify(|progress| progress.failure = Some(JournalFailed(error.to_string())));
            }
        };
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(work);
        let thread = Mutex::new(Some(thread.expect("the system has a thread for the journal")));
        Self { shared, progress, thread }
    }

    /// Appends a record, which is kept once [`kept`](Self::kept) says so.
    pub fn append(&self, body: &[u8]) {
        let mut queue = self.shared.queue();
        if queue.closed {
            return;
        }
        let position = queue.next;
        encode_record(position, body, &mut queue.bytes);
        queue.next += 1;
        queue.count += 1;
        drop(queue);
        self.shared.filled.notify_one();
    }

    /// The position of the next record.
    pub fn next(&self) -> Position {
        self.shared.queue().next
    }

    /// Waits until everything before a record that was appended is synced.
    ///
    /// # Errors
    /// [`JournalFailed`], also if the journal is closed before that.
    pub async fn synced_to(&self, position: Position) -> Result<(), JournalFailed> {
        let mut progress = self.progress.clone();
        let reached =
            progress.wait_for(|progress| progress.synced >= position || progress.failure.is_some()).await;
        match reached {
            Ok(progress) if progress.synced >= position => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// Waits until everything that was appended by now is kept.
    ///
    /// # Errors
    /// [`JournalFailed`]; so does every later call.
    pub async fn kept(&self) -> Result<(), JournalFailed> {
        let wanted = {
            let queue = self.shared.queue();
            // What is decided after the end is not kept.
            if queue.closed {
                return Err(self.failure());
            }
            queue.next
        };
        let mut progress = self.progress.clone();
        let reached =
            progress.wait_for(|progress| progress.kept >= wanted || progress.failure.is_some()).await;
        let Ok(progress) = reached else { return Err(self.failure()) };
        match &progress.failure {
            Some(failure) if progress.kept < wanted => Err(failure.clone()),
            _ => Ok(()),
        }
    }

    fn failure(&self) -> JournalFailed {
        let known = self.progress.borrow().failure.clone();
        known.unwrap_or_else(|| JournalFailed("it was closed".to_owned()))
    }

    /// Waits until the journal cannot be written any more, if that ever happens.
    pub async fn failed(&self) -> JournalFailed {
        let mut progress = self.progress.clone();
        if let Ok(progress) = progress.wait_for(|progress| progress.failure.is_some()).await
            && let Some(failure) = &progress.failure
        {
            return failure.clone();
        }
        std::future::pending().await
    }

    /// Writes and syncs what was appended, and takes nothing more.
    pub fn close(&self) {
        self.shared.queue().closed = true;
        self.shared.filled.notify_one();
        let thread = self.thread.lock().expect("nothing panics while it holds the thread").take();
        if let Some(thread) = thread {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Commit {
    fn drop(&mut self) {
        self.close();
    }
}

/// Writes until the queue is closed and empty.
fn write<D: Disk>(
    shared: &Shared,
    mut writer: Writer<D>,
    durability: Durability,
    told: &watch::Sender<Progress>,
) -> Result<(), JournalError> {
    let syncs_each = durability == Durability::Group;
    let (mut bytes, mut unsynced_since) = (Vec::new(), None::<Instant>);
    loop {
        let count = {
            let mut queue = shared.queue();
            while queue.count == 0 && !queue.closed {
                queue = match unsynced_since {
                    None => shared.filled.wait(queue).expect("nothing panics while it holds the queue"),
                    Some(since) => {
                        let waited = shared.filled.wait_timeout(queue, until_sync(since, Instant::now()));
                        let (queue, waited) = waited.expect("nothing panics while it holds the queue");
                        if waited.timed_out() {
                            drop(queue);
                            sync(&mut writer, told)?;
                            unsynced_since = None;
                            shared.queue()
                        } else {
                            queue
                        }
                    }
                };
            }
            std::mem::swap(&mut bytes, &mut queue.bytes);
            std::mem::take(&mut queue.count)
        };
        if count == 0 {
            return sync(&mut writer, told);
        }
        writer.append_encoded(&bytes, count)?;
        bytes.clear();
        let since = *unsynced_since.get_or_insert_with(Instant::now);
        if syncs_each || until_sync(since, Instant::now()).is_zero() {
            sync(&mut writer, told)?;
            unsynced_since = None;
        }
        let kept = writer.next();
        told.send_modify(|progress| progress.kept = kept);
    }
}

/// How much longer the oldest record that is not synced may wait.
fn until_sync(since: Instant, now: Instant) -> Duration {
    ASYNC_SYNC_EVERY.saturating_sub(now.saturating_duration_since(since))
}

fn sync<D: Disk>(writer: &mut Writer<D>, told: &watch::Sender<Progress>) -> Result<(), JournalError> {
    writer.sync()?;
    let synced = writer.next();
    told.send_modify(|progress| progress.synced = synced);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::super::disk::{Directory, DiskFile};
    use super::super::journal::{Journal, RunId, SEGMENT_BYTES};
    use super::*;

    /// A directory that counts syncs, which take a while, and can be full.
    #[derive(Debug)]
    struct Slow {
        directory: Directory,
        syncs: Arc<AtomicU64>,
        full: Arc<AtomicBool>,
    }

    #[derive(Debug)]
    struct SlowFile {
        file: <Directory as Disk>::File,
        syncs: Arc<AtomicU64>,
        full: Arc<AtomicBool>,
    }

    impl Disk for Slow {
        type File = SlowFile;

        fn names(&self) -> io::Result<Vec<String>> {
            self.directory.names()
        }

        fn create(&self, name: &str) -> io::Result<SlowFile> {
            let (syncs, full) = (self.syncs.clone(), self.full.clone());
            Ok(SlowFile { file: self.directory.create(name)?, syncs, full })
        }

        fn replace(&self, name: &str) -> io::Result<SlowFile> {
            let (syncs, full) = (self.syncs.clone(), self.full.clone());
            Ok(SlowFile { file: self.directory.replace(name)?, syncs, full })
        }

        fn read(&self, name: &str) -> io::Result<Vec<u8>> {
            self.directory.read(name)
        }

        fn truncate(&self, name: &str, bytes: u64) -> io::Result<()> {
            self.directory.truncate(name, bytes)
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            self.directory.remove(name)
        }

        fn sync_names(&self) -> io::Result<()> {
            self.directory.sync_names()
        }
    }

    impl DiskFile for SlowFile {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            if self.full.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.file.append(bytes)
        }

        fn sync(&mut self) -> io::Result<()> {
            self.syncs.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(5));
            self.file.sync()
        }
    }

    fn records(folder: &tempfile::TempDir) -> Vec<Vec<u8>> {
        let journal = Journal::new(Arc::new(Directory::new(folder.path())), RunId([1; 16]), SEGMENT_BYTES);
        let mut records = Vec::new();
        let read = journal.read::<JournalError>(0, |_, body| {
            records.push(body.to_vec());
            Ok(())
        });
        read.unwrap();
        records
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_share_a_sync_and_what_is_kept_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (syncs, full) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let directory = Directory::new(folder.path());
        let disk = Arc::new(Slow { directory, syncs: syncs.clone(), full: full.clone() });
        let journal = Journal::new(disk, RunId([1; 16]), SEGMENT_BYTES);
        let commit = Arc::new(Commit::start(journal.write_from(0).unwrap(), Durability::Group));
        let tasks: Vec<_> = (0..200_u8)
            .map(|number| {
                let commit = commit.clone();
                tokio::spawn(async move {
                    commit.append(&[number; 20]);
                    commit.kept().await
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let shared = syncs.load(Ordering::Relaxed);
        assert!(shared < 100, "200 records took {shared} syncs");
        let mut kept = records(&folder);
        kept.sort();
        assert_eq!(kept, (0..200_u8).map(|number| vec![number; 20]).collect::<Vec<_>>());

        full.store(true, Ordering::Relaxed);
        commit.append(b"lost");
        let failure = commit.kept().await.unwrap_err();
        assert!(failure.to_string().contains("journal"), "{failure}");
        assert_eq!(commit.failed().await, failure);
        commit.append(b"lost too");
        assert_eq!(commit.kept().await.unwrap_err(), failure);
    }

    #[test]
    fn a_record_waits_for_the_rest_of_its_time_only() {
        let since = Instant::now();
        let after = |ms| until_sync(since, since + Duration::from_millis(ms));
        assert_eq!((after(0), after(150)), (ASYNC_SYNC_EVERY, ASYNC_SYNC_EVERY - Duration::from_millis(150)));
        assert!(after(200).is_zero() && after(1000).is_zero());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn closing_writes_what_is_queued() {
        for durability in [Durability::Group, Durability::Async] {
            let folder = tempfile::tempdir().unwrap();
            let journal =
                Journal::new(Arc::new(Directory::new(folder.path())), RunId([1; 16]), SEGMENT_BYTES);
            let commit = Commit::start(journal.write_from(0).unwrap(), durability);
            (0..50_u8).for_each(|number| commit.append(&[number]));
            commit.close();
            commit.append(b"too late");
            assert_eq!(records(&folder), (0..50_u8).map(|number| vec![number]).collect::<Vec<_>>());
        }
    }
}
