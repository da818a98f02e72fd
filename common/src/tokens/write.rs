//! Writing a token file as the tokens come.

use std::io::{self, Seek, SeekFrom, Write};

use super::header::{HEADER_BYTES, Header, TOKEN_VOCABULARY_MAX, TOKENIZER_BYTES_MAX};
use super::view::Width;

/// Why a token file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TokenSinkError {
    /// The system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No vocabulary, or one larger than any.
    #[error("a vocabulary of {0} tokens; 1 to {TOKEN_VOCABULARY_MAX} are possible")]
    VocabularySize(usize),
    /// A token that the vocabulary does not have.
    #[error("the token {token} is outside the vocabulary of {vocabulary_size}")]
    Token {
        /// The token.
        token: u32,
        /// Tokens in the vocabulary.
        vocabulary_size: u32,
    },
    /// A tokenizer larger than any.
    #[error("a tokenizer of {0} bytes; at most {TOKENIZER_BYTES_MAX} go into a token file")]
    TokenizerTooLarge(u64),
}

/// A token file in the making: the header comes last, in the place that was left for it.
#[derive(Debug)]
pub struct TokenSink<W> {
    out: W,
    header: Header,
    /// The bytes of the tokens of one call, kept to be used again.
    buffer: Vec<u8>,
}

impl<W: Write + Seek> TokenSink<W> {
    /// Starts a file at the beginning of `out`.
    ///
    /// # Errors
    /// [`TokenSinkError::VocabularySize`], or what `out` says.
    pub fn new(mut out: W, vocabulary_size: usize) -> Result<Self, TokenSinkError> {
        let size =
            u32::try_from(vocabulary_size).ok().filter(|size| (1..=TOKEN_VOCABULARY_MAX).contains(size));
        let size = size.ok_or(TokenSinkError::VocabularySize(vocabulary_size))?;
        // No magic yet: what was cut short is no token file.
        out.write_all(&[0; HEADER_BYTES])?;
        let width = Width::of_vocabulary(vocabulary_size);
        let header = Header { width, vocabulary_size: size, count: 0, tokenizer_bytes: 0 };
        Ok(Self { out, header, buffer: Vec::new() })
    }

    /// Appends tokens.
    ///
    /// # Errors
    /// [`TokenSinkError::Token`], or what `out` says.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), TokenSinkError> {
        self.buffer.clear();
        let vocabulary_size = self.header.vocabulary_size;
        for &token in tokens {
            if token >= vocabulary_size {
                return Err(TokenSinkError::Token { token, vocabulary_size });
            }
            self.buffer.extend_from_slice(&token.to_le_bytes()[..self.header.width.bytes()]);
        }
        self.out.write_all(&self.buffer)?;
        self.header.count += tokens.len() as u64;
        Ok(())
    }

    /// Tokens so far.
    pub fn count(&self) -> u64 {
        self.header.count
    }

    /// Appends the tokenizer, completes the header and gives `out` back, flushed.
    ///
    /// # Errors
    /// [`TokenSinkError::TokenizerTooLarge`], or what `out` says.
    pub fn finish(mut self, tokenizer_json: Option<&[u8]>) -> Result<W, TokenSinkError> {
        let tokenizer = tokenizer_json.unwrap_or_default();
        self.header.tokenizer_bytes = tokenizer.len() as u64;
        if self.header.tokenizer_bytes > TOKENIZER_BYTES_MAX {
            return Err(TokenSinkError::TokenizerTooLarge(self.header.tokenizer_bytes));
        }
        self.out.write_all(tokenizer)?;
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&self.header.to_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}
