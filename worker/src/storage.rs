//! What a worker keeps on disk so that another process can go on in its session.
//!
//! Before a push is sent for the first time, everything that the worker needs to go on from there is written, in turn into
//! one of two files, and synced. A crash may leave the one that was being written in any state: its push was never sent,
//! and the other file holds the push before it, whose answer the server has stored. So a worker that is started again
//! sends its last push again, and repeats and skips nothing.
//!
//! | name | content |
//! | --- | --- |
//! | `lock` | locked by the worker that uses the folder |
//! | `push-0`, `push-1` | as below; the one with the higher sequence number counts |
//!
//! All integers are little-endian.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | `sndrwork` |
//! | 4 | format version, 2 |
//! | 32 | the pin of the server |
//! | 8, 8, 8, 4 | lengths: of the place, of the push, of the model in parameters; how many vectors the method carries |
//! | length | [`WorkerPlace`], in [`binary`]'s form |
//! | length | the push, as it is sent |
//! | 4·P each | θ_k, then the method's vectors, float32 |
//! | 4 | CRC-32 of all the above |

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use sanderling_common::binary;
use sanderling_common::folder_lock::{FolderLock, FolderLockError};
use sanderling_common::ids::Seq;
use sanderling_common::wire::Push;

use crate::core::{RestoredWorker, WorkerImage, WorkerPlace};

const MAGIC: &[u8; 8] = b"sndrwork";

/// The version of the format.
const VERSION: u32 = 2;

/// The longest place: a worker holds at most so many leases.
const PLACE_BYTES_MAX: usize = 1 << 20;

/// Vectors of any method, at most.
const VECTORS_MAX: u32 = 4;

/// Floats that are turned into bytes at a time.
const FLOATS_AT_A_TIME: usize = 1 << 14;

/// Why a worker's state cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("cannot keep the worker's state in {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another worker uses it, or it cannot be used at all.
    #[error("cannot keep the worker's state: {0}; each worker needs a folder of its own")]
    Lock(#[from] FolderLockError),
    /// A folder of a newer release.
    #[error("{path} has format {found}; this release reads {VERSION}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

/// A worker's state folder, locked.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    pin: [u8; 32],
    /// The push that is written last.
    kept: Option<Seq>,
    _lock: FolderLock,
}

impl StateFolder {
    /// Makes the folder if it is not there, and locks it, for work for the server with this pin.
    ///
    /// # Errors
    /// [`StateError::Lock`].
    pub fn open(path: &Path, pin: [u8; 32]) -> Result<Self, StateError> {
        Ok(Self { path: path.to_owned(), pin, kept: None, _lock: FolderLock::take(path)? })
    }

    fn file(&self, seq: Seq) -> PathBuf {
        self.path.join(format!("push-{}", seq.0 % 2))
    }

    /// The worker that was killed here, if it worked for the same server.
    ///
    /// # Errors
    /// [`StateError::Io`] or [`StateError::Newer`].
    pub fn load(&self) -> Result<Option<RestoredWorker>, StateError> {
        let mut last: Option<RestoredWorker> = None;
        for seq in [Seq(0), Seq(1)] {
            let path = self.file(seq);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(StateError::Io { path, source }),
            };
            let kept = decode(&bytes, self.pin).map_err(|found| StateError::Newer { path, found })?;
            // Both are of one session, since a new one begins with none.
            if let Some(worker) = kept
                && last.as_ref().is_none_or(|last| last.push.seq < worker.push.seq)
            {
                last = Some(worker);
            }
        }
        Ok(last)
    }

    /// Whether this push is written already.
    pub fn keeps(&self, push: &Push) -> bool {
        self.kept == Some(push.seq)
    }

    /// Writes a worker down; when this returns, it is there whatever happens.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn keep(&mut self, worker: &WorkerImage<'_>) -> Result<(), StateError> {
        let path = self.file(worker.push.seq);
        let is_new = !path.exists();
        let write = || {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).write(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let file = options.open(&path)?;
            let mut out =
                Summing { inner: BufWriter::new(&file), hasher: crc32fast::Hasher::new(), bytes: 0 };
            write(&mut out, worker, self.pin)?;
            let (sum, bytes) = (out.hasher.clone().finalize(), out.bytes + 4);
            out.write_all(&sum.to_le_bytes())?;
            out.flush()?;
            drop(out);
            file.set_len(bytes)?;
            file.sync_all()?;
            // A name that is new is to last as well, of either file.
            if is_new && cfg!(unix) { File::open(&self.path)?.sync_all() } else { Ok(()) }
        };
        write().map_err(|source| StateError::Io { path: path.clone(), source })?;
        self.kept = Some(worker.push.seq);
        Ok(())
    }

    /// The session is over, and nobody is to go on in it.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn clear(&mut self) -> Result<(), StateError> {
        self.kept = None;
        for seq in [Seq(0), Seq(1)] {
            let path = self.file(seq);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(StateError::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Sums up what passes.
struct Summing<W> {
    inner: W,
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn write(out: &mut impl Write, worker: &WorkerImage<'_>, pin: [u8; 32]) -> io::Result<()> {
    let place = binary::encode::<PLACE_BYTES_MAX>(&worker.place);
    let place = place.expect("the bound on leases keeps it short");
    let mut push = Vec::new();
    worker.push.encode(&mut push);
    out.write_all(MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&pin)?;
    for length in [place.len(), push.len(), worker.theta.len()] {
        out.write_all(&(length as u64).to_le_bytes())?;
    }
    out.write_all(&(worker.vectors.len() as u32).to_le_bytes())?;
    out.write_all(&place)?;
    out.write_all(&push)?;
    let mut buffer = Vec::with_capacity(4 * FLOATS_AT_A_TIME);
    for vector in [&worker.theta].into_iter().chain(&worker.vectors) {
        for floats in vector.chunks(FLOATS_AT_A_TIME) {
            buffer.clear();
            floats.iter().for_each(|float| buffer.extend_from_slice(&float.to_le_bytes()));
            out.write_all(&buffer)?;
        }
    }
    Ok(())
}

/// What a file ends with that has these bytes before it.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The worker in the bytes of a file; none in one that is torn, or of work for another server.
///
/// # Errors
/// The version, if it is another than this release's.
pub fn decode(bytes: &[u8], pin: [u8; 32]) -> Result<Option<RestoredWorker>, u32> {
    let Some((body, sum)) = bytes.split_last_chunk::<4>() else { return Ok(None) };
    if body.get(..8) != Some(&MAGIC[..]) || checksum(body) != u32::from_le_bytes(*sum) {
        return Ok(None);
    }
    let version = body.get(8..12).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    match version {
        Some(VERSION) => Ok(parse(&body[12..], pin)),
        Some(found) => Err(found),
        None => Ok(None),
    }
}

/// The worker in what follows the version; none if it is for another server.
fn parse(mut rest: &[u8], pin: [u8; 32]) -> Option<RestoredWorker> {
    let found: [u8; 32] = take(&mut rest)?;
    let mut length = || take(&mut rest).map(u64::from_le_bytes);
    let (place, push, parameters) = (length()?, length()?, length()?);
    let vectors = u32::from_le_bytes(take(&mut rest)?);
    if found != pin || vectors > VECTORS_MAX {
        return None;
    }
    let place: WorkerPlace = binary::decode::<_, PLACE_BYTES_MAX>(cut(&mut rest, place)?).ok()?;
    let push = Push::decode(cut(&mut rest, push)?).ok()?;
    let mut floats = || {
        let bytes = cut(&mut rest, parameters.checked_mul(4)?)?;
        let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        Some(bytes.chunks_exact(4).map(float).collect::<Vec<_>>())
    };
    let theta = floats()?;
    let vectors = (0..vectors).map(|_| floats()).collect::<Option<_>>()?;
    rest.is_empty().then_some(RestoredWorker { place, push, theta, vectors })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let mut array = [0; N];
    rest.read_exact(&mut array).ok()?;
    Some(array)
}

fn cut<'a>(rest: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = tail;
    Some(head)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sanderling_common::config::RunConfig;
    use sanderling_common::ids::{BatchId, SessionId, Step};
    use sanderling_common::layout::Layout;
    use sanderling_common::wire::{Answer, BatchRange, Work};

    use super::*;
    use crate::core::{ImageError, WorkerCore, WorkerSettings};

    const PIN: [u8; 32] = [4; 32];

    fn layout(elements: usize) -> Arc<Layout> {
        Arc::new(Layout::new([("a".to_owned(), vec![elements])]).unwrap())
    }

    fn settings() -> WorkerSettings {
        WorkerSettings::from(&RunConfig::default())
    }

    /// A worker after that many pushes, the last one pending.
    fn worker(pushes: u64) -> WorkerCore {
        let mut core = WorkerCore::new(layout(5), &settings(), SessionId(9), vec![1.0; 5], Step(0));
        let batches = Some(BatchRange { first: BatchId(0), count: 8 });
        core.add_work(&Work { batches, ..Work::default() }).unwrap();
        for push in 1..=pushes {
            core.view();
            let batch = core.next_batch().unwrap();
            let seq = core.handle_gradient(batch, &[0.5, -1.0, 2.0, 0.0, 1.0], 1.0, 0.0, 7, 0).unwrap().seq;
            if push < pushes {
                let (step, staleness, work) = (Step(push), 0, Work::default());
                let payload = core.pending().unwrap().payload.clone();
                core.handle_answer(&Answer { seq, step, staleness, work, payload }).unwrap();
            }
        }
        core
    }

    fn keep(folder: &mut StateFolder, pushes: u64) {
        let mut worker = worker(pushes);
        let Ok(image) = worker.image();
        folder.keep(&image.unwrap()).unwrap();
    }

    #[test]
    fn the_last_whole_push_counts() {
        let temporary = tempfile::tempdir().unwrap();
        let mut folder = StateFolder::open(temporary.path(), PIN).unwrap();
        assert!(folder.load().unwrap().is_none());
        (1..=3).for_each(|pushes| keep(&mut folder, pushes));
        let loaded = folder.load().unwrap().unwrap();
        assert_eq!((loaded.session(), loaded.push.seq), (SessionId(9), Seq(3)));
        let restored = WorkerCore::restore(layout(5), &settings(), loaded).unwrap();
        let (expected, mut live) = (worker(3), restored);
        assert_eq!(live.pending(), expected.pending());
        assert_eq!((live.theta(), live.next_batch()), (expected.theta(), Some(BatchId(3))));
        assert_eq!(live.method().accumulators(), expected.method().accumulators());
        assert_eq!(live.view(), worker(3).view());

        // Torn at any place, the file leaves the push before, which the server has answered.
        let last = folder.file(Seq(3));
        let whole = fs::read(&last).unwrap();
        for length in (0..whole.len()).step_by(7) {
            fs::write(&last, &whole[..length]).unwrap();
            assert_eq!(folder.load().unwrap().unwrap().push.seq, Seq(2));
        }
        fs::write(&last, &whole).unwrap();
        folder.clear().unwrap();
        assert!(folder.load().unwrap().is_none());
    }

    #[test]
    fn what_is_of_another_server_release_or_run_is_not_taken() {
        let temporary = tempfile::tempdir().unwrap();
        let mut folder = StateFolder::open(temporary.path(), PIN).unwrap();
        let second = StateFolder::open(temporary.path(), PIN).unwrap_err().to_string();
        assert!(second.contains("another process is using the folder"), "{second}");
        keep(&mut folder, 1);
        let loaded = folder.load().unwrap().unwrap();
        let other = WorkerCore::restore(layout(6), &settings(), loaded.clone());
        assert_eq!(other.err(), Some(ImageError::Layout));
        let mut method = settings();
        method.method.method = sanderling_common::method::Method::Dgs;
        assert_eq!(WorkerCore::restore(layout(5), &method, loaded).err(), Some(ImageError::Method));
        let path = folder.file(Seq(1));
        let mut bytes = fs::read(&path).unwrap();
        drop(folder);
        assert!(StateFolder::open(temporary.path(), [5; 32]).unwrap().load().unwrap().is_none());
        bytes[8] = VERSION as u8 + 1;
        let length = bytes.len() - 4;
        let sum = crc32fast::hash(&bytes[..length]);
        bytes[length..].copy_from_slice(&sum.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let newer = StateFolder::open(temporary.path(), PIN).unwrap().load().unwrap_err();
        assert!(matches!(newer, StateError::Newer { found, .. } if found == VERSION + 1), "{newer}");
    }
}
