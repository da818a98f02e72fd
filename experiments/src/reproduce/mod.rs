//! Published results, run again at a scale that fits a desk.

mod bandwidth;
mod compare;
mod lab;
mod local_steps;
mod methods;
mod quantisation;
mod recipe;
mod secondary;
mod staleness;
mod upcycling;

pub use bandwidth::{
    Arguments as BandwidthArguments, ServerArguments as BandwidthServerArguments,
    WorkersArguments as BandwidthWorkersArguments, bandwidth, join as bandwidth_workers,
    serve as bandwidth_server,
};
pub use compare::{Arguments as CompareArguments, compare};
pub use local_steps::{Arguments as LocalStepsArguments, local_steps};
pub use methods::{Arguments as MethodsArguments, methods};
pub use quantisation::{Arguments as QuantisationArguments, quantisation};
pub use recipe::{Arguments as RecipeArguments, recipe};
pub use secondary::{Arguments as SecondaryArguments, secondary};
pub use staleness::{Arguments as StalenessArguments, staleness};
pub use upcycling::{Arguments as UpcyclingArguments, upcycling};
