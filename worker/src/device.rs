//! A worker's model and method in the memory of a device.
//!
//! θ_k, the view, the accumulators and the gradient stay there. Of a step, indices and values of what is selected come to
//! the host, which encodes them, and the values as their receiver decodes them go back; of an answer, the entries of the
//! difference go to the device. Whole vectors cross only for a hash of the model, and to be written down.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use sanderling_common::init::{combine_tensor_hashes, tensor_hash};
use sanderling_common::layout::Layout;
use sanderling_common::method::{Method, MethodSettings};
use sanderling_common::sparse::{Compression, NonFinite, Selection, Update, ValueFormat};

use crate::core::replica::{Contents, Rates, Replica};
use crate::kernels::method::{Accumulate, Incoming, MethodKernels};

/// What went wrong with a replica on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFailure<E, D> {
    /// The exchange cannot go on.
    #[error(transparent)]
    Exchange(E),
    /// The device failed.
    #[error("the device that keeps the model failed: {0}")]
    Device(D),
}

impl<E, D> From<E> for DeviceFailure<E, D> {
    fn from(error: E) -> Self {
        Self::Exchange(error)
    }
}

/// Entries that are taken to a device at once, unless one tensor has more: bounds the memory that a whole model's difference,
/// which every evaluation brings, takes there.
const PIECE_ENTRIES: usize = 1 << 24;

/// What is taken to a device at once of a vector of this layout, at most, in bytes: an index and a value each.
pub(crate) fn piece_bytes(layout: &Layout) -> usize {
    let largest = layout.tensors().iter().map(|tensor| tensor.len).max().unwrap_or(0);
    8 * largest.max(PIECE_ENTRIES.min(layout.len()))
}

/// Runs of an update's tensors of up to `most` entries, or of one tensor.
fn pieces(update: &Update, most: usize) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (tensor, sent) in update.iter() {
        match pieces.last_mut() {
            Some(piece) if held + sent.len() <= most => piece.end = tensor + 1,
            _ => {
                pieces.push(tensor..tensor + 1);
                held = 0;
            }
        }
        held += sent.len();
    }
    pieces
}

/// vector += update, in pieces of up to `most` entries; returns whether all those elements are finite.
fn add_in_pieces<D: MethodKernels>(
    kernels: &mut D,
    update: &Update,
    most: usize,
    received: &mut D::Entries,
    vector: &mut D::Buffer,
) -> Result<bool, D::Error> {
    let mut finite = true;
    for tensors in pieces(update, most) {
        kernels.write(&update.part(tensors), received)?;
        finite &= kernels.add_entries(received, vector)?;
    }
    Ok(finite)
}

/// A [`Replica`] in the memory of a device. The methods are those of [`method`](crate::core::method), step by step.
pub struct DeviceReplica<D: MethodKernels> {
    kernels: D,
    layout: Arc<Layout>,
    weight_decay: f32,
    compression: Compression,
    theta: D::Storage,
    /// θ_k − u_k, unless the method takes gradients at θ_k.
    view: Option<D::Storage>,
    view_is_current: bool,
    form: Form,
    u: D::Storage,
    /// DGC's r, or the second moment v.
    second: Option<D::Storage>,
    /// What was selected last. While a push is pending its indices are those of `sent`, its values anything; nothing is accumulated
    /// then.
    selected: D::Entries,
    /// Of what is added to the model.
    received: D::Entries,
    sent: Update,
    /// The selection on the host, and the values on their way back.
    indices: Vec<u32>,
    values: Vec<f32>,
}

/// How a method accumulates.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// SAMomentum and what is a case of it; `release` is 1 − m.
    Sum { release: f32 },
    /// DGC.
    Momentum { momentum: f32 },
    /// `dgs-adam`; `power` is β2^c.
    Normalised { beta2: f32, epsilon: f32, power: f64 },
}

impl Form {
    fn new(settings: &MethodSettings) -> Self {
        let &MethodSettings { method, momentum, beta2, epsilon, .. } = settings;
        match method {
            Method::DgsAdam => {
                assert!((0.0..1.0).contains(&beta2), "beta2 {beta2} lies outside [0, 1)");
                assert!(epsilon > 0.0, "epsilon {epsilon} is not positive");
                return Self::Normalised { beta2, epsilon, power: 1.0 };
            }
            Method::Asgd | Method::GdAsync => return Self::Sum { release: 1.0 },
            Method::Dgs | Method::Msgd | Method::DgcAsync => {
                assert!((0.0..1.0).contains(&momentum), "momentum {momentum} lies outside [0, 1)");
            }
        }
        if method == Method::DgcAsync {
            Self::Momentum { momentum }
        } else {
            Self::Sum { release: 1.0 - momentum }
        }
    }
}

impl<D: MethodKernels> DeviceReplica<D> {
    /// Of the model `theta`, with empty accumulators.
    ///
    /// # Errors
    /// If the device has not enough memory.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or the settings are out of the ranges their types document.
    pub fn new(
        mut kernels: D,
        layout: Arc<Layout>,
        settings: &MethodSettings,
        theta: &[f32],
    ) -> Result<Self, D::Error> {
        assert_eq!(theta.len(), layout.len(), "the base model is of another layout");
        let &MethodSettings { method, weight_decay, compression, .. } = settings;
        let keep = if method.is_dense() { 1.0 } else { compression.keep };
        assert!(0.0 < keep && keep <= 1.0, "the kept fraction {keep} lies outside (0, 1]");
        let form = Form::new(settings);
        let len = layout.len();
        let has_view = matches!(form, Form::Normalised { .. });
        let view = has_view.then(|| kernels.allocate_parameters(len)).transpose()?;
        let mut on_device =
            if has_view { kernels.allocate(len)? } else { kernels.allocate_parameters(len)? };
        kernels.upload(theta, &mut on_device);
        let second = (!matches!(form, Form::Sum { .. })).then(|| kernels.allocate(len)).transpose()?;
        Ok(Self {
            weight_decay,
            compression: Compression { keep, ..compression },
            theta: on_device,
            view,
            view_is_current: false,
            form,
            u: kernels.allocate(len)?,
            second,
            selected: kernels.allocate_entries(&layout)?,
            received: kernels.allocate_entries(&layout)?,
            sent: Update::default(),
            indices: Vec::new(),
            values: Vec::new(),
            layout,
            kernels,
        })
    }

    /// Takes the gradient in, and selects from the residual.
    fn take_in(
        &mut self,
        gradient: &D::Buffer,
        Rates { scale, rate, local_rate }: Rates,
    ) -> Result<(), D::Error> {
        let theta = self.view.as_deref().unwrap_or(&self.theta);
        let incoming = Incoming { gradient, scale, weight_decay: self.weight_decay, theta };
        let (u, second) = (&mut *self.u, self.second.as_deref_mut());
        let accumulate = match (&mut self.form, second) {
            (Form::Momentum { momentum }, Some(r)) => Accumulate::Momentum { momentum: *momentum, u, r },
            (Form::Normalised { beta2, epsilon, power }, Some(v)) => {
                *power *= f64::from(*beta2);
                let correction = (1.0 / (1.0 - *power)) as f32;
                Accumulate::Normalised {
                    beta2: *beta2,
                    correction,
                    epsilon: *epsilon,
                    rate: local_rate,
                    u,
                    v,
                }
            }
            _ => Accumulate::Sum { rate, u },
        };
        self.kernels.accumulate(incoming, accumulate, self.compression, &mut self.selected)
    }

    /// Encodes `factor` times what is selected.
    fn send(&mut self, factor: f32, payload: &mut Vec<u8>) -> Result<Result<(), NonFinite>, D::Error> {
        self.kernels.read(&self.selected, &mut self.indices, &mut self.values)?;
        let selection = Selection { indices: &self.indices, values: &self.values };
        Ok(selection.encode_into(&self.layout, self.compression, factor, payload, &mut self.sent))
    }

    /// Takes what was sent out of the accumulators.
    fn release(&mut self, Rates { rate, local_rate, .. }: Rates) {
        let exact = self.compression.format == ValueFormat::F32;
        match self.form {
            Form::Sum { release } => self.subtract_sent(|q| release * q),
            Form::Normalised { .. } if rate == local_rate => self.subtract_sent(|q| q),
            Form::Normalised { .. } if rate > 0.0 => {
                let share = rate / local_rate;
                self.subtract_sent(|q| q / share);
            }
            // Nothing of it counts for the others, and none of it is to be lost.
            Form::Normalised { .. } => {}
            Form::Momentum { .. } => {
                self.kernels.clear_entries(&self.selected, &mut self.u);
                if exact && rate > 0.0 {
                    let r = self.second.as_deref_mut().expect("DGC has an r");
                    self.kernels.clear_entries(&self.selected, r);
                } else if rate > 0.0 {
                    self.subtract_sent(|q| q / rate);
                }
            }
        }
    }

    /// residual −= of(sent); the multiplications are the host's.
    fn subtract_sent(&mut self, of: impl Fn(f32) -> f32) {
        self.values.clear();
        self.values.extend(self.sent.values().iter().map(|&value| of(value)));
        self.kernels.write_values(&self.values, &mut self.selected);
        let residual = match (&self.form, &mut self.second) {
            (Form::Momentum { .. }, Some(r)) => r,
            _ => &mut self.u,
        };
        self.kernels.subtract_entries(&self.selected, residual);
    }

    fn downloaded(kernels: &mut D, vector: &D::Buffer, len: usize) -> Result<Vec<f32>, D::Error> {
        let mut values = vec![0.0; len];
        kernels.download(vector, 0, &mut values)?;
        Ok(values)
    }
}

impl<D: MethodKernels> Replica for DeviceReplica<D> {
    type Vector = D::Buffer;
    type Owned = D::Storage;
    type Error = D::Error;
    type Failure<E> = DeviceFailure<E, D::Error>;

    fn failure<E>(error: D::Error) -> DeviceFailure<E, D::Error> {
        DeviceFailure::Device(error)
    }

    fn cause<E>(failure: DeviceFailure<E, D::Error>) -> Result<E, D::Error> {
        match failure {
            DeviceFailure::Exchange(error) => Ok(error),
            DeviceFailure::Device(error) => Err(error),
        }
    }

    fn view(&mut self, if_pending: bool) -> &D::Buffer {
        let Some(view) = &mut self.view else { return &self.theta };
        if !self.view_is_current {
            self.kernels.subtract(self.layout.len(), &self.theta, &self.u, view);
            if if_pending {
                self.kernels.write_values(self.sent.values(), &mut self.selected);
                self.kernels.subtract_entries(&self.selected, view);
            }
            self.view_is_current = true;
        }
        view
    }

    fn norm(&mut self, gradient: &D::Buffer) -> Result<f64, D::Error> {
        Ok(self.kernels.sum_of_squares(self.layout.len(), gradient)?.sqrt())
    }

    /// Selects as well: a pass over the residual is little beside a gradient, and the kernels that take in count what they
    /// select from.
    fn accumulate(&mut self, gradient: &D::Buffer, rates: Rates) -> Result<(), D::Error> {
        self.view_is_current = false;
        self.take_in(gradient, rates)
    }

    fn step(
        &mut self,
        gradient: &D::Buffer,
        rates: Rates,
        payload: &mut Vec<u8>,
    ) -> Result<Result<(), NonFinite>, D::Error> {
        let Rates { rate, local_rate, .. } = rates;
        self.view_is_current = false;
        self.take_in(gradient, rates)?;
        let factor = match self.form {
            Form::Sum { .. } => 1.0,
            Form::Momentum { .. } => rate,
            Form::Normalised { .. } if rate == local_rate => 1.0,
            Form::Normalised { .. } => {
                assert!(rate <= local_rate, "a rate of {rate} is more than the worker's own of {local_rate}");
                rate / local_rate
            }
        };
        let sent = self.send(factor, payload)?;
        if sent.is_ok() {
            self.release(rates);
        }
        Ok(sent)
    }

    fn sent(&self) -> &Update {
        &self.sent
    }

    fn add(&mut self, difference: &Update) -> Result<bool, D::Error> {
        self.view_is_current = false;
        assert_eq!(difference.tensors(), 0..self.layout.tensors().len(), "a difference of some tensors only");
        let Self { kernels, received, theta, .. } = self;
        add_in_pieces(kernels, difference, PIECE_ENTRIES, received, theta)
    }

    fn hash(&mut self) -> Result<[u8; 32], D::Error> {
        let mut values = Vec::new();
        let mut hashes = Vec::with_capacity(self.layout.tensors().len());
        for tensor in self.layout.tensors() {
            values.resize(tensor.len, 0.0);
            self.kernels.download(&self.theta, tensor.offset, &mut values)?;
            hashes.push(tensor_hash(&values));
        }
        Ok(combine_tensor_hashes(hashes))
    }

    fn aside(&mut self, parts: [&Update; 2]) -> Result<Option<D::Storage>, D::Error> {
        let len = self.layout.len();
        let mut model = self.kernels.allocate_parameters(len)?;
        self.kernels.copy(len, &self.theta, &mut model);
        let mut finite = true;
        for part in parts {
            // What has overflowed stays so: the second part cannot make it finite again.
            finite &= add_in_pieces(&mut self.kernels, part, PIECE_ENTRIES, &mut self.received, &mut model)?;
        }
        Ok(finite.then_some(model))
    }

    fn contents(&mut self) -> Result<Contents<'_>, D::Error> {
        let (kernels, len) = (&mut self.kernels, self.layout.len());
        let scalar = match self.form {
            Form::Normalised { power, .. } => power,
            _ => 0.0,
        };
        let theta = Cow::Owned(Self::downloaded(kernels, &self.theta, len)?);
        let mut vectors = vec![Cow::Owned(Self::downloaded(kernels, &self.u, len)?)];
        if let Some(second) = &self.second {
            vectors.push(Cow::Owned(Self::downloaded(kernels, second, len)?));
        }
        Ok(Contents { theta, scalar, vectors })
    }

    fn restore(&mut self, scalar: f64, vectors: Vec<Vec<f32>>, sent: Update) -> Result<bool, D::Error> {
        let places = [Some(&mut self.u), self.second.as_mut()].into_iter().flatten();
        let expected = 1 + usize::from(matches!(self.form, Form::Momentum { .. } | Form::Normalised { .. }));
        let fits = |vector: &Vec<f32>| {
            vector.len() == self.layout.len() && vector.iter().all(|value| value.is_finite())
        };
        if vectors.len() != expected || !vectors.iter().all(fits) {
            return Ok(false);
        }
        if let Form::Normalised { power, .. } = &mut self.form {
            if !(0.0..=1.0).contains(&scalar) {
                return Ok(false);
            }
            *power = scalar;
        }
        for (place, vector) in places.zip(&vectors) {
            self.kernels.upload(vector, place);
        }
        // A push that was skipped sent nothing.
        if !sent.tensors().is_empty() {
            self.kernels.write(&sent.part(sent.tensors()), &mut self.selected)?;
        }
        (self.sent, self.view_is_current) = (sent, false);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use sanderling_common::sparse::{Compressor, decode};

    use super::*;
    use crate::kernels::cpu::CpuMethod;

    #[test]
    fn a_difference_in_pieces_is_the_difference() {
        let layout =
            [5, 40, 1, 300, 2].into_iter().enumerate().map(|(at, len)| (format!("t{at}"), vec![len]));
        let layout = Arc::new(Layout::new(layout).expect("a layout"));
        let values: Vec<f32> = (0..layout.len()).map(|at| (at % 7) as f32 - 3.0).collect();
        let (all, mut payload) = (0..layout.tensors().len(), Vec::new());
        let compression = Compression { keep: 0.3, dense_below: 3, format: ValueFormat::F32 };
        let mut compressor = Compressor::without_zeros(compression);
        compressor.compress(&layout, all.clone(), &values, &mut payload).expect("finite values");
        let update = decode(&layout, all, &payload).expect("what was just encoded");
        let expected = update.to_dense(&layout);

        let mut kernels = CpuMethod::default();
        let mut received = kernels.allocate_entries(&layout).expect("memory");
        for (most, count) in [(1, 5), (14, 3), (usize::MAX, 1)] {
            assert_eq!(pieces(&update, most).len(), count, "of up to {most}");
            let mut vector = vec![0.0; layout.len()];
            let finite = add_in_pieces(&mut kernels, &update, most, &mut received, &mut vector);
            assert_eq!((finite, &vector), (Ok(true), &expected));
        }
        let mut vector = vec![f32::INFINITY; layout.len()];
        assert_eq!(add_in_pieces(&mut kernels, &update, 14, &mut received, &mut vector), Ok(false));
    }
}
