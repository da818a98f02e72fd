//! Folders that one process at a time may use.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file in a folder that is locked by whoever uses it.
pub const LOCK_FILE: &str = "lock";

/// A process that was killed a moment ago may still hold its lock for as long.
pub const LOCK_WAIT: Duration = Duration::from_secs(2);

const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderLockError {
    /// The file system refused.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("another process is using the folder {0}")]
    Locked(PathBuf),
}

/// A folder's lock; it is let go with the process, also by a crash.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Makes the folder if it is not there, and locks it, which may take [`LOCK_WAIT`].
    ///
    /// # Errors
    /// A [`FolderLockError`].
    pub fn take(folder: &Path) -> Result<Self, FolderLockError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| FolderLockError::Io { path, source }
        };
        fs::create_dir_all(folder).map_err(at(folder))?;
        let path = folder.join(LOCK_FILE);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(at(&path))?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_WAIT => {
                    std::thread::sleep(LOCK_RETRY);
                }
                Err(TryLockError::WouldBlock) => return Err(FolderLockError::Locked(folder.to_owned())),
                Err(TryLockError::Error(source)) => return Err(at(&path)(source)),
            }
        }
    }
}
