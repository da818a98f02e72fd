//! A sequence of tokens as they lie in a file.

use std::ops::Range;

use super::SharedBytes;

/// Bytes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// `u16`: vocabularies of up to 65536 tokens.
    Two = 2,
    /// `u32`.
    Four = 4,
}

impl Width {
    /// The narrowest width for a vocabulary of this size.
    pub fn of_vocabulary(size: usize) -> Self {
        if size <= 1 << 16 { Self::Two } else { Self::Four }
    }

    /// In bytes.
    pub fn bytes(self) -> usize {
        self as usize
    }
}

/// A sequence of tokens, little-endian in shared bytes; cloning and slicing copy nothing.
#[derive(Clone, Debug)]
pub struct Tokens {
    bytes: SharedBytes,
    /// Of the first token, in bytes.
    offset: usize,
    len: usize,
    width: Width,
}

impl Tokens {
    /// `len` tokens from the byte `offset` on.
    ///
    /// # Panics
    /// If the bytes end before the tokens do.
    pub(super) fn new(bytes: SharedBytes, offset: usize, len: usize, width: Width) -> Self {
        let end = len.checked_mul(width.bytes()).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= bytes.len()), "{len} tokens at {offset} of {bytes:?}");
        Self { bytes, offset, len, width }
    }

    /// Tokens in memory, in the narrowest width for a vocabulary of this size.
    ///
    /// # Panics
    /// In debug builds, if a token is outside the vocabulary.
    pub fn collect(tokens: impl IntoIterator<Item = u32>, vocabulary_size: usize) -> Self {
        let width = Width::of_vocabulary(vocabulary_size);
        let mut bytes = Vec::new();
        for token in tokens {
            debug_assert!((token as usize) < vocabulary_size, "{token} of {vocabulary_size}");
            bytes.extend_from_slice(&token.to_le_bytes()[..width.bytes()]);
        }
        let len = bytes.len() / width.bytes();
        Self::new(bytes.into(), 0, len, width)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The token at a place.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, place: usize) -> u32 {
        assert!(place < self.len, "token {place} of {}", self.len);
        let at = self.offset + place * self.width.bytes();
        let bytes = &self.bytes[at..at + self.width.bytes()];
        match self.width {
            Width::Two => u32::from(u16::from_le_bytes([bytes[0], bytes[1]])),
            Width::Four => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }

    /// A part of the sequence.
    ///
    /// # Panics
    /// If the range is not within it.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "tokens {range:?} of {}", self.len);
        let offset = self.offset + range.start * self.width.bytes();
        Self { bytes: self.bytes.clone(), offset, len: range.len(), width: self.width }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        (0..self.len).map(|place| self.get(place))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn views_are_slices(
            tokens in prop::collection::vec(0u32..300_000, 0..200),
            narrow: bool,
            cut in (0.0..1.0f64, 0.0..1.0f64),
        ) {
            let size = if narrow { 1 << 16 } else { 300_000 };
            let tokens: Vec<u32> = tokens.into_iter().map(|token| token % size).collect();
            let view = Tokens::collect(tokens.iter().copied(), size as usize);
            prop_assert_eq!(view.iter().collect::<Vec<_>>(), &tokens[..]);
            let (a, b) = (cut.0.min(cut.1), cut.0.max(cut.1));
            let range = (a * tokens.len() as f64) as usize..(b * tokens.len() as f64) as usize;
            let part = view.slice(range.clone());
            prop_assert_eq!(part.len(), range.len());
            prop_assert_eq!(part.iter().collect::<Vec<_>>(), &tokens[range.clone()]);
            let inner = part.slice(part.len() / 2..part.len());
            prop_assert_eq!(inner.iter().collect::<Vec<_>>(), &tokens[range.start + part.len() / 2..range.end]);
        }
    }

    #[test]
    #[should_panic(expected = "token 3 of 3")]
    fn a_place_outside_a_slice_is_no_token_although_there_are_bytes() {
        Tokens::collect(0..10, 10).slice(0..3).get(3);
    }
}
