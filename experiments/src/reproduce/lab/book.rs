//! Finished runs, a JSON line each: what is there already is not made again.
//!
//! Several processes may work on one book: each claims a run by a locked file before it makes it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Context;
use sanderling_common::beside::is_at;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tracing::warn;

use super::text::counted;

/// The file of finished runs.
pub(super) const FILE: &str = "results.jsonl";

/// The folder of the locks that stand for runs being made.
pub(super) const CLAIMS: &str = "claims";

/// The arithmetic of runs, for their keys: one more whenever the same key comes to something else, so that results of before are
/// not taken for those of after.
pub(in crate::reproduce) const REVISION: u32 = 1;

/// A finished run.
pub(in crate::reproduce) trait Finished:
    Serialize + DeserializeOwned + Clone + Send
{
    /// What was asked for, with the [`REVISION`]: a run with the same key need not be made again.
    type Key: Serialize;

    fn key(&self) -> &Self::Key;
}

/// A book of finished runs in a folder.
pub(in crate::reproduce) struct Book<R> {
    folder: PathBuf,
    done: Mutex<Pages<R>>,
}

struct Pages<R> {
    /// How far the file was read, in bytes.
    read: u64,
    results: BTreeMap<String, R>,
}

/// A run that no other process makes meanwhile.
pub(in crate::reproduce) struct Claim {
    path: PathBuf,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What is left behind is locked by nobody, which is what counts.
        let _ = fs::remove_file(&self.path);
    }
}

/// Two keys are the same if they have the same JSON form.
fn text<K: Serialize>(key: &K) -> String {
    serde_json::to_string(key).expect("a key has a JSON form")
}

/// A name for files that belong to a key.
pub(in crate::reproduce) fn key_name<K: Serialize>(key: &K) -> String {
    Sha256::digest(text(key)).iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

impl<R: Finished> Book<R> {
    /// Opens the book of a folder, which is made if it is not there. Lines that cannot be read, such as a last one that
    /// was cut off or those of an earlier version, are left out and their runs made again.
    ///
    /// # Errors
    /// If the folder cannot be made or the file not be read.
    pub(in crate::reproduce) fn open(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder.join(CLAIMS))
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let done = Mutex::new(Pages { read: 0, results: BTreeMap::new() });
        let book = Self { folder: folder.to_owned(), done };
        book.refresh()?;
        Ok(book)
    }

    fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// Reads what was added since the last time.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub(in crate::reproduce) fn refresh(&self) -> anyhow::Result<()> {
        let path = self.path();
        let mut pages = self.done.lock().expect("no reader panics");
        let new = match read_from(&path, &mut pages.read) {
            Ok(new) => new,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                pages.read = 0;
                return Ok(());
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let whole = new.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut unreadable = 0;
        for line in new[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<R>(line) {
                Ok(result) => drop(pages.results.insert(text(result.key()), result)),
                Err(_) => unreadable += 1,
            }
        }
        pages.read += whole as u64;
        if unreadable > 0 {
            warn!(
                "left out of {}: {}, cut off or of another version; what is missing then is made again",
                path.display(),
                counted(unreadable, "line")
            );
        }
        Ok(())
    }

    /// The run with this key, if it is finished.
    pub(in crate::reproduce) fn find(&self, key: &R::Key) -> Option<R> {
        self.done.lock().expect("no reader panics").results.get(&text(key)).cloned()
    }

    /// The right to make a run; `None` if another process has it, or has just given it up, or it is finished by now.
    ///
    /// # Errors
    /// If the lock or the book cannot be used.
    pub(in crate::reproduce) fn claim(&self, key: &R::Key) -> anyhow::Result<Option<Claim>> {
        let path = self.folder.join(CLAIMS).join(key_name(key));
        let unusable = || format!("cannot use {}", path.display());
        let lock =
            OpenOptions::new().create(true).write(true).truncate(false).open(&path).with_context(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error).with_context(unusable),
        }
        // Whoever had it may have removed it in between: what is locked now stands for nothing.
        if !is_at(&lock, &path).with_context(unusable)? {
            return Ok(None);
        }
        let claim = Claim { path, _lock: lock };
        // Whoever had it before may have finished it between our reading and our locking.
        self.refresh()?;
        Ok(self.find(key).is_none().then_some(claim))
    }

    /// Writes a finished run down.
    ///
    /// # Errors
    /// If the book cannot be written or read.
    pub(in crate::reproduce) fn add(&self, result: &R) -> anyhow::Result<()> {
        let path = self.path();
        let unusable = || format!("cannot write {}", path.display());
        let mut file =
            OpenOptions::new().create(true).append(true).read(true).open(&path).with_context(unusable)?;
        // One line at a time, whoever writes; the lock goes with the file.
        file.lock().with_context(unusable)?;
        let mut line = text(result);
        line.push('\n');
        if !ends_with_newline(&mut file).with_context(unusable)? {
            line.insert(0, '\n');
        }
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).with_context(unusable)?;
        drop(file);
        // Even if somebody removes the file now, what was made is there.
        self.done.lock().expect("no reader panics").results.insert(text(result.key()), result.clone());
        self.refresh()
    }
}

/// Whether the file is empty or its last line whole.
fn ends_with_newline(file: &mut File) -> std::io::Result<bool> {
    let length = file.seek(SeekFrom::End(0))?;
    let Some(last) = length.checked_sub(1) else { return Ok(true) };
    file.seek(SeekFrom::Start(last))?;
    let mut byte = [0];
    file.read_exact(&mut byte)?;
    Ok(byte == *b"\n")
}

/// What a file holds from that place on, or from its beginning if it has become shorter than that.
fn read_from(path: &Path, place: &mut u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() < *place {
        *place = 0;
    }
    file.seek(SeekFrom::Start(*place))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Sum {
        of: (u32, u32),
        is: u32,
    }

    impl Finished for Sum {
        type Key = (u32, u32);

        fn key(&self) -> &(u32, u32) {
            &self.of
        }
    }

    #[test]
    fn what_is_written_down_is_found_by_everyone() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) =
            (Book::<Sum>::open(folder.path()).unwrap(), Book::<Sum>::open(folder.path()).unwrap());
        let sum = Sum { of: (1, 2), is: 3 };
        ours.add(&sum).unwrap();
        assert_eq!(ours.find(&(1, 2)), Some(sum.clone()));
        assert_eq!(theirs.find(&(1, 2)), None, "it has not looked since");
        theirs.refresh().unwrap();
        assert_eq!(theirs.find(&(1, 2)), Some(sum.clone()));
        assert_eq!(Book::<Sum>::open(folder.path()).unwrap().find(&(1, 2)), Some(sum));
    }

    #[test]
    fn a_run_is_made_by_one_process_at_a_time_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) =
            (Book::<Sum>::open(folder.path()).unwrap(), Book::<Sum>::open(folder.path()).unwrap());
        let claim = ours.claim(&(1, 2)).unwrap().expect("nobody else has it");
        assert!(theirs.claim(&(1, 2)).unwrap().is_none());
        assert!(theirs.claim(&(2, 2)).unwrap().is_some());
        ours.add(&Sum { of: (1, 2), is: 3 }).unwrap();
        drop(claim);
        assert!(theirs.claim(&(1, 2)).unwrap().is_none(), "it is finished");
        assert_eq!(fs::read_dir(folder.path().join(CLAIMS)).unwrap().count(), 0, "no lock is left behind");
    }

    /// As by somebody who tidies up while a run is made.
    #[test]
    fn a_book_that_is_removed_or_shortened_loses_no_run_of_this_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let book = Book::<Sum>::open(folder.path()).unwrap();
        let sums = [1, 2, 3, 4].map(|is| Sum { of: (is, 0), is });
        book.add(&sums[0]).unwrap();
        book.add(&sums[1]).unwrap();
        fs::remove_file(&path).unwrap();
        book.add(&sums[2]).unwrap();
        fs::write(&path, "").unwrap();
        book.refresh().unwrap();
        Book::<Sum>::open(folder.path()).unwrap().add(&sums[3]).unwrap();
        book.refresh().unwrap();
        assert!(sums.iter().all(|sum| book.find(&sum.of).as_ref() == Some(sum)));
    }

    #[test]
    fn a_line_that_was_cut_off_is_left_out_and_spoils_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        fs::write(&path, "{\"of\":[1,2],\"is\":3}\n{\"of\":[2,2],\"i").unwrap();
        let book = Book::<Sum>::open(folder.path()).unwrap();
        assert!(book.find(&(1, 2)).is_some() && book.find(&(2, 2)).is_none());
        book.add(&Sum { of: (2, 2), is: 4 }).unwrap();
        assert_eq!(Book::<Sum>::open(folder.path()).unwrap().find(&(2, 2)).unwrap().is, 4);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
    }
}
