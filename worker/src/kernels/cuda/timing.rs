//! How long each kernel takes, by marks in the queue before and after it.

use std::sync::Arc;

use super::driver::{Driver, Mark};
use super::{Cuda, CudaError};
use crate::kernels::timed::{Clocked, SpentByKernel};

/// Pairs of marks that are waited for at a time.
const PENDING_MAX: usize = 4096;

/// A mark in the queue, given back when it is dropped.
#[derive(Debug)]
struct Held {
    driver: Arc<dyn Driver>,
    mark: Mark,
}

impl Held {
    fn new(driver: &Arc<dyn Driver>) -> Result<Self, CudaError> {
        Ok(Self { mark: driver.mark()?, driver: Arc::clone(driver) })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.driver.free_mark(self.mark);
    }
}

/// Time and calls by kernel.
#[derive(Debug, Default)]
pub(super) struct Timing {
    pending: Vec<(&'static str, Held, Held)>,
    spent: SpentByKernel,
}

impl Timing {
    pub(super) fn around(
        &mut self,
        name: &'static str,
        driver: &Arc<dyn Driver>,
        queue: impl FnOnce(&dyn Driver) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let before = Held::new(driver)?;
        queue(driver.as_ref())?;
        self.pending.push((name, before, Held::new(driver)?));
        if self.pending.len() >= PENDING_MAX { self.settle() } else { Ok(()) }
    }

    fn settle(&mut self) -> Result<(), CudaError> {
        for (name, before, after) in self.pending.drain(..) {
            let spent = self.spent.entry(name).or_default();
            spent.ms += f64::from(after.driver.elapsed_ms(before.mark, after.mark)?);
            spent.calls += 1;
        }
        Ok(())
    }
}

/// The marks cost some microseconds each.
impl Clocked for Cuda {
    fn start_timing(&mut self) {
        self.timing = Some(Timing::default());
    }

    fn stop_timing(&mut self) -> Result<SpentByKernel, CudaError> {
        let Some(mut timing) = self.timing.take() else { return Ok(SpentByKernel::new()) };
        timing.settle()?;
        Ok(timing.spent)
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        Self::wait(self)
    }
}
