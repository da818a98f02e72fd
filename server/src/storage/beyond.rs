//! Whole records beyond a damaged place of a segment: what tells damage in the middle from the torn end of a crash.
//!
//! A record's place is not known there, nor how many were damaged before it. So every byte is tried for the first of a
//! record's; the checksum of the body that it announces then tells the position that the record would have, which must be
//! one of the next few. Checksums of any part come from those of the blocks before its ends, so that this takes little
//! longer than reading, however long the bodies are that chance announces.

use std::collections::HashMap;

use crc32fast::Hasher;

use super::journal::{Position, RECORD_HEADER_BYTES};

/// Records that may be missing before one that is found: what a damaged block of a disk holds of the shortest.
const MISSING_MAX: u64 = 128;

const BLOCK_BYTES: usize = 4096;

/// A whole record beyond damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Where it begins in the bytes that were searched.
    pub(super) offset: usize,
    /// Its position.
    pub(super) position: Position,
}

/// The first whole record in what follows a place where there should be the record of position `next`.
pub(super) fn find(bytes: &[u8], next: Position) -> Option<Found> {
    let positions: HashMap<u32, Position> = (next..=next.saturating_add(MISSING_MAX))
        .map(|position| (crc32fast::hash(&position.to_le_bytes()), position))
        .collect();
    let sums = Sums::of(bytes);
    let last = bytes.len().checked_sub(RECORD_HEADER_BYTES)?;
    (0..=last).find_map(|offset| {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (length, sum) = (word(offset), word(offset + 4));
        let body = offset + RECORD_HEADER_BYTES;
        let end = body.checked_add(length as usize).filter(|&end| end <= bytes.len())?;
        let before = if length == 0 { sum } else { unshift(sum ^ sums.of_part(body, end), length) };
        positions.get(&before).map(|&position| Found { offset, position })
    })
}

/// The checksum of `a`, of that of `a` followed by `bytes` zero bytes, less that of the zero bytes alone: x is of order
/// 2³² − 1 modulo the polynomial of CRC-32, so that going back is going on for long enough.
fn unshift(sum: u32, bytes: u32) -> u32 {
    shift(sum, u64::from(u32::MAX - bytes))
}

fn shift(sum: u32, bytes: u64) -> u32 {
    let mut hasher = Hasher::new_with_initial_len(sum, 0);
    hasher.combine(&Hasher::new_with_initial_len(0, bytes));
    hasher.finalize()
}

/// Checksums of everything before each block.
struct Sums<'a> {
    bytes: &'a [u8],
    before: Vec<u32>,
}

impl<'a> Sums<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let mut before = vec![0];
        let mut hasher = Hasher::new();
        for block in bytes.chunks(BLOCK_BYTES) {
            hasher.update(block);
            before.push(hasher.clone().finalize());
        }
        Self { bytes, before }
    }

    fn of_first(&self, length: usize) -> u32 {
        let block = length / BLOCK_BYTES;
        let mut hasher = Hasher::new_with_initial(self.before[block]);
        hasher.update(&self.bytes[block * BLOCK_BYTES..length]);
        hasher.finalize()
    }

    fn of_part(&self, from: usize, to: usize) -> u32 {
        self.of_first(to) ^ shift(self.of_first(from), (to - from) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::journal::encode_record;
    use super::*;

    #[test]
    fn a_record_is_found_at_any_place_and_position_that_may_be() {
        let noise: Vec<u8> =
            (0..20_000_u32).flat_map(|number| (number.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
        for (before, length) in [(0, 1), (3, 0), (7, 40), (5000, 9000), (4096, 30_000)] {
            let body = &noise[100..100 + length];
            for (missing, is_found) in [(0, true), (1, true), (MISSING_MAX, true), (MISSING_MAX + 1, false)] {
                let mut bytes = noise[..before].to_vec();
                encode_record(77 + missing, body, &mut bytes);
                bytes.extend_from_slice(&noise[..500]);
                let found = is_found.then_some(Found { offset: before, position: 77 + missing });
                assert_eq!(find(&bytes, 77), found, "{before} {length} {missing}");
            }
        }
    }

    #[test]
    fn nothing_is_found_in_zeros_noise_and_half_a_record() {
        assert_eq!(find(&[], 3), None);
        assert_eq!(find(&[0; 5], 3), None);
        assert_eq!(find(&vec![0; 100_000], 3), None);
        let mut half = Vec::new();
        encode_record(3, &vec![9; 100_000], &mut half);
        half.pop();
        assert_eq!(find(&half, 3), None);
    }
}
