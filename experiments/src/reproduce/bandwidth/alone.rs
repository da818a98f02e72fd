//! One measurement at a time: two that share the machine would measure each other.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};

/// The file that is locked by whoever measures.
const FILE: &str = "measuring";

/// How often whoever waits looks again.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The right to measure; it goes with this, and with the process.
#[derive(Debug)]
pub(super) struct Alone {
    _lock: File,
}

impl Alone {
    /// Waits until nobody else measures for this folder, for as long as `keep_going`.
    ///
    /// # Errors
    /// A sentence if the file cannot be locked, or was no longer waited for.
    pub(super) fn wait(folder: &Path, keep_going: &dyn Fn() -> bool) -> anyhow::Result<Self> {
        let path = folder.join(FILE);
        let unusable = || format!("cannot lock {}", path.display());
        let lock = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let lock = lock.with_context(unusable)?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { _lock: lock }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).with_context(unusable),
            }
            ensure!(keep_going(), "stopped while another process was measuring");
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_second_one_waits_until_the_first_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let first = Alone::wait(folder.path(), &|| true).unwrap();
        let (has_waited, is_done) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let waiting = || {
                    has_waited.store(true, Ordering::Release);
                    true
                };
                let second = Alone::wait(folder.path(), &waiting).unwrap();
                assert!(is_done.load(Ordering::Acquire), "the first was measuring still");
                drop(second);
            });
            while !has_waited.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            is_done.store(true, Ordering::Release);
            drop(first);
            second.join().unwrap();
        });
    }

    #[test]
    fn waiting_can_be_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Alone::wait(folder.path(), &|| true).unwrap();
        let error = Alone::wait(folder.path(), &|| false).unwrap_err().to_string();
        assert!(error.starts_with("stopped"), "{error}");
        assert!(Alone::wait(&folder.path().join("none"), &|| true).is_err());
    }
}
