//! Files that are there whole or not at all: written beside their place, synced, then renamed.

use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file that takes its place only when it is complete; dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct Beside {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    placed: bool,
}

impl Beside {
    /// Starts a file that is to be at `path`, under a name that nobody else gives: `path.sanderling-partial`. What is at
    /// `path` stays until [`place`](Self::place).
    ///
    /// # Errors
    /// What the system says of a place that cannot be written to; [`WouldBlock`](io::ErrorKind::WouldBlock) while
    /// another process is writing the same file.
    pub fn create(path: &Path) -> io::Result<Self> {
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".sanderling-partial");
        let temporary = PathBuf::from(temporary);
        // Emptied only when it is ours: another process may be writing it.
        let file = File::options().create(true).truncate(false).write(true).open(&temporary)?;
        let busy = || {
            let why = format!("another process is writing {}", temporary.display());
            io::Error::new(io::ErrorKind::WouldBlock, why)
        };
        match file.try_lock() {
            // One that was put in its place before it was locked is nobody's to be emptied.
            Ok(()) if !is_at(&file, &temporary)? => return Err(busy()),
            Ok(()) => file.set_len(0)?,
            Err(TryLockError::WouldBlock) => return Err(busy()),
            // Some file systems know no locks; there two writers are not told from each other.
            Err(TryLockError::Error(_)) => file.set_len(0)?,
        }
        Ok(Self { file, temporary, path: path.to_owned(), placed: false })
    }

    /// Where it is to be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the file and puts it in its place.
    ///
    /// # Errors
    /// What the system says; nothing is left of the file then, and what was in its place is still there.
    pub fn place(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.placed = true;
        Ok(())
    }
}

/// Whether an open file is still what a path names. A lock on it stands for the path only if it is: between opening and locking
/// another process may have renamed it, or removed it.
///
/// # Errors
/// What the system says of the file or of the path, but for a path that names nothing.
#[cfg(unix)]
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The same where open files are neither renamed nor removed.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn is_at(_file: &File, _path: &Path) -> io::Result<bool> {
    Ok(true)
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.placed {
            // Whatever went wrong is reported already; a left-over file is only untidy.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl Write for Beside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Beside {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let path = folder.path().join("file");
        let mut file = Beside::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        assert_eq!(names(), ["file.sanderling-partial"]);
        assert_eq!(Beside::create(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(file);
        assert!(names().is_empty());

        for text in ["first", "second"] {
            let mut file = Beside::create(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file.place().unwrap();
            assert_eq!((names(), fs::read_to_string(&path).unwrap()), (vec!["file".into()], text.to_owned()));
        }
        #[cfg(unix)]
        {
            let (here, there) = (File::open(&path).unwrap(), folder.path().join("there"));
            assert!(is_at(&here, &path).unwrap() && !is_at(&here, &there).unwrap());
            fs::rename(&path, &there).unwrap();
            assert!(!is_at(&here, &path).unwrap() && is_at(&here, &there).unwrap());
            fs::rename(&there, &path).unwrap();
        }
        assert!(Beside::create(folder.path()).is_err());
        assert!(Beside::create(&folder.path().join("absent/file")).is_err());
        assert_eq!(names(), ["file"]);
    }
}
