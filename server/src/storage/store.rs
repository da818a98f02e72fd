//! Where checkpoints are kept: a folder of this machine, or any object store.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use object_store::buffered::{BufReader, BufWriter};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt};
use sanderling_common::config::STATE_RUN_FILE;
use sanderling_common::folder_lock::make_private;
use sanderling_common::join::hex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;

use super::checkpoint::{CheckpointFileError, RestoredState, StateCheckpoint};
use super::journal::{Position, RunId};

/// Checkpoints that are kept, so that one that turns out to be damaged has a predecessor.
pub const CHECKPOINTS_KEPT: usize = 2;

/// The folder of checkpoints within a state folder.
pub const CHECKPOINTS_FOLDER: &str = "checkpoints";

/// Bytes that are read at a time; object stores charge for requests.
const READ_BYTES: usize = 4 << 20;

/// Bytes that are written at a time: object stores ask for parts of at least 5 MiB, and take at most 10 000 of them.
const PART_BYTES: usize = 16 << 20;

/// Parts that are on their way to a store at a time.
const PARTS_UNDER_WAY_MAX: usize = 2;

const PREFIX: &str = "state-";

/// Why checkpoints cannot be kept, or one not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL names no store that this program knows.
    #[error("cannot keep checkpoints in {url:?}: {source}")]
    Url {
        /// The setting.
        url: String,
        /// What is wrong with it.
        source: object_store::Error,
    },
    /// The store is one that this program was built without.
    #[error(
        "cannot keep checkpoints in {0:?}: this program was built without cloud stores; build it with --features cloud"
    )]
    NoCloud(String),
    /// The URL is none.
    #[error("cannot keep checkpoints in {0:?}: give a URL such as s3://bucket/folder or file:///folder")]
    NoUrl(String),
    /// Another run's checkpoints are there.
    #[error(
        "there are checkpoints of another run in {0:?}; restore that run's state folder to go on with it, or keep those of \
         this one elsewhere"
    )]
    Others(String),
    /// The store refused.
    #[error("the store of checkpoints refuses: {0}")]
    Store(#[from] object_store::Error),
    /// The folder cannot be made.
    #[error("cannot keep checkpoints: {0}")]
    Io(#[from] io::Error),
    /// The checkpoint of a position is of no use.
    #[error("the checkpoint of record {position} cannot be used: {source}")]
    File {
        /// Its position.
        position: Position,
        /// Why.
        source: CheckpointFileError,
    },
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    store: Arc<dyn ObjectStore>,
    run: RunId,
}

fn name(position: Position) -> ObjectPath {
    ObjectPath::from(format!("{PREFIX}{position:020}"))
}

fn position_of(path: &ObjectPath) -> Option<Position> {
    let digits = path.filename()?.strip_prefix(PREFIX)?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten()
}

/// Whether a file of this name is a checkpoint.
pub(super) fn is_checkpoint(name: &str) -> bool {
    position_of(&ObjectPath::from(name)).is_some()
}

impl CheckpointStore {
    /// The store at `url`, where the checkpoints of each run have a folder by its id; without a URL a folder in the state
    /// folder.
    ///
    /// # Errors
    /// [`StoreError::Url`], [`StoreError::NoUrl`], [`StoreError::NoCloud`] or [`StoreError::Io`].
    pub fn open(state_folder: &Path, url: &str, run: RunId) -> Result<Self, StoreError> {
        if url.is_empty() {
            let folder = state_folder.join(CHECKPOINTS_FOLDER);
            make_private(&folder)?;
            return Ok(Self { store: Arc::new(local(&folder)?), run });
        }
        let store = PrefixStore::new(at_url(url)?, hex(&run.0).as_str());
        Ok(Self { store: Arc::new(store), run })
    }

    /// Checks that no run's checkpoints are at `url`: whoever begins a run there may have meant to go on with that one,
    /// which takes its state folder, because certificate and keys are in no store.
    ///
    /// # Errors
    /// [`StoreError::Others`], or another [`StoreError`] if the store cannot be looked into.
    pub async fn check_empty(url: &str) -> Result<(), StoreError> {
        let store = at_url(url)?;
        for of_a_run in store.list_with_delimiter(None).await?.common_prefixes {
            let objects = store.list_with_delimiter(Some(&of_a_run)).await?.objects;
            if objects.iter().any(|object| position_of(&object.location).is_some()) {
                return Err(StoreError::Others(url.to_owned()));
            }
        }
        Ok(())
    }

    /// Writes the run file beside the checkpoints, for people and for whoever restores the state folder.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn write_run(&self, toml: String) -> Result<(), StoreError> {
        Ok(self.store.put(&ObjectPath::from(STATE_RUN_FILE), toml.into()).await.map(drop)?)
    }

    /// A store of any kind.
    pub fn new(store: Arc<dyn ObjectStore>, run: RunId) -> Self {
        Self { store, run }
    }

    /// The positions of the checkpoints that there are, ascending.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn positions(&self) -> Result<Vec<Position>, StoreError> {
        let objects = self.store.list_with_delimiter(None).await?.objects;
        let mut positions: Vec<_> =
            objects.iter().filter_map(|object| position_of(&object.location)).collect();
        positions.sort_unstable();
        Ok(positions)
    }

    /// Writes a checkpoint: it is there whole, and durably, or not at all.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub async fn write(&self, checkpoint: Arc<StateCheckpoint>) -> Result<(), StoreError> {
        let (run, position) = (self.run, checkpoint.position);
        let handle = Handle::current();
        let writer = BufWriter::with_capacity(self.store.clone(), name(position), PART_BYTES);
        let writer = writer.with_max_concurrency(PARTS_UNDER_WAY_MAX);
        let written = tokio::task::spawn_blocking(move || {
            let mut blocking = Blocking { handle, inner: writer };
            let written = checkpoint.write(run, &mut blocking);
            let Blocking { handle, inner: mut writer } = blocking;
            // What was not written whole must not appear.
            match written {
                Ok(()) => Ok(handle.block_on(writer.shutdown())?),
                Err(error) => {
                    let _ = handle.block_on(writer.abort());
                    Err(error)
                }
            }
        });
        let written = written.await.expect("writing a checkpoint does not panic");
        written.map_err(|source| StoreError::File { position, source })
    }

    /// Reads the checkpoint of a position.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read(&self, position: Position) -> Result<RestoredState, StoreError> {
        let meta = self.store.head(&name(position)).await?;
        let reader = BufReader::with_capacity(self.store.clone(), &meta, READ_BYTES);
        let (handle, run) = (Handle::current(), self.run);
        let read = tokio::task::spawn_blocking(move || {
            RestoredState::read(run, Blocking { handle, inner: reader }, meta.size)
        });
        let read = read.await.expect("reading a checkpoint does not panic");
        read.map_err(|source| StoreError::File { position, source })
    }

    /// Removes all but the last [`CHECKPOINTS_KEPT`]; returns the position of the first of those, which records before it
    /// are not needed for, once as many are there.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn remove_old(&self) -> Result<Option<Position>, StoreError> {
        let positions = self.positions().await?;
        let Some(surplus) = positions.len().checked_sub(CHECKPOINTS_KEPT) else { return Ok(None) };
        for &position in &positions[..surplus] {
            self.store.delete(&name(position)).await?;
        }
        Ok(positions.get(surplus).copied())
    }
}

/// The store at a URL, without regard to runs.
fn at_url(url: &str) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let parsed = url::Url::parse(url).map_err(|_| StoreError::NoUrl(url.to_owned()))?;
    let at = |source| StoreError::Url { url: url.to_owned(), source };
    if parsed.scheme() == "file" {
        let folder = parsed.to_file_path().map_err(|()| StoreError::NoUrl(url.to_owned()))?;
        std::fs::create_dir_all(&folder)?;
        Ok(Arc::new(local(&folder).map_err(at)?))
    } else if cfg!(not(feature = "cloud")) {
        Err(StoreError::NoCloud(url.to_owned()))
    } else {
        use_the_one_provider();
        // Credentials and endpoints are in the environment, as the stores' own tools have them.
        let (store, path) = object_store::parse_url_opts(&parsed, std::env::vars()).map_err(at)?;
        Ok(Arc::new(PrefixStore::new(store, path)))
    }
}

/// HTTPS takes the provider of cryptography that the process has, and QUIC has no need to install one.
fn use_the_one_provider() {
    #[cfg(feature = "cloud")]
    // It fails where somebody has installed one, which does as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Syncs what it writes, file and name.
fn local(folder: &Path) -> Result<LocalFileSystem, object_store::Error> {
    Ok(LocalFileSystem::new_with_prefix(folder)?.with_fsync(true))
}

/// Asynchronous reading and writing from a thread that may block.
struct Blocking<T> {
    handle: Handle,
    inner: T,
}

impl Write for Blocking<BufWriter> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.handle.block_on(self.inner.write(bytes))
    }

    /// The store decides when to send what it has; shutting down sends the rest.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Blocking<BufReader> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.handle.block_on(self.inner.read(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str) -> Result<CheckpointStore, StoreError> {
        CheckpointStore::open(Path::new("state"), url, RunId([1; 16]))
    }

    #[test]
    fn a_store_that_is_none_is_named_in_the_sentence() {
        for url in ["folder/of/mine", "s3:", "nowhere://bucket"] {
            let error = open(url).unwrap_err().to_string();
            assert!(error.contains(url), "{error}");
        }
        let s3 = open("s3://bucket/folder").map(drop);
        if cfg!(not(feature = "cloud")) {
            assert!(s3.unwrap_err().to_string().contains("--features cloud"));
        }
    }

    #[tokio::test]
    async fn only_the_last_two_are_kept_and_other_files_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let url = url::Url::from_directory_path(folder.path()).unwrap();
        let store = open(url.as_str()).unwrap();
        let of_the_run = folder.path().join(hex(&[1; 16]));
        std::fs::create_dir_all(&of_the_run).unwrap();
        for name in ["state-00000000000000000007", "state-00000000000000000900", "state-9", "notes.txt"] {
            std::fs::write(of_the_run.join(name), b"?").unwrap();
        }
        assert_eq!(store.positions().await.unwrap(), [7, 900]);
        assert_eq!(store.remove_old().await.unwrap(), Some(7));
        std::fs::write(of_the_run.join("state-00000000000000001000"), b"?").unwrap();
        assert_eq!(store.remove_old().await.unwrap(), Some(900));
        assert_eq!(store.positions().await.unwrap(), [900, 1000]);
        assert!(of_the_run.join("notes.txt").exists() && of_the_run.join("state-9").exists());
        let damaged = store.read(900).await.unwrap_err().to_string();
        assert!(damaged.contains("record 900"), "{damaged}");
    }
}
