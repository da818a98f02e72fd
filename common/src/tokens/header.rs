//! The first 32 bytes of a token file.

use super::TokensError;
use super::view::Width;

/// What a token file begins with.
pub const MAGIC: [u8; 8] = *b"\x89SNDTOK\n";

/// The version of the format.
pub const VERSION: u16 = 1;

/// The largest vocabulary of a token file: the 262 144 tokens of the large multilingual tokenizers, four times over.
pub const TOKEN_VOCABULARY_MAX: u32 = 1 << 20;

/// The largest `tokenizer.json` in a token file, in bytes; those of the large multilingual tokenizers have half of it.
pub const TOKENIZER_BYTES_MAX: u64 = 1 << 26;

/// Bytes before the tokens.
pub(super) const HEADER_BYTES: usize = 32;

/// The header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) width: Width,
    pub(super) vocabulary_size: u32,
    pub(super) count: u64,
    pub(super) tokenizer_bytes: u64,
}

impl Header {
    /// Reads the header of a whole file, of which tokens and tokenizer are then known to be within the bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, TokensError> {
        if bytes.len() < HEADER_BYTES {
            return Err(if bytes.starts_with(&MAGIC) {
                TokensError::NoHeader(bytes.len())
            } else {
                TokensError::Magic
            });
        }
        if bytes[..8] != MAGIC {
            return Err(TokensError::Magic);
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u16_at(8) != VERSION {
            return Err(TokensError::Version(u16_at(8)));
        }
        let width = match u16_at(10) {
            2 => Width::Two,
            4 => Width::Four,
            width => return Err(TokensError::Width(width)),
        };
        let header =
            Self { width, vocabulary_size: u32_at(12), count: u64_at(16), tokenizer_bytes: u64_at(24) };
        if !(1..=TOKEN_VOCABULARY_MAX).contains(&header.vocabulary_size) {
            return Err(TokensError::VocabularySize(header.vocabulary_size));
        }
        if header.tokenizer_bytes > TOKENIZER_BYTES_MAX {
            return Err(TokensError::TokenizerTooLarge(header.tokenizer_bytes));
        }
        let announced = (header.count.checked_mul(width.bytes() as u64))
            .and_then(|bytes| bytes.checked_add(HEADER_BYTES as u64 + header.tokenizer_bytes));
        if announced != Some(bytes.len() as u64) {
            return Err(TokensError::Length {
                found: bytes.len(),
                count: header.count,
                width: width.bytes(),
                tokenizer_bytes: header.tokenizer_bytes,
            });
        }
        Ok(header)
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&(self.width.bytes() as u16).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.vocabulary_size.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.count.to_le_bytes());
        bytes[24..].copy_from_slice(&self.tokenizer_bytes.to_le_bytes());
        bytes
    }
}
