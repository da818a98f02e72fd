//! Many runs, some at a time, with a bar and a stop.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::sync::watch;

use super::book::{Book, Finished};
use crate::work::{Unit, Work};

/// How often the bar moves, and runs that another process makes are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What a command says that was interrupted.
pub(super) const STOPPED: &str =
    "stopped; the runs that are finished are kept, and the same command goes on with the others";

/// And what it says first, as runs look up only between gradients and evaluations.
const STOPPING: &str = "stopping when the runs under way next look up; Ctrl-C again ends at once";

/// What a run tells of its progress, and asks whether to go on.
pub(in crate::reproduce) struct Progress<'a> {
    /// Of all runs together.
    done: &'a AtomicU64,
    /// Of this run.
    told: AtomicU64,
    failed: &'a AtomicBool,
    stop: watch::Receiver<bool>,
}

impl Progress<'_> {
    /// The run has done so much of its work; returns whether it is to go on.
    pub(in crate::reproduce) fn at(&self, work: u64) -> bool {
        let told = self.told.swap(work, Ordering::Relaxed);
        self.done.fetch_add(work.saturating_sub(told), Ordering::Relaxed);
        !self.failed.load(Ordering::Relaxed) && !*self.stop.borrow()
    }
}

/// One of the threads that make runs, while it runs. One that panics stops the others.
struct Running<'a> {
    count: &'a AtomicU64,
    failed: &'a AtomicBool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failed.store(true, Ordering::Relaxed);
        }
        self.count.fetch_sub(1, Ordering::Release);
    }
}

/// How many runs are made at a time in this process.
#[derive(Clone, Copy, Debug)]
pub(in crate::reproduce) struct Jobs(pub(in crate::reproduce) usize);

/// A run to be made: its key, and how much work it is, in units of the bar.
pub(in crate::reproduce) type Wanted<K> = (K, u64);

/// A run that is missing.
struct Missing<'a, K> {
    key: &'a K,
    work: u64,
    /// The bar has it, or will.
    is_counted: AtomicBool,
}

/// What most runs are measured in.
pub(in crate::reproduce) const EVALUATIONS: Unit = Unit::Count("gradient evaluations");

impl Jobs {
    /// Makes those of the wanted runs that are not in the book, each once, and returns when all are there; runs that
    /// another process makes are waited for.
    ///
    /// # Errors
    /// The first failure of a run, or a sentence if the user wanted it to stop.
    pub(in crate::reproduce) fn make_missing<R>(
        self,
        (what, unit): (&str, Unit),
        book: &Book<R>,
        wanted: &[Wanted<R::Key>],
        make: impl Fn(&R::Key, &Progress<'_>) -> anyhow::Result<R> + Sync,
    ) -> anyhow::Result<()>
    where
        R: Finished + Sync,
        R::Key: Sync,
    {
        let missing: Vec<Missing<'_, R::Key>> = (wanted.iter())
            .filter(|(key, _)| book.find(key).is_none())
            .map(|(key, work)| Missing { key, work: *work, is_counted: AtomicBool::new(false) })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let total = missing.iter().map(|missing| missing.work).sum();
        let mut work = Work::begin(what, total, unit)?;
        let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let stop = work.stop();
        let running = AtomicU64::new(self.0.min(missing.len()) as u64);
        let failure = Mutex::new(None);
        let thread = || {
            let _running = Running { count: &running, failed: &failed };
            let made = make_some(book, &missing, &make, &|| Progress {
                done: &done,
                told: AtomicU64::new(0),
                failed: &failed,
                stop: stop.clone(),
            });
            if let Err(error) = made {
                // Before the others are stopped, whose reason would be that alone.
                failure.lock().expect("nobody panics with it").get_or_insert(error);
                failed.store(true, Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.0.min(missing.len()) {
                scope.spawn(thread);
            }
            let mut is_told = false;
            while running.load(Ordering::Acquire) > 0 {
                // The runs themselves look at the stop.
                if work.at(done.load(Ordering::Relaxed)).is_break() && !std::mem::replace(&mut is_told, true)
                {
                    work.say(STOPPING);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        work.end();
        match failure.into_inner().expect("nobody panics with it") {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// What one thread does: makes runs until all are there.
fn make_some<'a, R: Finished>(
    book: &Book<R>,
    missing: &[Missing<'_, R::Key>],
    make: &(impl Fn(&R::Key, &Progress<'_>) -> anyhow::Result<R> + Sync),
    progress: &(dyn Fn() -> Progress<'a> + Sync),
) -> anyhow::Result<()> {
    loop {
        let (mut is_complete, mut has_made) = (true, false);
        for Missing { key, work, is_counted } in missing {
            let progress = progress();
            if book.find(key).is_some() {
                // Another process made it.
                if !is_counted.swap(true, Ordering::Relaxed) {
                    progress.at(*work);
                }
                continue;
            }
            ensure!(progress.at(0), "{STOPPED}");
            let Some(claim) = book.claim(key)? else {
                is_complete &= book.find(key).is_some();
                continue;
            };
            is_counted.store(true, Ordering::Relaxed);
            let made = make(key, &progress);
            // A run that is stopped fails with a reason of its own, which nobody wants to read.
            ensure!(made.is_ok() || progress.at(0), "{STOPPED}");
            book.add(&made.context("a run failed")?)?;
            progress.at(*work);
            drop(claim);
            has_made = true;
        }
        if is_complete {
            return Ok(());
        }
        if !has_made {
            std::thread::sleep(LOOK_EVERY);
            book.refresh()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, serde::Serialize, serde::Deserialize)]
    struct Made(u32);

    impl Finished for Made {
        type Key = u32;

        fn key(&self) -> &u32 {
            &self.0
        }
    }

    /// Makes runs 0 to 3, two at a time.
    fn make(run: impl Fn(u32, &Progress<'_>) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let book = Book::<Made>::open(folder.path()).unwrap();
        let wanted = [0, 1, 2, 3].map(|key| (key, 1));
        Jobs(2).make_missing(("making", EVALUATIONS), &book, &wanted, |&key, progress| {
            run(key, progress)?;
            Ok(Made(key))
        })
    }

    /// A run that ends when the others are to stop, as all runs do.
    fn until_stopped(progress: &Progress<'_>) -> anyhow::Result<()> {
        while progress.at(0) {
            std::thread::sleep(Duration::from_millis(1));
        }
        anyhow::bail!("a reason of its own")
    }

    #[test]
    fn the_first_failure_stops_the_others_and_is_told() {
        let failed = make(|key, progress| match key {
            0 => anyhow::bail!("no memory"),
            _ => until_stopped(progress),
        });
        assert_eq!(format!("{:#}", failed.unwrap_err()), "a run failed: no memory");
        make(|_, _| Ok(())).unwrap();
    }

    #[test]
    #[should_panic = "a scoped thread panicked"]
    fn a_run_that_panics_ends_the_command() {
        let _ = make(|key, progress| match key {
            0 => panic!("a defect"),
            _ => until_stopped(progress),
        });
    }
}
