//! A disk of a few files in memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use sanderling_server::storage::{Disk, DiskFile};

type Files = BTreeMap<String, Vec<u8>>;

/// Keeps what is written, and never fails.
#[derive(Clone, Debug)]
pub struct MemoryDisk(Arc<Mutex<Files>>);

impl MemoryDisk {
    /// A disk with these files.
    pub fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
        Self(Arc::new(Mutex::new(files.collect())))
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.lock().expect("nothing panics while it holds the files")
    }

    fn with<T>(&self, name: &str, work: impl FnOnce(&mut Vec<u8>) -> T) -> io::Result<T> {
        self.files().get_mut(name).map(work).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Disk for MemoryDisk {
    type File = MemoryFile;

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.files().keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<MemoryFile> {
        let mut files = self.files();
        if files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        files.insert(name.to_owned(), Vec::new());
        Ok(MemoryFile { disk: self.clone(), name: name.to_owned() })
    }

    fn replace(&self, name: &str) -> io::Result<MemoryFile> {
        self.with(name, Vec::clear)?;
        Ok(MemoryFile { disk: self.clone(), name: name.to_owned() })
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.with(name, |bytes| bytes.clone())
    }

    fn truncate(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.with(name, |file| file.truncate(usize::try_from(bytes).unwrap_or(usize::MAX)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files().remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file of such a disk.
#[derive(Debug)]
pub struct MemoryFile {
    disk: MemoryDisk,
    name: String,
}

impl DiskFile for MemoryFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.with(&self.name, |file| file.extend_from_slice(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}
