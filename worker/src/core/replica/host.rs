//! Everything in the host's memory.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;

use sanderling_common::init::parameters_hash;
use sanderling_common::layout::Layout;
use sanderling_common::method::MethodSettings;
use sanderling_common::sparse::{NonFinite, Update};

use super::{Contents, Rates, Replica};
use crate::core::method::{self, Accumulators, CompressionMethod, Direction, gradient_norm};

/// A [`Replica`] in the host's memory, where nothing can fail.
pub struct HostReplica {
    layout: Arc<Layout>,
    theta: Vec<f32>,
    method: Box<dyn CompressionMethod>,
    /// θ_k − u_k, empty unless the method takes gradients there.
    view: Vec<f32>,
    view_is_current: bool,
}

impl HostReplica {
    /// Of the model `theta`, with empty accumulators.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or the settings are out of the ranges their types document.
    pub fn new(layout: Arc<Layout>, settings: &MethodSettings, theta: Vec<f32>) -> Self {
        assert_eq!(theta.len(), layout.len(), "the base model is of another layout");
        let method = method::build(settings, &layout);
        let view = if method.uses_local_view() { vec![0.0; theta.len()] } else { Vec::new() };
        Self { layout, theta, method, view, view_is_current: false }
    }

    /// θ_k.
    pub fn theta(&self) -> &[f32] {
        &self.theta
    }

    /// The method, with its accumulators.
    pub fn method(&self) -> &dyn CompressionMethod {
        &*self.method
    }
}

impl Replica for HostReplica {
    type Vector = [f32];
    type Owned = Vec<f32>;
    type Error = Infallible;
    type Failure<E> = E;

    fn failure<E>(error: Infallible) -> E {
        match error {}
    }

    fn cause<E>(failure: E) -> Result<E, Infallible> {
        Ok(failure)
    }

    fn view(&mut self, if_pending: bool) -> &[f32] {
        if !self.method.uses_local_view() {
            return &self.theta;
        }
        if !self.view_is_current {
            let residual = self.method.residual();
            for ((view, &theta), &u) in self.view.iter_mut().zip(&self.theta).zip(residual) {
                *view = theta - u;
            }
            if if_pending {
                self.method.sent().subtract_from(&self.layout, &mut self.view);
            }
            self.view_is_current = true;
        }
        &self.view
    }

    fn norm(&mut self, gradient: &[f32]) -> Result<f64, Infallible> {
        assert_eq!(gradient.len(), self.layout.len(), "the gradient is of another layout");
        Ok(gradient_norm(gradient))
    }

    fn accumulate(
        &mut self,
        gradient: &[f32],
        Rates { scale, rate, local_rate }: Rates,
    ) -> Result<(), Infallible> {
        let theta = if self.method.uses_local_view() { &self.view } else { &self.theta };
        self.method.accumulate(&Direction { gradient, scale, rate, local_rate, theta });
        self.view_is_current = false;
        Ok(())
    }

    fn step(
        &mut self,
        gradient: &[f32],
        rates: Rates,
        payload: &mut Vec<u8>,
    ) -> Result<Result<(), NonFinite>, Infallible> {
        self.accumulate(gradient, rates)?;
        Ok(self.method.send(rates.rate, rates.local_rate, payload))
    }

    fn sent(&self) -> &Update {
        self.method.sent()
    }

    fn add(&mut self, difference: &Update) -> Result<bool, Infallible> {
        let mut finite = true;
        difference.part(difference.tensors()).for_each(&self.layout, &mut self.theta, |theta, value| {
            *theta += value;
            finite &= theta.is_finite();
        });
        self.view_is_current = false;
        Ok(finite)
    }

    fn hash(&mut self) -> Result<[u8; 32], Infallible> {
        Ok(parameters_hash(&self.layout, &self.theta))
    }

    fn aside(&mut self, parts: [&Update; 2]) -> Result<Option<Vec<f32>>, Infallible> {
        let mut model = self.theta.clone();
        parts.into_iter().for_each(|part| part.add_to(&self.layout, &mut model));
        Ok(model.iter().all(|value| value.is_finite()).then_some(model))
    }

    fn contents(&mut self) -> Result<Contents<'_>, Infallible> {
        let Accumulators { scalar, vectors } = self.method.accumulators();
        let vectors = vectors.into_iter().map(Cow::Borrowed).collect();
        Ok(Contents { theta: Cow::Borrowed(&self.theta), scalar, vectors })
    }

    fn restore(&mut self, scalar: f64, vectors: Vec<Vec<f32>>, sent: Update) -> Result<bool, Infallible> {
        self.view_is_current = false;
        Ok(self.method.restore(scalar, vectors, sent))
    }
}
