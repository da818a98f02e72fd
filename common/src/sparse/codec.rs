//! The bytes of a payload.
//!
//! A payload is one block per tensor, in layout order, without anything between them. All numbers are
//! little-endian; n is the number of elements of the tensor.
//!
//! | part | bytes | present | content |
//! | --- | --- | --- | --- |
//! | flags | 1 | always | bits 0–1: value format (0 f32, 1 bf16, 2 int8, 3 sign); bit 2: 1 sparse, 0 dense; bits 3–7: Rice parameter p, 0 unless sparse with entries |
//! | count | 1–5 | sparse | number of entries, at most n, LEB128 in its shortest form |
//! | gaps | ⌈bits/8⌉ | sparse, count > 0 | Golomb–Rice coded gaps between indices: ⌊gap/2^p⌋ zero bits, a one bit, p low bits of the gap; bits fill bytes from the least significant up, padded with zeros |
//! | scale | 4 | int8 or sign, with values | f32: max abs(v) / 127, or the mean of abs(v); not negative, and 0 only if all codes are |
//! | values | 4, 2, 1 or ⅛ each | with values | f32; or its upper half, rounded to nearest even (bf16); or a signed multiple of the scale, −127 to 127; or a bit, 1 for minus the scale, filled and padded as the gaps are |
//!
//! A dense block has n values, a sparse one `count`. The gap of an index is the number of elements skipped since
//! the previous entry, so indices ascend strictly by construction. There is one way only to write flags, counts,
//! padding and codes, and no value is infinite or not a number; anything else is a [`DecodeError`].

use std::ops::Range;

use crate::layout::Layout;
use crate::sparse::rice::{self, Plan, RiceError};
use crate::sparse::values::{self, ValueError};
use crate::sparse::{Update, ValueFormat};

const SPARSE: u8 = 1 << 2;
const PARAMETER_SHIFT: u32 = 3;

/// Why bytes are not a payload. `tensor` is the number of the tensor in the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload ends within a block.
    #[error("the payload ends within tensor {tensor}")]
    Truncated {
        /// The tensor.
        tensor: usize,
    },
    /// Bytes after the last block.
    #[error("the payload has {bytes} bytes too many")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// Flags that no encoder writes.
    #[error("tensor {tensor} has the unknown flags {flags:#04x}")]
    Flags {
        /// The tensor.
        tensor: usize,
        /// Its flags.
        flags: u8,
    },
    /// More entries than elements.
    #[error("tensor {tensor} of {len} elements has {count} entries")]
    Count {
        /// The tensor.
        tensor: usize,
        /// Its number of elements.
        len: usize,
        /// The number of entries it is said to have.
        count: u64,
    },
    /// An index beyond the end of the tensor.
    #[error("tensor {tensor} of {len} elements has an index beyond them")]
    OutOfRange {
        /// The tensor.
        tensor: usize,
        /// Its number of elements.
        len: usize,
    },
    /// An infinite value, or one that is not a number.
    #[error("tensor {tensor} has a value that is not finite")]
    NonFinite {
        /// The tensor.
        tensor: usize,
    },
    /// A count, padding, scale or code in a form that no encoder writes.
    #[error("tensor {tensor} is not in canonical form")]
    NotCanonical {
        /// The tensor.
        tensor: usize,
    },
}

/// The most bytes that a payload for the whole layout can have.
///
/// The parameter of a block is the best for its gaps and p = 0 needs n bits at most, so that a block is at most
/// 1 (flags) + 5 (count) + ⌈n/8⌉ (gaps) + 4 (scale) + 4·n (values) bytes.
pub fn payload_bytes_max(layout: &Layout) -> u64 {
    layout.tensors().iter().map(|tensor| tensor.len as u64).map(|len| 10 + len.div_ceil(8) + 4 * len).sum()
}

fn format_code(format: ValueFormat) -> u8 {
    match format {
        ValueFormat::F32 => 0,
        ValueFormat::Bf16 => 1,
        ValueFormat::Int8 => 2,
        ValueFormat::Sign => 3,
    }
}

/// Bytes of a sparse block.
pub(super) fn sparse_bytes(count: usize, plan: Plan, format: ValueFormat) -> usize {
    1 + leb128_bytes(count) + plan.bytes() + values::encoded_bytes(count, format)
}

/// Bytes of a dense block.
pub(super) fn dense_bytes(tensor_len: usize, format: ValueFormat) -> usize {
    1 + values::encoded_bytes(tensor_len, format)
}

/// Appends a sparse block. The values are replaced by what their bytes decode to.
pub(super) fn encode_sparse(
    indices: &[u32],
    plan: Plan,
    values: &mut [f32],
    format: ValueFormat,
    payload: &mut Vec<u8>,
) {
    let start = payload.len();
    payload.push(format_code(format) | SPARSE | (plan.parameter() as u8) << PARAMETER_SHIFT);
    encode_leb128(indices.len(), payload);
    rice::encode(indices, plan, payload);
    values::encode(values, format, payload);
    debug_assert_eq!(payload.len() - start, sparse_bytes(indices.len(), plan, format));
}

/// Appends a dense block. The values are replaced by what their bytes decode to.
pub(super) fn encode_dense(values: &mut [f32], format: ValueFormat, payload: &mut Vec<u8>) {
    payload.push(format_code(format));
    values::encode(values, format, payload);
}

fn leb128_bytes(count: usize) -> usize {
    (count.max(1).ilog2() / 7 + 1) as usize
}

fn encode_leb128(mut count: usize, out: &mut Vec<u8>) {
    while count >= 0x80 {
        out.push(count as u8 | 0x80);
        count >>= 7;
    }
    out.push(count as u8);
}

/// Reads a payload for a run of tensors.
///
/// It never panics, whatever the bytes, and allocates at most a small multiple of their number.
///
/// # Errors
/// A [`DecodeError`] unless the bytes are exactly one canonical block per tensor.
///
/// # Panics
/// If `tensors` does not lie within the layout.
pub fn decode(layout: &Layout, tensors: Range<usize>, payload: &[u8]) -> Result<Update, DecodeError> {
    let mut update = Update::default();
    decode_into(layout, tensors, payload, &mut update)?;
    Ok(update)
}

/// Like [`decode`], into an update whose buffers are reused. After an error it holds the tensors before that.
///
/// # Errors
/// As [`decode`].
///
/// # Panics
/// As [`decode`].
pub fn decode_into(
    layout: &Layout,
    tensors: Range<usize>,
    payload: &[u8],
    update: &mut Update,
) -> Result<(), DecodeError> {
    update.reset(tensors.start);
    let mut rest = payload;
    for tensor in tensors {
        let len = layout.tensors()[tensor].len;
        let outcome = decode_block(tensor, len, &mut rest, update);
        if outcome.is_err() {
            update.abandon_tensor();
            return outcome;
        }
    }
    if rest.is_empty() { Ok(()) } else { Err(DecodeError::Trailing { bytes: rest.len() }) }
}

fn decode_block(tensor: usize, len: usize, rest: &mut &[u8], update: &mut Update) -> Result<(), DecodeError> {
    let flags = *take(rest, 1).and_then(<[u8]>::first).ok_or(DecodeError::Truncated { tensor })?;
    let format = match flags & 3 {
        0 => ValueFormat::F32,
        1 => ValueFormat::Bf16,
        2 => ValueFormat::Int8,
        _ => ValueFormat::Sign,
    };
    let sparse = flags & SPARSE != 0;
    let parameter = u32::from(flags >> PARAMETER_SHIFT);
    let count = if sparse { decode_leb128(tensor, rest)? } else { len as u64 };
    if count > len as u64 {
        return Err(DecodeError::Count { tensor, len, count });
    }
    let count = count as usize;
    if parameter != 0 && (!sparse || count == 0) {
        return Err(DecodeError::Flags { tensor, flags });
    }
    let value_bytes = values::encoded_bytes(count, format);
    if rest.len() < value_bytes {
        return Err(DecodeError::Truncated { tensor });
    }
    if sparse {
        let used =
            rice::decode(rest, parameter, count, len, &mut update.indices).map_err(|error| match error {
                RiceError::Truncated => DecodeError::Truncated { tensor },
                RiceError::OutOfRange => DecodeError::OutOfRange { tensor, len },
                RiceError::Padding => DecodeError::NotCanonical { tensor },
            })?;
        *rest = &rest[used..];
    }
    let bytes = take(rest, value_bytes).ok_or(DecodeError::Truncated { tensor })?;
    values::decode(bytes, count, format, &mut update.values).map_err(|error| match error {
        ValueError::NonFinite => DecodeError::NonFinite { tensor },
        ValueError::NotCanonical => DecodeError::NotCanonical { tensor },
    })?;
    update.end_tensor(len, !sparse);
    Ok(())
}

/// Cuts the first `bytes` bytes off.
fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(bytes)?;
    *rest = left;
    Some(taken)
}

fn decode_leb128(tensor: usize, rest: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut count = 0;
    // Five bytes hold the 32 bits that the largest tensor needs.
    for shift in [0, 7, 14, 21, 28] {
        let byte = *take(rest, 1).and_then(<[u8]>::first).ok_or(DecodeError::Truncated { tensor })?;
        count |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let shortest = byte != 0 || shift == 0;
            return if shortest { Ok(count) } else { Err(DecodeError::NotCanonical { tensor }) };
        }
    }
    Err(DecodeError::NotCanonical { tensor })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> Layout {
        Layout::new([("a", vec![5]), ("b", vec![4_000_000_000]), ("c", vec![300])]).unwrap()
    }

    proptest! {
        #[test]
        fn random_bytes_neither_panic_nor_allocate_much(
            mut payload in prop::collection::vec(any::<u8>(), 0..200),
            flags in any::<u8>(),
            first in 0_usize..3,
        ) {
            if let Some(byte) = payload.first_mut() {
                *byte = flags;
            }
            let mut update = Update::default();
            let outcome = decode_into(&layout(), first..3, &payload, &mut update);
            prop_assert!(outcome.is_err() || update.tensors() == (first..3));
            // An index takes a bit at least, and so does a value; vectors grow to twice what is asked for.
            prop_assert!(update.indices.capacity() <= 16 * payload.len() + 8);
            prop_assert!(update.values.capacity() <= 16 * payload.len() + 8);
        }
    }

    #[test]
    fn refuses_what_no_encoder_writes() {
        let check = |payload: &[u8], expected| {
            assert_eq!(decode(&layout(), 0..1, payload), Err(expected), "{payload:02x?}");
        };
        let tensor = 0;
        check(&[], DecodeError::Truncated { tensor });
        check(&[1 << 3 | 3], DecodeError::Flags { tensor, flags: 1 << 3 | 3 });
        check(&[3], DecodeError::Truncated { tensor });
        check(&[3, 0, 0, 0, 0, 1 << 5], DecodeError::NotCanonical { tensor });
        check(&[0], DecodeError::Truncated { tensor });
        check(&[1 << 3, 0, 0], DecodeError::Flags { tensor, flags: 1 << 3 });
        check(&[SPARSE | 1 << 3, 0], DecodeError::Flags { tensor, flags: SPARSE | 1 << 3 });
        check(&[SPARSE], DecodeError::Truncated { tensor });
        check(&[SPARSE, 6], DecodeError::Count { tensor, len: 5, count: 6 });
        check(&[SPARSE, 0x81], DecodeError::Truncated { tensor });
        check(&[SPARSE, 0x81, 0x00], DecodeError::NotCanonical { tensor });
        check(&[SPARSE, 0xff, 0xff, 0xff, 0xff, 0xff], DecodeError::NotCanonical { tensor });
        check(&[SPARSE, 0, 7], DecodeError::Trailing { bytes: 1 });
        check(&[SPARSE, 1, 0b10_0000, 0, 0, 0, 0], DecodeError::OutOfRange { tensor, len: 5 });
        check(&[SPARSE, 1, 0b11, 0, 0, 0, 0], DecodeError::NotCanonical { tensor });
        check(&[SPARSE, 1, 0b1, 0, 0, 0xc0, 0x7f], DecodeError::NonFinite { tensor });
    }

    #[test]
    fn counts_have_one_form() {
        for count in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, 0xffff_ffff] {
            let mut bytes = Vec::new();
            encode_leb128(count, &mut bytes);
            assert_eq!(bytes.len(), leb128_bytes(count));
            let mut rest = &bytes[..];
            assert_eq!(decode_leb128(0, &mut rest), Ok(count as u64));
            assert!(rest.is_empty());
        }
    }
}
