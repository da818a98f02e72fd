//! Tokens to text as they come.

use super::{Tokenizer, TokenizerError};

/// Tokens kept while the text ends in what may be an unfinished character. Such a one has three at most, so with more it
/// is a text full of replacement characters.
const WINDOW_MAX: usize = 16;

/// Tokens kept of a window that has grown too long.
const WINDOW_KEPT: usize = 8;

/// Decodes tokens one at a time into text that is final.
///
/// Bytes that make no character decode to a replacement character, and so do the first bytes of one that is not
/// complete, but never to more than one: the last character is held back if it is that.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens last given out, which decoding the next needs to see, and those whose text is held back.
    window: Vec<u32>,
    /// Bytes of the window's text that were given out.
    given_bytes: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), given_bytes: 0 }
    }

    /// The text that this token completes, often that of the token itself; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window)?;
        let final_bytes = final_part(&text).len();
        // Decoders look back, not ahead, so that what was given out stays the beginning of the text.
        let new = text.get(self.given_bytes..final_bytes).unwrap_or_default().to_owned();
        self.given_bytes = self.given_bytes.max(final_bytes);
        let complete = final_bytes == text.len();
        if complete || self.window.len() > WINDOW_MAX {
            self.forget(if complete { 1 } else { WINDOW_KEPT })?;
        }
        Ok(new)
    }

    /// What is still held back when no more tokens come.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.window)?;
        Ok(text.get(self.given_bytes..).unwrap_or_default().to_owned())
    }

    /// Keeps the last tokens only; of their text as much is held back as before.
    fn forget(&mut self, kept: usize) -> Result<(), TokenizerError> {
        let before = self.tokenizer.decode(&self.window)?.len();
        self.window.drain(..self.window.len().saturating_sub(kept));
        let after = self.tokenizer.decode(&self.window)?.len();
        self.given_bytes = after.saturating_sub(before.saturating_sub(self.given_bytes));
        Ok(())
    }
}

/// The text without a last character that may be the beginning of another.
fn final_part(text: &str) -> &str {
    text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(text)
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
                prop_assert!(decoder.window.len() <= WINDOW_MAX);
            }
            prop_assert!(decoder.finish().unwrap().chars().count() <= 1);
        }
    }
}
