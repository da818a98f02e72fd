//! θ_k and what a method accumulates, wherever they are kept.
//!
//! The exchange is the same whether a worker's vectors lie on the host or in the memory of a device: [`WorkerCore`] only
//! asks a [`Replica`] to do something with them. What crosses between the two is an [`Update`] in either direction, and a
//! whole vector only where somebody wants to see it: for its hash, or to write it down.
//!
//! [`HostReplica`] keeps everything on the host.
//!
//! [`WorkerCore`]: super::WorkerCore

mod host;

use std::borrow::Cow;
use std::error::Error;
use std::ops::Deref;

use sanderling_common::sparse::{NonFinite, Update};

pub use host::HostReplica;

/// What a step multiplies with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// What clipping multiplies ∇ with.
    pub scale: f32,
    /// η.
    pub rate: f32,
    /// The rate at which it counts for the worker itself before it is sent, at least η.
    pub local_rate: f32,
}

/// Everything that a replica would have to be made again of, but for what was [sent](Replica::sent).
#[derive(Clone, Debug, PartialEq)]
pub struct Contents<'a> {
    /// θ_k.
    pub theta: Cow<'a, [f32]>,
    /// What the method carries beside vectors.
    pub scalar: f64,
    /// What the method carries.
    pub vectors: Vec<Cow<'a, [f32]>>,
}

/// A worker's model θ_k, which the server holds an exact replica of, with the accumulators of its method.
///
/// Implementations come to the same bits for the same calls, but for the order in which a gradient's norm is summed.
pub trait Replica: Send {
    /// A flat vector of the layout where the replica is: `[f32]` on the host.
    type Vector: ?Sized;
    /// One that is owned.
    type Owned: Deref<Target = Self::Vector>;
    /// What can go wrong where it is; afterwards the replica is of no further use.
    type Error: Error + Send + Sync + 'static;
    /// An error of the exchange, or one of the place: where nothing can go wrong, the former alone.
    type Failure<E>: From<E>;

    /// One of the place.
    fn failure<E>(error: Self::Error) -> Self::Failure<E>;

    /// Which of the two it is: one of the exchange is `Ok`, one of the place `Err`.
    ///
    /// # Errors
    /// What the place said.
    fn cause<E>(failure: Self::Failure<E>) -> Result<E, Self::Error>;

    /// The parameters at which the next gradient is to be taken: θ_k, or θ_k − u_k for methods with a local view, less
    /// what was last [sent](Self::sent) `if_pending`, that is while it has not been answered.
    fn view(&mut self, if_pending: bool) -> &Self::Vector;

    /// The Euclidean norm of a gradient, summed in float64; not finite just when an entry is not.
    ///
    /// # Errors
    /// If the place fails.
    ///
    /// # Panics
    /// If the gradient is of another layout.
    fn norm(&mut self, gradient: &Self::Vector) -> Result<f64, Self::Error>;

    /// Takes in a gradient that was taken at the last [`view`](Self::view) and whose norm is finite, and sends nothing: it waits with
    /// what was not sent before, and counts in the next view of methods with a local one.
    ///
    /// # Errors
    /// If the place fails.
    fn accumulate(&mut self, gradient: &Self::Vector, rates: Rates) -> Result<(), Self::Error>;

    /// Takes in a gradient that was taken at the last [`view`](Self::view) and whose norm is finite, appends to `payload`
    /// the bytes of what is sent, and remembers it as [`sent`](Self::sent).
    ///
    /// # Errors
    /// If the place fails; within, [`NonFinite`] if an accumulator overflowed, and the replica is of no further use.
    fn step(
        &mut self,
        gradient: &Self::Vector,
        rates: Rates,
        payload: &mut Vec<u8>,
    ) -> Result<Result<(), NonFinite>, Self::Error>;

    /// What the last step sent, as its receiver decodes it.
    fn sent(&self) -> &Update;

    /// θ_k ← θ_k + difference; returns whether it is finite still.
    ///
    /// # Errors
    /// If the place fails.
    fn add(&mut self, difference: &Update) -> Result<bool, Self::Error>;

    /// The [`parameters_hash`](sanderling_common::init::parameters_hash) of θ_k.
    ///
    /// # Errors
    /// If the place fails.
    fn hash(&mut self) -> Result<[u8; 32], Self::Error>;

    /// θ_k with two updates added, one after the other, beside θ_k; none if that is not finite.
    ///
    /// # Errors
    /// If the place fails.
    fn aside(&mut self, parts: [&Update; 2]) -> Result<Option<Self::Owned>, Self::Error>;

    /// What it would have to be made again of.
    ///
    /// # Errors
    /// If the place fails.
    fn contents(&mut self) -> Result<Contents<'_>, Self::Error>;

    /// Takes up where a replica with the same θ_k and settings was when it had these [`contents`](Self::contents), and had
    /// sent that. Returns whether they are of such a one; it is of no further use if not.
    ///
    /// # Errors
    /// If the place fails.
    fn restore(&mut self, scalar: f64, vectors: Vec<Vec<f32>>, sent: Update) -> Result<bool, Self::Error>;
}
