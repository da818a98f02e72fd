//! What a worker accumulates and sends: the compression methods behind one interface.
//!
//! Four of the six are one recursion, [`SaMomentum`], at different settings. With d the clipped gradient (plus λ·θ
//! when weight decay is on), η the rate, and R the kept fraction, each step is
//!
//! | step | equation |
//! | --- | --- |
//! | accumulate | u ← u + η·d |
//! | send | q = decode(encode(top-R of u)), per tensor |
//! | keep the rest | u ← u − (1 − m)·q |
//!
//! | method | m | R | is |
//! | --- | --- | --- | --- |
//! | `dgs` | m | R | SAMomentum (DGS, eq. 6–9) in its undivided form: its u is m times that of the paper's u/m form |
//! | `gd-async` | 0 | R | gradient dropping: u is the residual |
//! | `msgd` | m | 1 | momentum SGD: u ← m·u + η·d, all of it sent |
//! | `asgd` | 0 | 1 | SGD: nothing is kept but what quantisation rounds off |
//!
//! The undivided form leaves unsent entries alone, so it costs one pass over the sent entries only, needs no m > 0,
//! and keeps in u what quantisation rounds off. [`DgcAsync`] has two accumulators; [`DgsAdam`] normalises d.

mod dgc_async;
mod dgs_adam;
mod gradient;
mod sa_momentum;

use std::sync::Arc;

use sanderling_common::layout::Layout;
use sanderling_common::method::{Method, MethodSettings};
use sanderling_common::sparse::{Compression, Compressor, NonFinite, Update};

pub use dgc_async::DgcAsync;
pub use dgs_adam::DgsAdam;
pub use gradient::{GRADIENT_NORM_MAX, clip_scale, gradient_norm, scale_of_norm};
pub use sa_momentum::SaMomentum;

/// One gradient on its way into a method. All slices are flat vectors of the whole layout.
#[derive(Clone, Copy, Debug)]
pub struct Direction<'a> {
    /// ∇, finite.
    pub gradient: &'a [f32],
    /// What clipping multiplies ∇ with; the methods do so in the pass they make anyway.
    pub scale: f32,
    /// η.
    pub rate: f32,
    /// The rate at which it counts for the worker itself before it is sent, at least η; for methods with a local view.
    pub local_rate: f32,
    /// The parameters at which ∇ was taken, for weight decay.
    pub theta: &'a [f32],
}

/// A way to turn gradients into sparse updates without losing what is not sent.
pub trait CompressionMethod: Send {
    /// Takes a gradient in.
    ///
    /// # Panics
    /// If a slice is not of the layout's length.
    fn accumulate(&mut self, direction: &Direction<'_>);

    /// Appends to `payload` the bytes of what is sent, at the rates of the last gradient, and remembers it as [`sent`](Self::sent).
    ///
    /// # Errors
    /// [`NonFinite`] if an accumulator overflowed, which only an absurd rate brings about; the method is then of no
    /// further use.
    fn send(&mut self, rate: f32, local_rate: f32, payload: &mut Vec<u8>) -> Result<(), NonFinite>;

    /// Takes a gradient in and sends.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Panics
    /// If a slice is not of the layout's length.
    fn step(&mut self, direction: &Direction<'_>, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        self.accumulate(direction);
        self.send(direction.rate, direction.local_rate, payload)
    }

    /// What the last step sent, as its receiver decodes it.
    fn sent(&self) -> &Update;

    /// What was accumulated and not sent, u (DGC's r).
    fn residual(&self) -> &[f32];

    /// The momentum: u where it is also the residual, DGC's u; empty for methods without.
    fn momentum(&self) -> &[f32];

    /// Everything that it carries from one gradient to the next, but for what was [sent](Self::sent).
    fn accumulators(&self) -> Accumulators<'_>;

    /// Takes up where a method with the same settings was when it had these [`accumulators`](Self::accumulators), and had
    /// sent that. Returns whether they are of such a method; it is of no further use if not.
    fn restore(&mut self, scalar: f64, vectors: Vec<Vec<f32>>, sent: Update) -> bool;

    /// Whether gradients are to be taken at the local view θ_k − u_k instead of θ_k.
    fn uses_local_view(&self) -> bool {
        false
    }
}

/// What a method carries from one gradient to the next.
#[derive(Clone, Debug, PartialEq)]
pub struct Accumulators<'a> {
    /// Of `dgs-adam` β2^c; of the others 0.
    pub scalar: f64,
    /// u, and what the method has beside it: DGC's r, the second moment v.
    pub vectors: Vec<&'a [f32]>,
}

/// Puts vectors that were read into the places they belong to; returns whether they fit there.
fn refill<const N: usize>(places: [&mut Vec<f32>; N], vectors: Vec<Vec<f32>>) -> bool {
    let Ok(vectors) = <[Vec<f32>; N]>::try_from(vectors) else { return false };
    let mut fits = true;
    for (place, vector) in places.into_iter().zip(vectors) {
        fits &= place.len() == vector.len() && vector.iter().all(|value| value.is_finite());
        *place = vector;
    }
    fits
}

/// The method that `settings` describes, with empty accumulators.
pub fn build(settings: &MethodSettings, layout: &Arc<Layout>) -> Box<dyn CompressionMethod> {
    let &MethodSettings { method, momentum, weight_decay, compression, .. } = settings;
    let whole = Compression { keep: 1.0, ..compression };
    let sa_momentum = |momentum, compression| {
        Box::new(SaMomentum::new(momentum, weight_decay, Sender::new(layout, compression)))
    };
    match method {
        Method::Dgs => sa_momentum(momentum, compression),
        Method::GdAsync => sa_momentum(0.0, compression),
        Method::Msgd => sa_momentum(momentum, whole),
        Method::Asgd => sa_momentum(0.0, whole),
        Method::DgcAsync => Box::new(DgcAsync::new(momentum, weight_decay, Sender::new(layout, compression))),
        Method::DgsAdam => Box::new(DgsAdam::new(settings, Sender::new(layout, compression))),
    }
}

/// Selects and encodes, keeping the buffers.
#[derive(Debug)]
pub struct Sender {
    layout: Arc<Layout>,
    compression: Compression,
    compressor: Compressor,
    update: Update,
}

impl Sender {
    /// A sender of the top R of every tensor.
    pub fn new(layout: &Arc<Layout>, compression: Compression) -> Self {
        let compressor = Compressor::new(compression);
        Self { layout: layout.clone(), compression, compressor, update: Update::default() }
    }

    fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.layout.len()]
    }

    fn send(&mut self, source: &[f32], factor: f32, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        let tensors = 0..self.layout.tensors().len();
        self.compressor.compress_into(&self.layout, tensors, source, factor, payload, &mut self.update)
    }

    /// Calls `apply` with each sent entry of `vector` and the value sent.
    fn for_each_sent(&self, vector: &mut [f32], apply: impl FnMut(&mut f32, f32)) {
        self.update.part(self.update.tensors()).for_each(&self.layout, vector, apply);
    }
}

/// Calls `apply` with each element of `accumulator` and its d = scale·∇ + λ·θ. Without weight decay θ is not read.
fn for_each_direction(
    accumulator: &mut [f32],
    direction: &Direction<'_>,
    weight_decay: f32,
    mut apply: impl FnMut(&mut f32, f32),
) {
    let &Direction { gradient, scale, theta, .. } = direction;
    assert_eq!(gradient.len(), accumulator.len(), "the gradient is of another layout");
    assert_eq!(theta.len(), accumulator.len(), "the parameters are of another layout");
    if weight_decay == 0.0 {
        for (element, &gradient) in accumulator.iter_mut().zip(gradient) {
            apply(element, scale * gradient);
        }
    } else {
        for ((element, &gradient), &theta) in accumulator.iter_mut().zip(gradient).zip(theta) {
            apply(element, scale * gradient + weight_decay * theta);
        }
    }
}
