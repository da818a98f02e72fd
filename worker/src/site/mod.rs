//! Where a worker computes and keeps its model.

mod gpu;
mod options;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::layout::Layout;
use sanderling_common::method::MethodSettings;
use sanderling_common::model_config::ModelConfig;

use crate::core::replica::{HostReplica, Replica};
use crate::engine::{Compute, Engine};
use crate::model::ModelError;

pub use gpu::{Gpu, GpuEngine};
pub use options::{Device, DeviceOptions, Place, PlaceError, UnknownDevice};

/// A place with memory of its own and something that computes in it: engine and replica share the vectors there, so that
/// neither parameters nor gradients leave it.
pub trait Site: Send + Sync + 'static {
    /// What computes gradients there.
    type Engine: Compute + 'static;
    /// What holds the model and the method's accumulators there.
    type Replica: Replica<Vector = <Self::Engine as Compute>::Vector> + 'static;

    /// The model of a run, with its text.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model, or the place fails.
    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<Self::Engine, ModelError>;

    /// A replica of the model `theta`, with empty accumulators.
    ///
    /// # Errors
    /// If the place fails.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or the settings are out of the ranges their types document.
    fn replica(
        &self,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: Vec<f32>,
    ) -> Result<Self::Replica, <Self::Replica as Replica>::Error>;
}

/// The CPU and the host's memory.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// What computes in place of the engine that a run describes.
    pub stand_in: Option<StandIn>,
}

/// Makes what computes of the engine that a run describes.
#[derive(Clone)]
pub struct StandIn(pub Arc<dyn Fn(Engine) -> HostCompute + Send + Sync>);

/// What computes on the host.
pub type HostCompute = Box<dyn Compute<Vector = [f32]>>;

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StandIn")
    }
}

impl Site for Host {
    type Engine = HostCompute;
    type Replica = HostReplica;

    fn engine(
        &self,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<HostCompute, ModelError> {
        let engine = Engine::new(run, config, corpus)?;
        Ok(match &self.stand_in {
            None => Box::new(engine),
            Some(StandIn(make)) => make(engine),
        })
    }

    fn replica(
        &self,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: Vec<f32>,
    ) -> Result<HostReplica, Infallible> {
        Ok(HostReplica::new(layout, settings, theta))
    }
}
