//! Sparse vectors over a layout: which entries to send, and their bytes.
//!
//! A payload is a sequence of *tensor blocks*, one for each tensor of a run of whole tensors, in layout order.
//! Blocks are self-delimiting, so payloads of neighbouring shards are joined by concatenation. The byte layout
//! of a block is the table in [`codec`].
//!
//! A [`Compressor`] turns a dense vector into a payload and the [`Update`] that its receiver will see; [`decode`]
//! turns the payload into that same [`Update`], bit for bit. Whoever keeps what was not sent (a residual, a
//! difference) subtracts the [`Update`], not the exact values, so that nothing quantisation rounds off is lost.
//!
//! ```
//! use sanderling_common::layout::Layout;
//! use sanderling_common::sparse::{Compression, Compressor, ValueFormat, decode};
//!
//! let layout = Layout::new([("a", vec![4]), ("b", vec![3])])?;
//! let compression = Compression { keep: 0.5, dense_below: 0, format: ValueFormat::F32 };
//! let mut payload = Vec::new();
//! let mut compressor = Compressor::new(compression);
//! let update = compressor.compress(&layout, 0..2, &[1.0, -3.0, 0.0, 2.0, 5.0, 6.0, 4.0], &mut payload)?;
//!
//! assert_eq!(update.to_dense(&layout), [0.0, -3.0, 0.0, 2.0, 0.0, 6.0, 0.0]);
//! assert_eq!(decode(&layout, 0..2, &payload)?, update);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod aside;
pub mod codec;
mod compress;
pub mod rice;
mod select;
mod update;
mod values;

pub use aside::{aside_bytes_max, join_aside, split_aside};
pub use codec::{DecodeError, decode, decode_into, payload_bytes_max};
pub use compress::{Compressor, NonFinite, Selection};
pub use select::Selector;
pub use update::{Entries, Update, UpdatePart};

/// How values travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum ValueFormat {
    /// Four bytes, exact.
    F32,
    /// Two bytes, 8 bits of mantissa, rounded to nearest even.
    Bf16,
    /// One byte: a signed multiple of the tensor's own scale (its largest magnitude / 127).
    #[default]
    Int8,
    /// One bit: the sign, of the tensor's own magnitude (the mean of theirs).
    Sign,
}

impl ValueFormat {
    /// The format of what is sent at once and never made good by what comes later, such as the model of an evaluation:
    /// itself, but for signs, whose error only many sendings even out.
    #[must_use]
    pub fn at_once(self) -> Self {
        if self == Self::Sign { Self::Int8 } else { self }
    }
}

/// What is kept of each tensor. `keep` = 1 sends everything; tensors of up to `dense_below` elements always go whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compression {
    /// The kept fraction R of each tensor, in (0, 1].
    pub keep: f64,
    /// Tensors of up to this many elements are sent whole, without indices.
    pub dense_below: usize,
    /// How values travel.
    pub format: ValueFormat,
}

impl Compression {
    /// How many entries are sent of a tensor of `len` elements. If it is all of them, they go without indices.
    pub fn entries(&self, len: usize) -> usize {
        if len <= self.dense_below { len } else { kept(len, self.keep) }
    }
}

/// k = max(1, ⌊R·n⌋), computed in float64 (algorithms: step 3 of DGS).
pub fn kept(len: usize, keep: f64) -> usize {
    ((keep * len as f64).floor() as usize).clamp(1, len.max(1))
}
