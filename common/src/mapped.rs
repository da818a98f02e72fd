//! Files mapped into memory, read-only: large inputs are paged in as they are used, and shared by the processes of a
//! machine.
//!
//! This is the one module that maps files.
//!
//! # What must hold
//!
//! A mapped file must not be truncated or written to in place while it is mapped. The programs here replace files:
//! they write beside and rename, which leaves the old file, and every mapping of it, whole. Rust cannot enforce it
//! against others. Whoever truncates a data file under a running program ends that program (`SIGBUS`), much as
//! truncating its executable would; whoever changes it in place changes what is read, and readers bound what they
//! read wherever they use it. Copying instead would cost memory of the file's size in every process, which is why the
//! precondition is accepted.

#![allow(unsafe_code, reason = "mapping a file is unsafe: see what must hold, in the module's documentation")]

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

/// A file, or a part of one, as bytes in memory.
///
/// The file must stay as it is while this lives; see the [module's documentation](self).
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    /// Maps a whole file; an empty one gives an empty slice.
    ///
    /// # Errors
    /// What the system says of a file that cannot be opened or mapped (such as a folder).
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        Self::of_range(&file, 0, bytes)
    }

    /// Maps `len` bytes of a file from `offset` on, which need not be a multiple of anything.
    ///
    /// # Errors
    /// As [`of_range`](Self::of_range), or what the system says of a file that cannot be opened.
    pub fn open_range(path: &Path, offset: u64, len: u64) -> Result<Self> {
        Self::of_range(&File::open(path)?, offset, len)
    }

    /// Maps `len` bytes of an open file from `offset` on; the file may be closed afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] if the file ends before the range does, or what the system says.
    pub fn of_range(file: &File, offset: u64, len: u64) -> Result<Self> {
        let bytes = file.metadata()?.len();
        if offset.checked_add(len).is_none_or(|end| end > bytes) {
            let said = format!("bytes {offset} and the {len} from there on are not within its {bytes} bytes");
            return Err(Error::new(ErrorKind::UnexpectedEof, said));
        }
        let len = usize::try_from(len)
            .map_err(|_| Error::new(ErrorKind::OutOfMemory, "the file is larger than the address space"))?;
        // SAFETY: the range lies within the file, and the file stays as it is: see the module's documentation.
        let map = unsafe { MmapOptions::new().offset(offset).len(len).map(file)? };
        Ok(Self { map })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: usize) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, (0..bytes).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>()).unwrap();
        (folder, path)
    }

    #[test]
    fn a_mapping_is_what_reading_gives() {
        for bytes in [0, 1, 4096, 100_003] {
            let (_folder, path) = file_of(bytes);
            let read = std::fs::read(&path).unwrap();
            assert_eq!(MappedFile::open(&path).unwrap()[..], read[..]);
            // Offsets that are no multiple of a page, and empty ranges anywhere.
            for (from, to) in [(0, bytes), (bytes / 3, bytes), (bytes / 7, bytes / 2), (bytes, bytes)] {
                let part = MappedFile::open_range(&path, from as u64, (to - from) as u64).unwrap();
                assert_eq!(part[..], read[from..to]);
            }
        }
    }

    #[test]
    fn ranges_outside_the_file_are_refused() {
        let (_folder, path) = file_of(100);
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let error = MappedFile::open_range(&path, offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset} {len}");
        }
        assert_eq!(MappedFile::open(Path::new("/no/such/file")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[cfg(unix)]
    #[test]
    fn a_mapping_outlives_the_replacement_of_its_file() {
        let (folder, path) = file_of(5000);
        let read = std::fs::read(&path).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        let beside = folder.path().join("file.partial");
        std::fs::write(&beside, b"new").unwrap();
        std::fs::rename(&beside, &path).unwrap();
        assert_eq!(mapped[..], read[..]);
        assert_eq!(MappedFile::open(&path).unwrap()[..], b"new"[..]);
    }
}
