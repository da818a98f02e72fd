//! Cutting a text into pieces of bounded size that can be tokenised one by one.
//!
//! A piece ends, in order of preference,
//!
//! 1. behind a newline between two characters that are no white space;
//! 2. before a space between two characters that are no white space;
//! 3. anywhere between two characters.
//!
//! The tokens of the pieces, one after another, are those of the whole text if the tokenizer never joins what is on the
//! two sides of a cut and does nothing at the beginning or end of a text. Both hold, for the first two kinds of cut, of
//! the byte-level tokenizers in use (those of GPT-2, GPT-4, Llama 3, Qwen and their kin, and those trained here), and
//! for every kind of cut, of character-level ones. A tokenizer that puts a space before each text (SentencePiece's, in
//! Llama 2 and Mistral) puts one before each piece too.

use std::io::{self, Read};

/// Bytes of a piece, at most.
pub const PIECE_BYTES: usize = 1 << 20;

/// The length of the first piece of `text`: all of it where that is no more than `most` bytes.
///
/// # Panics
/// If `most` is less than the four bytes of the longest character.
pub(super) fn piece_len(text: &str, most: usize) -> usize {
    assert!(most >= 4, "a piece of {most} bytes may not hold one character");
    if text.len() <= most {
        return text.len();
    }
    let end = (0..=most).rev().find(|&place| text.is_char_boundary(place)).expect("0 is a boundary");
    let (window, bytes) = (&text[..end], text.as_bytes());
    let between_words = |place: usize, width: usize| {
        let before = text[..place].chars().next_back();
        let after = text[place + width..].chars().next();
        before.is_some_and(|c| !c.is_whitespace()) && after.is_some_and(|c| !c.is_whitespace())
    };
    let last = |separator: u8| {
        let mut places = (0..window.len()).rev().filter(|&place| bytes[place] == separator);
        places.find(|&place| between_words(place, 1))
    };
    last(b'\n').map(|place| place + 1).or_else(|| last(b' ')).unwrap_or(end)
}

/// The pieces of a text that is in memory.
pub fn pieces(mut text: &str, most: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(piece_len(text, most));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Why a text cannot be read in pieces.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// The system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not UTF-8.
    #[error("it is not valid UTF-8 (byte {0} is the first that is not); convert it and try again")]
    NotUtf8(u64),
}

/// The pieces of a text as it is read; never more than two pieces are in memory.
#[derive(Debug)]
pub struct PieceReader<R> {
    input: R,
    most: usize,
    /// What has been read and not given out.
    buffer: Vec<u8>,
    /// Bytes given out.
    given: u64,
    ended: bool,
}

impl<R: Read> PieceReader<R> {
    /// Reads a text in pieces of at most `most` bytes.
    pub fn new(input: R, most: usize) -> Self {
        Self { input, most, buffer: Vec::new(), given: 0, ended: false }
    }

    fn piece(&mut self) -> Result<Option<String>, PieceError> {
        // What follows the cut decides whether it is a good one.
        let wanted = 2 * self.most;
        while !self.ended && self.buffer.len() < wanted {
            let missing = (wanted - self.buffer.len()) as u64;
            self.ended = self.input.by_ref().take(missing).read_to_end(&mut self.buffer)? == 0;
        }
        let text = match std::str::from_utf8(&self.buffer) {
            Ok(text) => text,
            // The end of the buffer may be within a character.
            Err(error) if error.error_len().is_none() && !self.ended => {
                std::str::from_utf8(&self.buffer[..error.valid_up_to()]).expect("it is valid up to there")
            }
            Err(error) => return Err(PieceError::NotUtf8(self.given + error.valid_up_to() as u64)),
        };
        let piece = text[..piece_len(text, self.most)].to_owned();
        self.buffer.drain(..piece.len());
        self.given += piece.len() as u64;
        Ok((!piece.is_empty()).then_some(piece))
    }
}

impl<R: Read> Iterator for PieceReader<R> {
    type Item = Result<String, PieceError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.piece().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cuts_are_where_tokenizers_cut_too() {
        for (text, most, piece) in [
            ("one\ntwo\nthree", 9, "one\ntwo\n"),
            ("one\n\ntwo three", 11, "one\n\ntwo"),
            ("one\n two three", 9, "one\n two"),
            ("all of it", 9, "all of it"),
            ("wordwithoutend", 6, "wordwi"),
            ("äöüäöü", 5, "äö"),
            ("a\n\n\nb  c", 7, "a\n\n\nb  "),
        ] {
            assert_eq!(&text[..piece_len(text, most)], piece, "{text:?}");
        }
    }

    /// Gives a few bytes at a time, as pipes do.
    struct Dribble<'a>(&'a [u8]);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = buffer.len().min(3);
            self.0.read(&mut buffer[..len])
        }
    }

    proptest! {
        #[test]
        fn pieces_are_bounded_make_up_the_text_and_do_not_depend_on_reads(
            text in "[a-c \n\u{e4}\u{1F600}]{0,200}",
            most in 4usize..40,
        ) {
            let whole: Vec<&str> = pieces(&text, most).collect();
            prop_assert_eq!(whole.concat(), &text[..]);
            prop_assert!(whole.iter().all(|piece| !piece.is_empty() && piece.len() <= most));
            let read: Result<Vec<_>, _> = PieceReader::new(Dribble(text.as_bytes()), most).collect();
            prop_assert_eq!(read.unwrap(), whole);
        }

        #[test]
        fn the_first_bad_byte_is_named(good in "[a-z\u{e4} \n]{0,60}", most in 4usize..40, cut: bool) {
            let bad: &[u8] = if cut { b"\xf0\x9f" } else { b"\xffabc" };
            let bytes = [good.as_bytes(), bad].concat();
            let error = PieceReader::new(&bytes[..], most).find_map(Result::err).unwrap();
            let named = matches!(error, PieceError::NotUtf8(place) if place == good.len() as u64);
            prop_assert!(named, "{error}");
        }
    }
}
