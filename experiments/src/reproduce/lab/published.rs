//! The published methods: how their rates and momenta are searched for, and how they run.

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::method::Method;

use super::search::{Grid, Tried};
use super::spec::{Subject, small_model};
use super::text::look_every;

/// What everyone is tried with.
pub(in crate::reproduce) const RATES: [f64; 4] = [0.05, 0.1, 0.2, 0.4];

/// What [`MANY`] workers and more are tried with besides: with so many, the best of high rates may lie between worse ones.
pub(in crate::reproduce) const RATES_OF_MANY: [f64; 3] = [0.00625, 0.0125, 0.025];

/// Workers that are many for these methods.
pub(in crate::reproduce) const MANY: u32 = 16;

/// Whether a method has a momentum to be chosen.
pub(in crate::reproduce) fn has_momentum(method: Method) -> bool {
    matches!(method, Method::Msgd | Method::DgcAsync | Method::Dgs)
}

/// What a method is tried with for so many workers; of the momenta if it has one.
pub(in crate::reproduce) fn published_grid(method: Method, workers: u32, momenta: &[f32]) -> Grid {
    let low = if workers >= MANY { &RATES_OF_MANY[..] } else { &[] };
    let momenta = if has_momentum(method) { momenta.to_vec() } else { vec![0.0] };
    Grid { rates: [low, &RATES[..]].concat(), momenta }
}

/// A run of a published method, by workers.
#[derive(Clone, Copy, Debug)]
pub(in crate::reproduce) struct Published<'a> {
    pub(in crate::reproduce) subject: Subject,
    pub(in crate::reproduce) method: Method,
    pub(in crate::reproduce) workers: u32,
    pub(in crate::reproduce) tried: Tried,
    /// Of the run file, in sections other than `run` and `training`.
    pub(in crate::reproduce) sections: &'a str,
    /// Gradient evaluations.
    pub(in crate::reproduce) steps: u64,
    /// Points of its curve.
    pub(in crate::reproduce) looks: u64,
    pub(in crate::reproduce) seed: u64,
}

impl Published<'_> {
    /// With a rate that does not depend on staleness.
    ///
    /// # Errors
    /// If the sections make no run.
    pub(in crate::reproduce) fn run(self) -> anyhow::Result<RunConfig> {
        let Self { subject, method, workers, tried: Tried { rate, momentum }, sections, steps, looks, seed } =
            self;
        let file = format!(
            "{}{sections}[run]\nworkers = {workers}\nseed = {seed}\n[training]\nmethod = \"{method}\"\nsteps = {steps}\n\
             learning_rate = {rate:?}\nlearning_rate_max = {rate:?}\nmomentum = {momentum:?}\neval_every = {}\n",
            small_model(subject),
            look_every(steps, looks),
        );
        Ok(parse(&file)?.resolve()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_searched_alike() {
        let momenta = [0.3, 0.7];
        for workers in [1, 4, 16, 32] {
            let grids = [Method::Asgd, Method::GdAsync, Method::DgcAsync, Method::Dgs]
                .map(|method| published_grid(method, workers, &momenta));
            assert!(grids.iter().all(|grid| grid.rates == grids[0].rates), "{workers} workers: {grids:?}");
            assert_eq!(grids[0].rates.len(), if workers < 16 { 4 } else { 7 });
            assert!(grids[0].rates.is_sorted());
            assert_eq!(grids.map(|grid| grid.momenta.len()), [1, 1, 2, 2]);
        }
    }
}
