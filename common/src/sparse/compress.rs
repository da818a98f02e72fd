//! From a dense vector to a payload.

use std::ops::Range;

use crate::layout::Layout;
use crate::sparse::{Compression, Selector, Update, ValueFormat, codec, rice, values};

/// A vector that cannot be sent, because an entry to be sent is infinite or not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an entry of tensor {tensor} that would be sent is not finite")]
pub struct NonFinite {
    /// The number of the tensor in the layout.
    pub tensor: usize,
}

/// Selects the entries of a vector that are sent, and encodes them; its buffers are reused from call to call.
///
/// Results depend on the arguments alone, never on earlier calls.
#[derive(Debug)]
pub struct Compressor {
    policy: Policy,
    selector: Selector,
    indices: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
enum Policy {
    /// The top R of each tensor; `zeros` tells whether an entry of the selection is sent even if it is zero.
    Top { compression: Compression, zeros: bool },
    /// Everything that is not zero, exactly.
    Nonzero,
}

impl Compressor {
    /// Sends the [`kept`](super::kept) largest magnitudes of each tensor (ties to the lower index), always that many, and
    /// tensors of up to `dense_below` elements whole.
    ///
    /// # Panics
    /// If `keep` lies outside (0, 1].
    pub fn new(compression: Compression) -> Self {
        Self::with(Policy::Top { compression, zeros: true })
    }

    /// As [`Self::new`], but entries that are zero are left out: what a server sends of a difference, which may
    /// have fewer entries than may be kept. Tensors that would go whole go in the shorter of both forms.
    ///
    /// # Panics
    /// If `keep` lies outside (0, 1].
    pub fn without_zeros(compression: Compression) -> Self {
        Self::with(Policy::Top { compression, zeros: false })
    }

    /// Sends every entry that is not zero, exactly, in `f32`: a server without secondary compression.
    pub fn nonzero() -> Self {
        Self::with(Policy::Nonzero)
    }

    fn with(policy: Policy) -> Self {
        if let Policy::Top { compression: Compression { keep, .. }, .. } = policy {
            assert!(0.0 < keep && keep <= 1.0, "the kept fraction {keep} lies outside (0, 1]");
        }
        Self { policy, selector: Selector::default(), indices: Vec::new() }
    }

    /// Appends the blocks of a run of tensors to `payload` and returns what their receiver will decode. `source`
    /// holds exactly those tensors.
    ///
    /// # Errors
    /// [`NonFinite`] if an entry to be sent is not finite; `payload` is then as it was.
    ///
    /// # Panics
    /// If `source` has another length than the run.
    pub fn compress(
        &mut self,
        layout: &Layout,
        tensors: Range<usize>,
        source: &[f32],
        payload: &mut Vec<u8>,
    ) -> Result<Update, NonFinite> {
        let mut update = Update::default();
        self.compress_into(layout, tensors, source, 1.0, payload, &mut update)?;
        Ok(update)
    }

    /// As [`Self::compress`], into an update whose buffers are reused; sends `factor` times each selected entry of
    /// `source` (DGC selects on r and sends η·r).
    ///
    /// # Errors
    /// [`NonFinite`] if a value to be sent is not finite; `payload` is then as it was and `update` unspecified.
    ///
    /// # Panics
    /// If `source` has another length than the run.
    pub fn compress_into(
        &mut self,
        layout: &Layout,
        tensors: Range<usize>,
        source: &[f32],
        factor: f32,
        payload: &mut Vec<u8>,
        update: &mut Update,
    ) -> Result<(), NonFinite> {
        let elements = layout.elements(tensors.clone());
        assert_eq!(source.len(), elements.len(), "the source holds other tensors than {tensors:?}");
        let payload_start = payload.len();
        update.reset(tensors.start);
        for tensor in tensors {
            let range = layout.tensors()[tensor].range();
            let source = &source[range.start - elements.start..range.end - elements.start];
            if !self.compress_tensor(source, factor, payload, update) {
                payload.truncate(payload_start);
                return Err(NonFinite { tensor });
            }
        }
        Ok(())
    }

    /// Appends one block; returns whether its values are finite.
    fn compress_tensor(
        &mut self,
        source: &[f32],
        factor: f32,
        payload: &mut Vec<u8>,
        update: &mut Update,
    ) -> bool {
        let format = match self.policy {
            Policy::Top { compression, .. } => compression.format,
            Policy::Nonzero => ValueFormat::F32,
        };
        let plan = self.select(source, format);
        let values_start = update.values.len();
        let at_index = |&index: &u32| factor * source[index as usize];
        match plan {
            Some(_) => update.values.extend(self.indices.iter().map(at_index)),
            None => update.values.extend(source.iter().map(|value| factor * value)),
        }
        let indices = plan.map(|plan| (&self.indices[..], plan));
        append_block(source.len(), indices, values_start, format, (payload, update))
    }

    /// Leaves the selected indices in `self.indices` and says how to code them; `None` sends the tensor whole.
    fn select(&mut self, source: &[f32], format: ValueFormat) -> Option<rice::Plan> {
        let (count, zeros) = match self.policy {
            Policy::Top { compression, zeros } => (compression.entries(source.len()), zeros),
            Policy::Nonzero => (source.len(), false),
        };
        let whole = count == source.len();
        if zeros {
            return (!whole).then(|| {
                self.selector.top_k(source, count, &mut self.indices);
                rice::plan(&self.indices)
            });
        }
        if whole {
            // An index takes a bit at least; often that shows already that they do not pay, without finding them.
            let nonzero = source.iter().filter(|&&value| value != 0.0).count();
            if values::encoded_bytes(nonzero, format) + nonzero / 8
                >= values::encoded_bytes(source.len(), format)
            {
                return None;
            }
        }
        self.selector.top_k_nonzero(source, count, &mut self.indices);
        let plan = rice::plan(&self.indices);
        let sparse_bytes = codec::sparse_bytes(self.indices.len(), plan, format);
        let shorter_whole = whole && codec::dense_bytes(source.len(), format) <= sparse_bytes;
        (!shorter_whole).then_some(plan)
    }
}

/// Appends the block of a tensor whose values `update` has from `values_start` on, sparse if there are indices; returns
/// whether the values are finite, and appends nothing to the payload if not.
fn append_block(
    tensor_len: usize,
    indices: Option<(&[u32], rice::Plan)>,
    values_start: usize,
    format: ValueFormat,
    (payload, update): (&mut Vec<u8>, &mut Update),
) -> bool {
    let values = &mut update.values[values_start..];
    if !values::all_finite(values) {
        return false;
    }
    match indices {
        Some((indices, plan)) => {
            codec::encode_sparse(indices, plan, values, format, payload);
            update.indices.extend_from_slice(indices);
        }
        None => codec::encode_dense(values, format, payload),
    }
    update.end_tensor(tensor_len, indices.is_none());
    true
}

/// What a [`Compressor::new`] would send of a vector, selected by somebody else: by the device that has the vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Selection<'a> {
    /// Of each tensor that is not sent whole, the indices of its [`entries`](Compression::entries) largest magnitudes,
    /// ascending; one tensor after the other.
    pub indices: &'a [u32],
    /// The values there, and all those of the tensors that are sent whole.
    pub values: &'a [f32],
}

impl Selection<'_> {
    /// As [`Compressor::compress_into`] for all tensors of the layout, with the same bytes.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// If there are not as many entries as the compression keeps, or indices lie outside their tensors.
    pub fn encode_into(
        &self,
        layout: &Layout,
        compression: Compression,
        factor: f32,
        payload: &mut Vec<u8>,
        update: &mut Update,
    ) -> Result<(), NonFinite> {
        let (mut indices, mut values) = (self.indices, self.values);
        let payload_start = payload.len();
        update.reset(0);
        for (number, tensor) in layout.tensors().iter().enumerate() {
            let count = compression.entries(tensor.len);
            let own =
                (count < tensor.len).then(|| cut(&mut indices, count)).map(|own| (own, rice::plan(own)));
            let values_start = update.values.len();
            update.values.extend(cut(&mut values, count).iter().map(|value| factor * value));
            if !append_block(tensor.len, own, values_start, compression.format, (payload, update)) {
                payload.truncate(payload_start);
                return Err(NonFinite { tensor: number });
            }
        }
        assert!(indices.is_empty() && values.is_empty(), "more was selected than is kept");
        Ok(())
    }
}

/// Cuts the first `count` elements off.
fn cut<'a, T>(rest: &mut &'a [T], count: usize) -> &'a [T] {
    let (head, tail) = rest.split_at_checked(count).expect("as much was selected as is kept");
    *rest = tail;
    head
}
