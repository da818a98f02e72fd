//! How long each kernel takes, by marks in the queue before and after it.

use std::collections::BTreeMap;

use super::driver::{Driver, Mark};
use super::{Cuda, CudaError};

/// Pairs of marks that are waited for at a time.
const PENDING_MAX: usize = 4096;

/// Time and calls by kernel.
#[derive(Debug, Default)]
pub(super) struct Timing {
    pending: Vec<(&'static str, Mark, Mark)>,
    spent: BTreeMap<&'static str, Spent>,
}

/// What a kernel took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// All calls together, in milliseconds.
    pub ms: f64,
    /// How many there were.
    pub calls: u64,
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

impl Cuda {
    /// Begins to measure every kernel from now on. The marks cost some microseconds each.
    pub fn start_timing(&mut self) {
        self.timing = Some(Timing::default());
    }

    /// What each kernel took since [`start_timing`](Self::start_timing), which ends.
    ///
    /// # Errors
    /// If the device failed.
    pub fn stop_timing(&mut self) -> Result<BTreeMap<&'static str, Spent>, CudaError> {
        let Some(mut timing) = self.timing.take() else { return Ok(BTreeMap::new()) };
        timing.settle(self.driver.as_ref())?;
        Ok(timing.spent)
    }
}
