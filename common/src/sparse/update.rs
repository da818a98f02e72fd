//! Decoded payloads.

use std::ops::Range;

use crate::layout::Layout;

/// A decoded payload: for each tensor of a run of whole tensors, the entries that are sent and their values as the
/// receiver sees them.
///
/// It is made by [`Compressor`](crate::sparse::Compressor) and [`decode`](crate::sparse::decode) only, which
/// guarantee that indices ascend strictly within their tensor and that every value is finite. A server hands each
/// shard its [`part`](Self::part) of one shared `Update`, without copying.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    first_tensor: usize,
    segments: Vec<Segment>,
    pub(super) indices: Vec<u32>,
    pub(super) values: Vec<f32>,
}

/// One tensor's share of the two arrays.
#[derive(Clone, Debug, PartialEq)]
struct Segment {
    dense: bool,
    // Ends in `indices` and `values`; they start where the previous segment's end.
    indices_end: usize,
    values_end: usize,
}

/// The entries of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Entries<'a> {
    /// Every element.
    Dense(&'a [f32]),
    /// Some elements: tensor-relative indices, strictly ascending, and as many values.
    Sparse {
        /// Indices into the tensor.
        indices: &'a [u32],
        /// The values there.
        values: &'a [f32],
    },
}

impl Entries<'_> {
    /// How many values are sent.
    pub fn len(&self) -> usize {
        match self {
            Self::Dense(values) | Self::Sparse { values, .. } => values.len(),
        }
    }

    /// Whether nothing of this tensor is sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `apply` with each element of `tensor` that is sent and the value sent for it.
    ///
    /// # Panics
    /// If `tensor` is not of the length the entries were made for.
    pub fn for_each(&self, tensor: &mut [f32], mut apply: impl FnMut(&mut f32, f32)) {
        match self {
            Self::Dense(values) => {
                assert_eq!(values.len(), tensor.len(), "a dense tensor of another length");
                tensor.iter_mut().zip(*values).for_each(|(element, &value)| apply(element, value));
            }
            Self::Sparse { indices, values } => {
                for (&index, &value) in indices.iter().zip(*values) {
                    apply(&mut tensor[index as usize], value);
                }
            }
        }
    }
}

impl Update {
    /// Empties the update, keeping its buffers, and makes it start at a tensor.
    pub(super) fn reset(&mut self, first_tensor: usize) {
        self.first_tensor = first_tensor;
        self.segments.clear();
        self.indices.clear();
        self.values.clear();
    }

    /// Declares what was appended to `indices` and `values` since the last call to be the next tensor's entries.
    ///
    /// # Panics
    /// If the entries break the invariants of the type.
    pub(super) fn end_tensor(&mut self, tensor_len: usize, dense: bool) {
        let (indices_start, values_start) = self.ends(self.segments.len());
        let indices = &self.indices[indices_start..];
        let value_count = self.values.len() - values_start;
        if dense {
            assert!(
                indices.is_empty() && value_count == tensor_len,
                "a dense tensor has every value and no index"
            );
        } else {
            assert_eq!(indices.len(), value_count, "a sparse tensor has as many values as indices");
            assert!(indices.last().is_none_or(|&last| (last as usize) < tensor_len), "an index out of range");
            debug_assert!(indices.is_sorted_by(|a, b| a < b), "indices ascend strictly");
        }
        debug_assert!(self.values[values_start..].iter().all(|value| value.is_finite()), "values are finite");
        self.segments.push(Segment { dense, indices_end: self.indices.len(), values_end: self.values.len() });
    }

    /// Forgets what was appended to `indices` and `values` since the last finished tensor.
    pub(super) fn abandon_tensor(&mut self) {
        let (indices_end, values_end) = self.ends(self.segments.len());
        self.indices.truncate(indices_end);
        self.values.truncate(values_end);
    }

    /// Where the first `segments` segments end in `indices` and `values`.
    fn ends(&self, segments: usize) -> (usize, usize) {
        segments.checked_sub(1).map_or((0, 0), |last| {
            let segment = &self.segments[last];
            (segment.indices_end, segment.values_end)
        })
    }

    /// The run of tensors that this update covers.
    pub fn tensors(&self) -> Range<usize> {
        self.first_tensor..self.first_tensor + self.segments.len()
    }

    /// How many values are sent, over all tensors.
    pub fn entry_count(&self) -> usize {
        self.values.len()
    }

    /// All values, one tensor's after the other.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The indices of all tensors that are not sent whole, one tensor's after the other.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The largest magnitude of a value; 0 if none is sent.
    pub fn magnitude_max(&self) -> f32 {
        // Every value is finite.
        self.values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
    }

    /// The Euclidean norm of the values, summed in float64 in their order.
    pub fn norm(&self) -> f64 {
        self.values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
    }

    /// The entries of one tensor.
    ///
    /// # Panics
    /// If the tensor is not in [`Self::tensors`].
    pub fn entries(&self, tensor: usize) -> Entries<'_> {
        assert!(self.tensors().contains(&tensor), "tensor {tensor} is not among {:?}", self.tensors());
        let segment = tensor - self.first_tensor;
        let (indices_start, values_start) = self.ends(segment);
        let Segment { dense, indices_end, values_end } = self.segments[segment];
        let values = &self.values[values_start..values_end];
        if dense {
            Entries::Dense(values)
        } else {
            Entries::Sparse { indices: &self.indices[indices_start..indices_end], values }
        }
    }

    /// The tensors and their entries, in layout order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Entries<'_>)> {
        self.all().into_iter_entries()
    }

    /// The part that concerns a run of tensors, such as one shard's.
    ///
    /// # Panics
    /// If `tensors` is not within [`Self::tensors`].
    pub fn part(&self, tensors: Range<usize>) -> UpdatePart<'_> {
        let own = self.tensors();
        assert!(
            own.start <= tensors.start && tensors.start <= tensors.end && tensors.end <= own.end,
            "tensors {tensors:?} are not within {own:?}"
        );
        UpdatePart { update: self, tensors }
    }

    fn all(&self) -> UpdatePart<'_> {
        UpdatePart { update: self, tensors: self.tensors() }
    }

    /// run += update, one float32 addition per entry. `run` holds exactly the tensors of [`Self::tensors`].
    ///
    /// # Panics
    /// If `run` has another length.
    pub fn add_to(&self, layout: &Layout, run: &mut [f32]) {
        self.all().add_to(layout, run);
    }

    /// run −= update, one float32 subtraction per entry. `run` holds exactly the tensors of [`Self::tensors`].
    ///
    /// # Panics
    /// If `run` has another length.
    pub fn subtract_from(&self, layout: &Layout, run: &mut [f32]) {
        self.all().subtract_from(layout, run);
    }

    /// The tensors of [`Self::tensors`] as one flat vector, zero where nothing is sent.
    pub fn to_dense(&self, layout: &Layout) -> Vec<f32> {
        let mut dense = vec![0.0; layout.elements(self.tensors()).len()];
        self.all().for_each(layout, &mut dense, |element, value| *element = value);
        dense
    }
}

/// An [`Update`] restricted to a run of its tensors.
#[derive(Clone, Debug)]
pub struct UpdatePart<'a> {
    update: &'a Update,
    tensors: Range<usize>,
}

impl<'a> UpdatePart<'a> {
    /// The run of tensors.
    pub fn tensors(&self) -> Range<usize> {
        self.tensors.clone()
    }

    /// The tensors and their entries, in layout order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Entries<'a>)> {
        self.clone().into_iter_entries()
    }

    fn into_iter_entries(self) -> impl Iterator<Item = (usize, Entries<'a>)> {
        let update = self.update;
        self.tensors.map(move |tensor| (tensor, update.entries(tensor)))
    }

    /// All values, one tensor's after the other.
    pub fn values(&self) -> &'a [f32] {
        let ((_, first), (_, end)) = self.bounds();
        &self.update.values[first..end]
    }

    /// The indices of all tensors that are not sent whole, one tensor's after the other.
    pub fn indices(&self) -> &'a [u32] {
        let ((first, _), (end, _)) = self.bounds();
        &self.update.indices[first..end]
    }

    /// Where its entries start and end in the update's indices and values.
    fn bounds(&self) -> ((usize, usize), (usize, usize)) {
        let before = self.update.first_tensor;
        (self.update.ends(self.tensors.start - before), self.update.ends(self.tensors.end - before))
    }

    /// Calls `apply` with each element of `run` that is sent and the value sent for it. `run` holds exactly the
    /// tensors of [`Self::tensors`].
    ///
    /// # Panics
    /// If `run` has another length.
    pub fn for_each(&self, layout: &Layout, run: &mut [f32], mut apply: impl FnMut(&mut f32, f32)) {
        let elements = layout.elements(self.tensors());
        assert_eq!(run.len(), elements.len(), "the run holds other tensors than {:?}", self.tensors);
        for (tensor, entries) in self.iter() {
            let range = layout.tensors()[tensor].range();
            let tensor = &mut run[range.start - elements.start..range.end - elements.start];
            entries.for_each(tensor, &mut apply);
        }
    }

    /// run += update, one float32 addition per entry. `run` holds exactly the tensors of [`Self::tensors`].
    ///
    /// # Panics
    /// If `run` has another length.
    pub fn add_to(&self, layout: &Layout, run: &mut [f32]) {
        self.for_each(layout, run, |element, value| *element += value);
    }

    /// run −= update, one float32 subtraction per entry. `run` holds exactly the tensors of [`Self::tensors`].
    ///
    /// # Panics
    /// If `run` has another length.
    pub fn subtract_from(&self, layout: &Layout, run: &mut [f32]) {
        self.for_each(layout, run, |element, value| *element -= value);
    }
}
