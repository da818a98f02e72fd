//! What a journal asks of a file system: little enough that a simulated one can fail at any of it.

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// A folder of files.
pub trait Disk: Debug + Send + Sync {
    /// A file that is appended to.
    type File: DiskFile;

    /// The names of the files there, in no particular order.
    ///
    /// # Errors
    /// What the system says.
    fn names(&self) -> io::Result<Vec<String>>;

    /// A new, empty file.
    ///
    /// # Errors
    /// What the system says; [`AlreadyExists`](io::ErrorKind::AlreadyExists) if there is one of that name.
    fn create(&self, name: &str) -> io::Result<Self::File>;

    /// A new, empty file in the place of one, whose content is of no use. It is never without a file of that name.
    ///
    /// # Errors
    /// What the system says.
    fn replace(&self, name: &str) -> io::Result<Self::File>;

    /// The whole of a file.
    ///
    /// # Errors
    /// What the system says.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;

    /// Cuts a file to its first `bytes` bytes, durably.
    ///
    /// # Errors
    /// What the system says.
    fn truncate(&self, name: &str, bytes: u64) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes creations and removals durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_names(&self) -> io::Result<()>;
}

/// A file that is appended to.
pub trait DiskFile: Debug + Send {
    /// Appends bytes. They may be lost, all or some, until [`sync`](Self::sync).
    ///
    /// # Errors
    /// What the system says; some of the bytes may have been written.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was appended durable.
    ///
    /// # Errors
    /// What the system says. What was appended may be lost then, and another call that succeeds does not say otherwise.
    fn sync(&mut self) -> io::Result<()>;
}

/// A directory of a file system.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// A directory that exists.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Disk for Directory {
    type File = File;

    fn names(&self) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        fs::read_dir(&self.path)?.map(name).collect()
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let mut options = File::options();
        options.append(true).create_new(true);
        // What workers send is the run's own business.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        options.open(self.path.join(name))
    }

    fn replace(&self, name: &str) -> io::Result<File> {
        let file = File::options().append(true).open(self.path.join(name))?;
        file.set_len(0)?;
        Ok(file)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn truncate(&self, name: &str, bytes: u64) -> io::Result<()> {
        let file = File::options().write(true).open(self.path.join(name))?;
        file.set_len(bytes)?;
        file.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        // Elsewhere directories cannot be opened, and names need no syncing.
        if cfg!(unix) { File::open(&self.path)?.sync_all() } else { Ok(()) }
    }
}

impl DiskFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
