//! Directories that appear whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::error::at;

/// In a directory that is being filled: what is there is ours to remove.
const MARKER: &str = ".sanderling-partial";

/// A directory that is filled under another name, `NAME.partial`, and takes its own when it is complete. One that is
/// dropped before is removed; one that a crash left behind, which its marker tells, is removed by the next attempt.
#[derive(Debug)]
pub struct StagedDirectory {
    target: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl StagedDirectory {
    /// An empty directory beside `target`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or [`CheckpointError::Exists`] if somebody else has something of that other name.
    pub fn create(target: &Path) -> Result<Self, CheckpointError> {
        let temporary = beside(target, ".partial");
        if temporary.symlink_metadata().is_ok() {
            if !temporary.join(MARKER).exists() {
                return Err(CheckpointError::Exists { path: temporary });
            }
            fs::remove_dir_all(&temporary).map_err(at(&temporary))?;
        }
        fs::create_dir_all(&temporary).map_err(at(&temporary))?;
        fs::write(temporary.join(MARKER), "").map_err(at(&temporary))?;
        Ok(Self { target: target.to_owned(), temporary, committed: false })
    }

    /// Fails if there is something at `target`, or it is no name at all, such as `.`: a check to make before long work.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] or [`CheckpointError::NoName`].
    pub fn refuse_existing(target: &Path) -> Result<(), CheckpointError> {
        if target.file_name().is_none() {
            return Err(CheckpointError::NoName { path: target.to_owned() });
        }
        let empty = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
        if target.symlink_metadata().is_ok() && !empty {
            return Err(CheckpointError::Exists { path: target.to_owned() });
        }
        Ok(())
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
        let marker = self.temporary.join(MARKER);
        fs::remove_file(&marker).map_err(at(&marker))?;
        sync_directory(&self.temporary)?;
        // An empty directory is in nobody's way; where this fails there is something in it, or nothing at all.
        let _ = fs::remove_dir(&self.target);
        let replaced = beside(&self.target, ".sanderling-replaced");
        let replaces = self.target.exists();
        if replaces {
            if replaced.exists() {
                fs::remove_dir_all(&replaced).map_err(at(&replaced))?;
            }
            fs::rename(&self.target, &replaced).map_err(at(&self.target))?;
        }
        if let Err(error) = fs::rename(&self.temporary, &self.target) {
            if replaces {
                // Back to how it was; the error above is what matters.
                let _ = fs::rename(&replaced, &self.target);
            }
            return Err(at(&self.target)(error));
        }
        self.committed = true;
        if replaces {
            fs::remove_dir_all(&replaced).map_err(at(&replaced))?;
        }
        sync_directory(
            self.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")),
        )
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
