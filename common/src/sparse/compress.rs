//! From a dense vector to a payload.

use std::ops::Range;

use crate::layout::Layout;
use crate::sparse::{Compression, Selector, Update, ValueFormat, codec, kept, rice, values};

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
    /// Sends the [`kept`] largest magnitudes of each tensor (ties to the lower index), always that many, and
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
        let values = &mut update.values[values_start..];
        if !values::all_finite(values) {
            return false;
        }
        match plan {
            Some(plan) => {
                codec::encode_sparse(&self.indices, plan, values, format, payload);
                update.indices.extend_from_slice(&self.indices);
            }
            None => codec::encode_dense(values, format, payload),
        }
        update.end_tensor(source.len(), plan.is_none());
        true
    }

    /// Leaves the selected indices in `self.indices` and says how to code them; `None` sends the tensor whole.
    fn select(&mut self, source: &[f32], format: ValueFormat) -> Option<rice::Plan> {
        let (count, zeros) = match self.policy {
            Policy::Top { compression, zeros } if source.len() <= compression.dense_below => {
                (source.len(), zeros)
            }
            Policy::Top { compression, zeros } => (kept(source.len(), compression.keep), zeros),
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
