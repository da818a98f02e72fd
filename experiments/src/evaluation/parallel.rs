//! Batches of an evaluation on all cores, or on a GPU: each thread has a model of its own and all read the same parameters.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::model::{Model, ModelError};

/// Ctrl-C was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped before the evaluation was complete")]
pub struct Stopped;

/// A model to be evaluated.
pub struct Scoring<'a, K: Kernels> {
    /// Its architecture.
    pub config: &'a ModelConfig,
    /// Its parameters, flat, where the kernels compute.
    pub parameters: &'a K::Buffer,
    /// Makes kernels for a thread.
    pub kernels: &'a (dyn Fn() -> K + Sync),
    /// Threads to use, as far as there are items for them; at least 1.
    pub threads: usize,
}

impl<K: Kernels> Scoring<'_, K>
where
    K::Buffer: Sync,
{
    /// Does `score` to every item, and returns the results in the order of the items, which does not depend on the
    /// number of threads. `progress` is told how many are done.
    ///
    /// # Errors
    /// The first failure of `score`, or [`Stopped`] if `progress` breaks.
    pub(super) fn each<I: Sync, R: Send>(
        &self,
        items: &[I],
        score: impl Fn(&mut Model<K>, &K::Buffer, &I) -> Result<R, ModelError> + Sync,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> anyhow::Result<Vec<R>> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sender, results) = channel();
        let work = || -> Result<(), ModelError> {
            let mut model = Model::new(self.config.clone(), (self.kernels)())?;
            let sender = sender.clone();
            while !stop.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(number) else { break };
                // Nobody listens any more when another thread has failed.
                let _ = sender.send((number, score(&mut model, self.parameters, item)?));
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.threads.clamp(1, items.len().max(1))).map(|_| scope.spawn(work)).collect();
            let mut scored: Vec<Option<R>> = items.iter().map(|_| None).collect();
            let mut done = 0;
            // A thread that fails ends without a result, so waiting for results alone would not end.
            while done < items.len() && !threads.iter().all(|thread| thread.is_finished()) {
                while let Ok((number, result)) = results.recv_timeout(std::time::Duration::from_millis(100)) {
                    scored[number] = Some(result);
                    done += 1;
                    if done == items.len() {
                        break;
                    }
                    if progress(done).is_break() {
                        stop.store(true, Ordering::Relaxed);
                        return Err(Stopped.into());
                    }
                }
                if progress(done).is_break() {
                    stop.store(true, Ordering::Relaxed);
                    return Err(Stopped.into());
                }
            }
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().expect("scoring does not panic")?;
            }
            results.try_iter().for_each(|(number, result)| scored[number] = Some(result));
            Ok(scored.into_iter().map(|result| result.expect("every item was scored")).collect())
        })
    }
}
