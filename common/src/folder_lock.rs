//! Folders that one process at a time may use.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
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

/// Makes a folder that only its owner can look into, and those on the way to it, unless they are there.
///
/// # Errors
/// What the system says.
pub fn make_private(folder: &Path) -> io::Result<()> {
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        made => made,
    }
}

impl FolderLock {
    /// Makes the folder if it is not there, for its owner only, and locks it, which may take [`LOCK_WAIT`].
    ///
    /// # Errors
    /// A [`FolderLockError`].
    pub fn take(folder: &Path) -> Result<Self, FolderLockError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| FolderLockError::Io { path, source }
        };
        make_private(folder).map_err(at(folder))?;
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

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_that_is_made_is_its_owners_and_one_that_is_there_stays_as_it_is() {
        let temporary = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let made = temporary.path().join("on the way/state");
        drop(FolderLock::take(&made).unwrap());
        assert_eq!(mode(&made), 0o700);
        fs::set_permissions(&made, fs::Permissions::from_mode(0o750)).unwrap();
        drop(FolderLock::take(&made).unwrap());
        assert_eq!(mode(&made), 0o750);
        fs::write(temporary.path().join("file"), "").unwrap();
        assert!(make_private(&temporary.path().join("file")).is_err());
    }
}
