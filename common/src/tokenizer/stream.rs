//! Tokens to text as they come.

use super::{Tokenizer, TokenizerError};

/// Tokens held back at most. An unfinished character takes three, so more are no beginning of one.
const HELD_BACK_MAX: usize = 8;

/// Decodes tokens one at a time into text that is final: bytes of a character that is not complete are held back.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens last given out, which decoding the next needs to see, and those held back.
    window: Vec<u32>,
    /// Tokens of the window that were given out.
    given: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), given: 0 }
    }

    /// The text that this token completes, often that of the token itself; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.window.push(token);
        let text = self.pending()?;
        let incomplete = text.ends_with(char::REPLACEMENT_CHARACTER);
        if text.is_empty() || (incomplete && self.window.len() - self.given < HELD_BACK_MAX) {
            // A token without text, such as a byte that a decoder swallows, must not let the window grow.
            if self.window.len() - self.given >= HELD_BACK_MAX {
                self.advance();
            }
            return Ok(String::new());
        }
        self.advance();
        Ok(text)
    }

    /// What is still held back when no more tokens come.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        let text = self.pending();
        self.window.clear();
        text
    }

    /// The text of the tokens held back: what they add to the text of those before.
    fn pending(&self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.window[..self.given])?;
        let all = self.tokenizer.decode(&self.window)?;
        // Decoders look back, not ahead, so that one text begins with the other; where one does not, nothing that was
        // given out can be taken back.
        let shared: usize = (before.chars().zip(all.chars()))
            .take_while(|(before, all)| before == all)
            .map(|(c, _)| c.len_utf8())
            .sum();
        Ok(all[shared..].to_owned())
    }

    fn advance(&mut self) {
        self.window.drain(..self.given);
        self.given = self.window.len();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_tokens_are_given_out_soon(tokens in prop::collection::vec(0u32..300, 0..60)) {
            // Every byte is a token, most sequences of which are no UTF-8; from 257 on there is none.
            let tokenizer = Tokenizer::train(std::iter::empty(), 257).unwrap();
            let mut decoder = tokenizer.stream_decoder();
            for &token in &tokens {
                decoder.push(token).unwrap();
                prop_assert!(decoder.window.len() < 2 * HELD_BACK_MAX);
                prop_assert!(decoder.window.len() - decoder.given < HELD_BACK_MAX);
            }
            prop_assert!(decoder.finish().unwrap().chars().count() < HELD_BACK_MAX);
        }
    }
}
