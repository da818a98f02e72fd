//! How long each kernel takes, by marks in the queue before and after it.

use super::driver::{Driver, Mark};
use super::{Cuda, CudaError};
use crate::kernels::timed::{Clocked, SpentByKernel};

/// Pairs of marks that are waited for at a time.
const PENDING_MAX: usize = 4096;

/// Time and calls by kernel.
#[derive(Debug, Default)]
pub(super) struct Timing {
    pending: Vec<(&'static str, Mark, Mark)>,
    spent: SpentByKernel,
}

impl Timing {
    pub(super) fn around(
        &mut self,
        name: &'static str,
        driver: &dyn Driver,
        queue: impl FnOnce(&dyn Driver) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let before = driver.mark()?;
        queue(driver)?;
        self.pending.push((name, before, driver.mark()?));
        if self.pending.len() >= PENDING_MAX { self.settle(driver) } else { Ok(()) }
    }

    fn settle(&mut self, driver: &dyn Driver) -> Result<(), CudaError> {
        for (name, before, after) in self.pending.drain(..) {
            let spent = self.spent.entry(name).or_default();
            spent.ms += f64::from(driver.elapsed_ms(before, after)?);
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
        timing.settle(self.driver.as_ref())?;
        Ok(timing.spent)
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        Self::wait(self)
    }
}
