//! Directories that appear whole or not at all.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::error::at;

/// In a directory that is being filled: what is there is ours to remove, unless whoever fills it still holds its lock.
const MARKER: &str = ".sanderling-partial";

/// A directory that is filled under another name, `NAME.partial`, and takes its own when it is complete. One that is
/// dropped before is removed; one that a crash left behind, which its marker tells, is removed by the next attempt.
#[derive(Debug)]
pub struct StagedDirectory {
    target: PathBuf,
    temporary: PathBuf,
    /// Locked for as long as this process fills the directory.
    marker: File,
    committed: bool,
}

impl StagedDirectory {
    /// An empty directory beside `target`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Exists`] if somebody else has something of that other name,
    /// [`CheckpointError::Busy`] if another process is filling it.
    pub fn create(target: &Path) -> Result<Self, CheckpointError> {
        let temporary = beside(target, ".partial");
        if let Some(parent) = temporary.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        let mut options = File::options();
        options.write(true);
        match fs::create_dir(&temporary) {
            Ok(()) => drop(options.create_new(true)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                if !temporary.join(MARKER).exists() {
                    return Err(CheckpointError::Exists { path: temporary });
                }
            }
            Err(error) => return Err(at(&temporary)(error)),
        }
        let marker = options.open(temporary.join(MARKER)).map_err(at(&temporary))?;
        let busy = || CheckpointError::Busy { path: target.to_owned() };
        match marker.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(busy()),
            // It was renamed away between opening and locking.
            Ok(()) if !is_at(&marker, &temporary.join(MARKER)) => return Err(busy()),
            // Some file systems know no locks; there two writers are not told from each other.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let staged = Self { target: target.to_owned(), temporary, marker, committed: false };
        staged.clear().map_err(at(&staged.temporary))?;
        Ok(staged)
    }

    /// Removes what a crash left behind, but for the marker, so that its lock goes on holding others off.
    fn clear(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(&self.temporary)? {
            let path = entry?.path();
            if path.file_name() != Some(MARKER.as_ref()) {
                if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
            }
        }
        Ok(())
    }

    /// Fails if there is something at `target`, or it is no name at all, such as `.`: a check to make before long work.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] or [`CheckpointError::NoName`].
    pub fn refuse_existing(target: &Path) -> Result<(), CheckpointError> {
        if target.file_name().is_none() {
            return Err(CheckpointError::NoName { path: target.to_owned() });
        }
        let Ok(metadata) = target.symlink_metadata() else { return Ok(()) };
        // A link, even to an empty directory, would be replaced instead of followed.
        let empty =
            metadata.is_dir() && fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
        if empty { Ok(()) } else { Err(CheckpointError::Exists { path: target.to_owned() }) }
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes a file and syncs it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], naming the file as it would have been.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let path = self.temporary.join(name);
        let written = fs::write(&path, bytes).and_then(|()| File::open(&path)?.sync_all());
        written.map_err(at(&self.target.join(name)))
    }

    /// Gives the directory its name, if nobody has made something of that name meanwhile.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] and [`CheckpointError::Io`]; nothing is left of the directory then.
    pub fn commit_new(self) -> Result<(), CheckpointError> {
        Self::refuse_existing(&self.target)?;
        self.commit()
    }

    /// Gives the directory its name, in the place of one that has it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        sync_directory(&self.temporary)?;
        // An empty directory is in nobody's way; where this fails there is something in it, or nothing at all.
        let _ = fs::remove_dir(&self.target);
        let replaced = beside(&self.target, ".sanderling-replaced");
        if replaced.exists() {
            fs::remove_dir_all(&replaced).map_err(at(&replaced))?;
        }
        if !self.target.exists() {
            fs::rename(&self.temporary, &self.target).map_err(at(&self.target))?;
        } else {
            // The new one is complete under the other name before the two change places at once, so that a crash at any
            // moment leaves one of them where it belongs.
            fs::rename(&self.temporary, &replaced).map_err(at(&replaced))?;
            exchange(&replaced, &self.target).map_err(at(&self.target))?;
        }
        self.committed = true;
        let marker = self.target.join(MARKER);
        fs::remove_file(&marker).map_err(at(&marker))?;
        if replaced.exists() {
            fs::remove_dir_all(&replaced).map_err(at(&replaced))?;
        }
        // Closing the marker ends its lock, when nothing is left under the temporary name.
        let _ = self.marker.unlock();
        sync_directory(
            self.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")),
        )
    }
}

/// Two directories change places; at once where the system can do that.
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
        // Not every file system can.
    }
    let aside = beside(one, "-2");
    fs::rename(other, &aside)?;
    if let Err(error) = fs::rename(one, other) {
        // Back to how it was; the error is what matters.
        let _ = fs::rename(&aside, other);
        return Err(error);
    }
    fs::rename(&aside, one)
}

/// Whether the open file is the one of this path.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (open, there) = (file.metadata().map(identity), fs::metadata(path).map(identity));
        open.is_ok_and(|open| there.is_ok_and(|there| open == there))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

impl Drop for StagedDirectory {
    fn drop(&mut self) {
        if !self.committed {
            // Whatever kept it from being committed is what the caller reports.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// `target` with an ending added to its name.
fn beside(target: &Path, ending: &str) -> PathBuf {
    let mut name = target.components().as_path().as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Makes renames durable, where directories can be opened at all.
fn sync_directory(directory: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        File::open(directory).and_then(|file| file.sync_all()).map_err(at(directory))?;
    }
    Ok(())
}
