//! What a compression method does with its vectors, for a device that keeps them.
//!
//! [`DeviceReplica`](crate::device::DeviceReplica) is written over these operations; the method itself, and the bytes of
//! what is sent, are the host's. So that a worker on a device comes to what one on the CPU comes to, no multiply-add is
//! fused, and roots and quotients are rounded to nearest.

use std::error::Error;
use std::ops::DerefMut;
use std::sync::Arc;

use sanderling_common::layout::Layout;
use sanderling_common::sparse::{Compression, UpdatePart};

/// A gradient on its way into the accumulators: d = scale·∇ + weight_decay·θ. All are flat vectors of one layout.
#[derive(Debug)]
pub struct Incoming<'a, B: ?Sized> {
    /// ∇.
    pub gradient: &'a B,
    /// What clipping multiplies ∇ with.
    pub scale: f32,
    /// λ; θ is not read if it is 0.
    pub weight_decay: f32,
    /// The parameters at which ∇ was taken.
    pub theta: &'a B,
}

/// What becomes of the accumulators.
#[derive(Debug)]
pub enum Accumulate<'a, B: ?Sized> {
    /// u ← u + rate·d.
    Sum {
        /// η.
        rate: f32,
        /// The sum.
        u: &'a mut B,
    },
    /// u ← momentum·u + d; r ← r + u.
    Momentum {
        /// m.
        momentum: f32,
        /// The velocity.
        u: &'a mut B,
        /// The sum of the velocities.
        r: &'a mut B,
    },
    /// With g = scale·∇: v ← beta2·v + (1 − beta2)·(g·g); u ← u + rate·(g/(√(v·correction) + epsilon) + weight_decay·θ).
    Normalised {
        /// β2.
        beta2: f32,
        /// What v is multiplied with for it to be a mean, 1/(1 − β2^c).
        correction: f32,
        /// ε.
        epsilon: f32,
        /// η_l.
        rate: f32,
        /// The sum.
        u: &'a mut B,
        /// The second moment.
        v: &'a mut B,
    },
}

/// A device that can keep a worker's model and the accumulators of its method.
///
/// Operations may be queued, in order with those of the model on the same device; only those that return a result wait.
///
/// # Panics
/// Every operation may panic when a vector is shorter than the layout: that is a defect of ours.
pub trait MethodKernels: Send {
    /// Borrowed `f32` memory of the device: `[f32]` on the CPU.
    type Buffer: ?Sized;
    /// Owned `f32` memory of the device.
    type Storage: DerefMut<Target = Self::Buffer> + Send;
    /// Some elements of a flat vector and a value for each, tensor by tensor, in device memory. It grows as it must.
    type Entries: Send;
    /// What can go wrong on the device.
    type Error: Error + Send + Sync + 'static;

    /// Zeroed memory for `len` floats.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate(&mut self, len: usize) -> Result<Self::Storage, Self::Error>;
    /// Zeroed memory for `len` parameters that the model on the same device is to read.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate_parameters(&mut self, len: usize) -> Result<Self::Storage, Self::Error>;
    /// No entries, of vectors of this layout.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn allocate_entries(&mut self, layout: &Arc<Layout>) -> Result<Self::Entries, Self::Error>;
    /// Copies host values to the start of a buffer.
    fn upload(&mut self, values: &[f32], buffer: &mut Self::Buffer);
    /// Copies elements of a buffer, from one on, to the host, after all operations before it.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn download(&mut self, buffer: &Self::Buffer, from: usize, values: &mut [f32])
    -> Result<(), Self::Error>;
    /// to ← from over the first `len` elements.
    fn copy(&mut self, len: usize, from: &Self::Buffer, to: &mut Self::Buffer);
    /// out = a − b over the first `len` elements.
    fn subtract(&mut self, len: usize, a: &Self::Buffer, b: &Self::Buffer, out: &mut Self::Buffer);

    /// The sum of squares of the first `len` elements, in float64, in an order that depends on `len` alone. It is finite
    /// just when all elements are.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn sum_of_squares(&mut self, len: usize, values: &Self::Buffer) -> Result<f64, Self::Error>;
    /// Takes a gradient into the accumulators, and selects from the sum, u or r: the entries become, of each of its
    /// tensors, the [`Compression::entries`] elements of largest magnitude, as a
    /// [`Selector`](sanderling_common::sparse::Selector) orders them, ties to the lower index; or all of them.
    ///
    /// # Errors
    /// If the device has not enough memory for what selecting takes.
    fn accumulate(
        &mut self,
        incoming: Incoming<'_, Self::Buffer>,
        accumulate: Accumulate<'_, Self::Buffer>,
        compression: Compression,
        entries: &mut Self::Entries,
    ) -> Result<(), Self::Error>;
    /// Replaces `indices` and `values` by the entries, as a [`Selection`](sanderling_common::sparse::Selection) has them.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn read(
        &mut self,
        entries: &Self::Entries,
        indices: &mut Vec<u32>,
        values: &mut Vec<f32>,
    ) -> Result<(), Self::Error>;
    /// The entries become those of a part of an update; of other tensors there are none.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn write(&mut self, part: &UpdatePart<'_>, entries: &mut Self::Entries) -> Result<(), Self::Error>;
    /// Gives the entries other values, as many as they are.
    fn write_values(&mut self, values: &[f32], entries: &mut Self::Entries);

    /// vector += entries; returns whether all those elements are finite.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn add_entries(
        &mut self,
        entries: &Self::Entries,
        vector: &mut Self::Buffer,
    ) -> Result<bool, Self::Error>;
    /// vector −= entries.
    fn subtract_entries(&mut self, entries: &Self::Entries, vector: &mut Self::Buffer);
    /// Sets the elements that there are entries of to zero.
    fn clear_entries(&mut self, entries: &Self::Entries, vector: &mut Self::Buffer);
}
