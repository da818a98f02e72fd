//! Launches of what a method does with its vectors, and the tables that they go by.

use std::sync::Arc;

use sanderling_common::layout::Layout;
use sanderling_common::sparse::{self, Compression, UpdatePart};

use super::attention::{floats_at, floats_at_mut};
use super::buffer::Memory;
use super::driver::{Address, Driver, Scalar};
use super::scratch::Slot;
use super::{Argument, Buffer, Cuda, CudaError, Unit, arguments, flat, int, long};
use crate::kernels::method::{Accumulate, Incoming, MethodKernels};

/// Numbers that the kernels' table has per tensor.
const TENSOR_FIELDS: usize = 6;

/// Elements of a chunk, and chunks of a span.
const CHUNK: usize = 8192;
const SPAN_CHUNKS: usize = 16;
const SPAN: usize = CHUNK * SPAN_CHUNKS;

/// Bins of a histogram.
const BINS: usize = 2048;

/// Numbers of a threshold.
const THRESHOLD: usize = 4;

/// Room per chunk for elements that may be the threshold.
const LIST: usize = 128;

/// The bits from which on the threshold is found, in the order of the passes.
const SHIFTS: [i32; 3] = [20, 10, 0];

/// Entries of a block that puts them where they belong.
const ENTRIES: usize = 1024;

/// Elements of a block that makes the view.
const VIEW: usize = 4096;

/// Elements that a block of the norm takes before there is another one.
const NORM: usize = 8192;

/// Some elements of a flat vector and a value for each, in a GPU's memory.
pub struct Entries {
    layout: Arc<Layout>,
    /// A row per tensor, see `method.cu`.
    table: Memory,
    /// Entries of all tensors, and those that have indices.
    places: usize,
    indexed: usize,
    indices: Memory,
    values: Memory,
    selection: Option<Selection>,
}

/// What selecting takes beside the entries.
struct Selection {
    compression: Compression,
    /// Whether the table of the entries is that of the selection.
    is_current: bool,
    spans: usize,
    span_tensor: Memory,
    histograms: Memory,
    thresholds: Memory,
    above: Memory,
    inside: Memory,
    lists: Memory,
}

/// Numbers that a device has as the host has them.
trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for i64 {}

fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, and any bytes may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and all bytes make numbers.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Replaces memory by at least that much, which holds anything.
fn reserve(memory: &mut Memory, driver: &Arc<dyn Driver>, bytes: usize) -> Result<(), CudaError> {
    if memory.bytes() < bytes {
        // The old memory goes first, so that both are never held at once.
        *memory = Memory::new(driver, 0)?;
        *memory = Memory::new(driver, bytes)?;
    }
    Ok(())
}

/// What selecting from vectors of a layout takes, and what is selected, in bytes.
pub fn selection_bytes(layout: &Layout, compression: Compression) -> usize {
    // One that selects makes room for all.
    let selects = layout.tensors().iter().any(|tensor| compression.entries(tensor.len) < tensor.len);
    let of_tensor = |len: usize| {
        let (count, spans) = (compression.entries(len), len.div_ceil(SPAN));
        let selecting = if selects { spans * SPAN_CHUNKS * (LIST + 2) + BINS + THRESHOLD } else { 0 };
        let indices = if count < len { count } else { 0 };
        // With a table for what is selected, and one for what is received.
        4 * (selecting + indices + count + spans) + 2 * 8 * TENSOR_FIELDS
    };
    layout.tensors().iter().map(|tensor| of_tensor(tensor.len)).sum()
}

impl Selection {
    fn new(driver: &Arc<dyn Driver>, layout: &Layout, compression: Compression) -> Result<Self, CudaError> {
        let tensors = layout.tensors();
        let spans_of = |len: usize| len.div_ceil(SPAN);
        let of_spans = tensors
            .iter()
            .enumerate()
            .flat_map(|(number, tensor)| std::iter::repeat_n(int(number), spans_of(tensor.len)));
        let span_tensor: Vec<i32> = of_spans.collect();
        let spans = span_tensor.len();
        // Whoever sends everything selects nothing.
        let selects = tensors.iter().any(|tensor| compression.entries(tensor.len) < tensor.len);
        let numbers = |count: usize| Memory::new(driver, if selects { 4 * count } else { 0 });
        let selection = Self {
            compression,
            is_current: false,
            spans,
            span_tensor: Memory::new(driver, 4 * spans)?,
            histograms: numbers(tensors.len() * BINS)?,
            thresholds: numbers(tensors.len() * THRESHOLD)?,
            above: numbers(spans * SPAN_CHUNKS)?,
            inside: numbers(spans * SPAN_CHUNKS)?,
            lists: numbers(spans * SPAN_CHUNKS * LIST)?,
        };
        driver.upload(bytes(&span_tensor), selection.span_tensor.address())?;
        Ok(selection)
    }

    fn selects(&self) -> bool {
        self.histograms.bytes() > 0
    }
}

impl Entries {
    fn new(driver: &Arc<dyn Driver>, layout: &Arc<Layout>) -> Result<Self, CudaError> {
        Ok(Self {
            table: Memory::new(driver, 8 * TENSOR_FIELDS * layout.tensors().len())?,
            layout: Arc::clone(layout),
            places: 0,
            indexed: 0,
            indices: Memory::new(driver, 0)?,
            values: Memory::new(driver, 0)?,
            selection: None,
        })
    }

    /// Makes room for so many entries of each tensor; all of them have no indices.
    fn set_counts(
        &mut self,
        driver: &Arc<dyn Driver>,
        counts: impl Iterator<Item = usize>,
    ) -> Result<(), CudaError> {
        let mut rows = Vec::with_capacity(TENSOR_FIELDS * self.layout.tensors().len());
        let (mut places, mut indexed, mut spans) = (0, 0, 0);
        for (tensor, count) in self.layout.tensors().iter().zip(counts) {
            rows.extend([tensor.offset, tensor.len, count, places, indexed, spans].map(long));
            places += count;
            indexed += if count < tensor.len { count } else { 0 };
            spans += tensor.len.div_ceil(SPAN);
        }
        driver.upload(bytes(&rows), self.table.address())?;
        reserve(&mut self.indices, driver, 4 * indexed)?;
        reserve(&mut self.values, driver, 4 * places)?;
        (self.places, self.indexed) = (places, indexed);
        Ok(())
    }

    /// Makes the entries those of a selection, which is yet to be made.
    fn prepare(&mut self, driver: &Arc<dyn Driver>, compression: Compression) -> Result<(), CudaError> {
        let mut selection = match self.selection.take() {
            Some(selection) if selection.compression == compression => selection,
            _ => Selection::new(driver, &self.layout, compression)?,
        };
        if !selection.is_current {
            let layout = Arc::clone(&self.layout);
            let counts = layout.tensors().iter().map(|tensor| compression.entries(tensor.len));
            self.set_counts(driver, counts)?;
            selection.is_current = true;
        }
        self.selection = Some(selection);
        Ok(())
    }

    fn tensors(&self) -> usize {
        self.layout.tensors().len()
    }
}

/// The sum that is selected from, to be read.
struct Sum {
    address: Address,
    name: &'static str,
}

impl Cuda {
    /// Another set of kernels of the same device and in the same queue.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self::with_driver(Arc::clone(&self.driver), self.precision, self.left_out)
    }

    /// Queues what takes a gradient in, and counts magnitudes if something is to be selected.
    fn accumulate_gradient(
        &mut self,
        incoming: &Incoming<'_, Buffer>,
        accumulate: Accumulate<'_, Buffer>,
        (entries, selection): (&Entries, &Selection),
    ) -> Address {
        let &Incoming { gradient, scale, weight_decay, theta } = incoming;
        let len = entries.layout.len();
        let (table, span_tensor) = (entries.table.address(), selection.span_tensor.address());
        let histograms = selection.histograms.address();
        let gradient = floats_at(gradient, 0..len);
        let theta = if weight_decay == 0.0 { 0 } else { floats_at(theta, 0..len) };
        let launch = flat(selection.spans, 256);
        let (sum, arguments): (Sum, Vec<Argument>) = match accumulate {
            Accumulate::Sum { rate, u } => {
                let u = floats_at_mut(u, len);
                let arguments =
                    arguments![table, span_tensor, histograms, gradient, theta, u, scale, weight_decay, rate];
                (Sum { address: u, name: "accumulate_momentum" }, arguments.to_vec())
            }
            Accumulate::Momentum { momentum, u, r } => {
                let (u, r) = (floats_at_mut(u, len), floats_at_mut(r, len));
                let arguments = arguments![
                    table,
                    span_tensor,
                    histograms,
                    gradient,
                    theta,
                    u,
                    r,
                    scale,
                    weight_decay,
                    momentum
                ];
                (Sum { address: r, name: "accumulate_dgc" }, arguments.to_vec())
            }
            Accumulate::Normalised { beta2, correction, epsilon, rate, u, v } => {
                let (u, v) = (floats_at_mut(u, len), floats_at_mut(v, len));
                let arguments = arguments![
                    table,
                    span_tensor,
                    histograms,
                    gradient,
                    theta,
                    u,
                    v,
                    scale,
                    weight_decay,
                    rate,
                    beta2,
                    correction,
                    epsilon
                ];
                (Sum { address: u, name: "accumulate_adam" }, arguments.to_vec())
            }
        };
        self.launch(Unit::Method, sum.name, launch, &arguments);
        sum.address
    }

    /// Queues the selection from a sum whose magnitudes were counted.
    fn select(&mut self, sum: Address, entries: &Entries, selection: &Selection) {
        let (table, span_tensor) = (entries.table.address(), selection.span_tensor.address());
        let (histograms, thresholds) = (selection.histograms.address(), selection.thresholds.address());
        let (above, inside, lists) =
            (selection.above.address(), selection.inside.address(), selection.lists.address());
        let (of_tensors, of_spans) = (flat(entries.tensors(), 256), flat(selection.spans, 256));
        if selection.selects() {
            let bin = |shift: i32| arguments![table, histograms, thresholds, shift].to_vec();
            self.launch(Unit::Method, "select_bin", of_tensors, &bin(SHIFTS[0]));
            let arguments = arguments![table, span_tensor, sum, histograms, thresholds, above, inside, lists];
            self.launch(Unit::Method, "select_inside", of_spans, arguments);
            self.launch(Unit::Method, "select_bin", of_tensors, &bin(SHIFTS[1]));
            let arguments = arguments![table, span_tensor, sum, histograms, thresholds, inside, lists];
            self.launch(Unit::Method, "select_last", of_spans, arguments);
            self.launch(Unit::Method, "select_bin", of_tensors, &bin(SHIFTS[2]));
            let arguments = arguments![table, span_tensor, sum, thresholds, above, inside, lists];
            self.launch(Unit::Method, "select_count", of_spans, arguments);
            let arguments = arguments![table, thresholds, above, inside];
            self.launch(Unit::Method, "select_scan", flat(entries.tensors(), 1024), arguments);
        }
        let (indices, values) = (entries.indices.address(), entries.values.address());
        let arguments = arguments![table, span_tensor, sum, thresholds, above, inside, indices, values];
        self.launch(Unit::Method, "select_write", of_spans, arguments);
    }

    /// Queues vector += factor · entries, and keeps the twin of the vector up to date if it is.
    fn entries_add(&mut self, entries: &Entries, factor: f32, vector: &mut Buffer, flag: Address) {
        let len = entries.layout.len();
        let is_fresh = vector.is_twin_fresh(len);
        let target = floats_at_mut(vector, len);
        let twin = if is_fresh { vector.twin_at(0..len, Scalar::Bf16).unwrap_or(0) } else { 0 };
        let (table, count, places) = (entries.table.address(), int(entries.tensors()), long(entries.places));
        let (indices, values) = (entries.indices.address(), entries.values.address());
        let arguments = arguments![table, count, places, indices, values, factor, target, twin, flag];
        self.launch(Unit::Method, "entries_add", flat(entries.places.div_ceil(ENTRIES), 256), arguments);
        if is_fresh {
            self.refresh_twin(vector, len);
        }
    }
}

impl MethodKernels for Cuda {
    type Buffer = Buffer;
    type Storage = Box<Buffer>;
    type Entries = Entries;
    type Error = CudaError;

    fn allocate(&mut self, len: usize) -> Result<Box<Buffer>, CudaError> {
        crate::kernels::Kernels::allocate(self, len)
    }

    fn allocate_parameters(&mut self, len: usize) -> Result<Box<Buffer>, CudaError> {
        crate::kernels::Kernels::allocate_factors(self, len)
    }

    fn allocate_entries(&mut self, layout: &Arc<Layout>) -> Result<Entries, CudaError> {
        Entries::new(&self.driver, layout)
    }

    fn upload(&mut self, values: &[f32], buffer: &mut Buffer) {
        let uploaded = self.driver().upload(bytes(values), floats_at_mut(buffer, values.len()));
        self.attempt(uploaded);
    }

    fn download(&mut self, buffer: &Buffer, from: usize, values: &mut [f32]) -> Result<(), CudaError> {
        let from = floats_at(buffer, from..from + values.len());
        self.fetch(from, bytes_mut(values))
    }

    fn copy(&mut self, len: usize, from: &Buffer, to: &mut Buffer) {
        let (from, to) = (floats_at(from, 0..len), floats_at_mut(to, len));
        if self.failure.is_none() {
            let copied = self.driver().copy(from, to, 4 * len);
            self.attempt(copied);
        }
    }

    fn subtract(&mut self, len: usize, a: &Buffer, b: &Buffer, out: &mut Buffer) {
        let (a, b, difference) = (floats_at(a, 0..len), floats_at(b, 0..len), floats_at_mut(out, len));
        // What the model reads is written beside it.
        let twin = out.twin_at(0..len, Scalar::Bf16).unwrap_or(0);
        let arguments = arguments![a, b, difference, twin, long(len)];
        self.launch(Unit::Method, "local_view", flat(len.div_ceil(VIEW), 256), arguments);
        self.refresh_twin(out, len);
    }

    fn sum_of_squares(&mut self, len: usize, values: &Buffer) -> Result<f64, CudaError> {
        self.total((Unit::Method, "squares_parts"), (floats_at(values, 0..len), len), NORM)
    }

    fn accumulate(
        &mut self,
        incoming: Incoming<'_, Buffer>,
        accumulate: Accumulate<'_, Buffer>,
        compression: Compression,
        entries: &mut Entries,
    ) -> Result<(), CudaError> {
        self.settle();
        entries.prepare(&self.driver, compression)?;
        let entries = &*entries;
        let selection = entries.selection.as_ref().expect("it was just prepared");
        let sum = self.accumulate_gradient(&incoming, accumulate, (entries, selection));
        self.select(sum, entries, selection);
        Ok(())
    }

    fn read(
        &mut self,
        entries: &Entries,
        indices: &mut Vec<u32>,
        values: &mut Vec<f32>,
    ) -> Result<(), CudaError> {
        indices.resize(entries.indexed, 0);
        values.resize(entries.places, 0.0);
        self.fetch(entries.indices.address(), bytes_mut(indices))?;
        self.fetch(entries.values.address(), bytes_mut(values))
    }

    fn write(&mut self, part: &UpdatePart<'_>, entries: &mut Entries) -> Result<(), CudaError> {
        let layout = Arc::clone(&entries.layout);
        if let Some(selection) = &mut entries.selection {
            selection.is_current = false;
        }
        let mut counts = vec![0; layout.tensors().len()];
        part.iter().for_each(|(tensor, sent)| counts[tensor] = sent.len());
        self.settle();
        entries.set_counts(&self.driver, counts.into_iter())?;
        // A tensor of which everything is sent may come with indices, which nobody reads.
        let unread = |(tensor, sent): (usize, sparse::Entries<'_>)| {
            matches!(sent, sparse::Entries::Sparse { .. }) && sent.len() == layout.tensors()[tensor].len
        };
        if part.iter().any(unread) {
            let read = part.iter().filter(|&entry| !unread(entry)).filter_map(|(_, sent)| match sent {
                sparse::Entries::Sparse { indices, .. } => Some(indices),
                sparse::Entries::Dense(_) => None,
            });
            let read: Vec<u32> = read.flatten().copied().collect();
            self.driver().upload(bytes(&read), entries.indices.address())?;
        } else {
            self.driver().upload(bytes(part.indices()), entries.indices.address())?;
        }
        self.write_values(part.values(), entries);
        Ok(())
    }

    fn write_values(&mut self, values: &[f32], entries: &mut Entries) {
        assert_eq!(values.len(), entries.places, "other values than entries");
        let uploaded = self.driver().upload(bytes(values), entries.values.address());
        self.attempt(uploaded);
    }

    fn add_entries(&mut self, entries: &Entries, vector: &mut Buffer) -> Result<bool, CudaError> {
        let flag = self.scratch(Slot::Integers, size_of::<i32>());
        if self.failure.is_none() {
            let zeroed = self.driver().zero(flag, size_of::<i32>());
            self.attempt(zeroed);
        }
        self.entries_add(entries, 1.0, vector, flag);
        let mut overflown = [0_i32];
        self.fetch(flag, bytes_mut(&mut overflown))?;
        Ok(overflown == [0])
    }

    fn subtract_entries(&mut self, entries: &Entries, vector: &mut Buffer) {
        self.entries_add(entries, -1.0, vector, 0);
    }

    fn clear_entries(&mut self, entries: &Entries, vector: &mut Buffer) {
        let target = floats_at_mut(vector, entries.layout.len());
        let (table, count, places) = (entries.table.address(), int(entries.tensors()), long(entries.places));
        let arguments = arguments![table, count, places, entries.indices.address(), target];
        self.launch(Unit::Method, "entries_zero", flat(entries.places.div_ceil(ENTRIES), 256), arguments);
    }
}
