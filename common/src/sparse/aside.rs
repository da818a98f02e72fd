//! Two payloads as one: a difference, and what the first one's values leave over of it.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | length of the first payload, little-endian |
//! | length | tensor blocks of the difference |
//! | rest | tensor blocks of what is left |
//!
//! With 8-bit values in both, what is left over in the end is at most max|d| / 254² of each tensor's difference d.

use crate::layout::Layout;

use super::payload_bytes_max;

/// The bytes of both.
pub fn join_aside(first: &[u8], second: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + first.len() + second.len());
    bytes.extend_from_slice(&(first.len() as u64).to_le_bytes());
    bytes.extend_from_slice(first);
    bytes.extend_from_slice(second);
    bytes
}

/// Both again; `None` if the first is longer than what is there.
pub fn split_aside(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_at_checked(8)?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    rest.split_at_checked(usize::try_from(length).ok()?)
}

/// The most bytes that both can have.
pub fn aside_bytes_max(layout: &Layout) -> u64 {
    8 + 2 * payload_bytes_max(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_payloads_come_apart_as_they_were_and_other_bytes_do_not() {
        for (first, second) in [(&b""[..], &b""[..]), (b"one", b""), (b"", b"two"), (b"one", b"two")] {
            assert_eq!(split_aside(&join_aside(first, second)), Some((first, second)));
        }
        let bytes = join_aside(b"one", b"");
        assert!((0..bytes.len()).all(|kept| split_aside(&bytes[..kept]).is_none()));
        assert_eq!(split_aside(&u64::MAX.to_le_bytes()), None);
    }
}
