//! Token files: a text as token numbers, with its tokenizer, in one file that is mapped rather than read.
//!
//! All numbers are little-endian. The first byte of the magic begins no UTF-8 text, so a token file is never taken
//! for a text or the other way round.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | magic: `89 53 4e 44 54 4f 4b 0a` (`\x89SNDTOK\n`) |
//! | 8 | 2 | version, 1 |
//! | 10 | 2 | width w of a token in bytes, 2 or 4 |
//! | 12 | 4 | vocabulary size V, 1 to [`TOKEN_VOCABULARY_MAX`]; every token is smaller |
//! | 16 | 8 | number of tokens n |
//! | 24 | 8 | length t of the tokenizer in bytes, at most [`TOKENIZER_BYTES_MAX`]; 0: there is none |
//! | 32 | n·w | the tokens |
//! | 32 + n·w | t | `tokenizer.json` as the `tokenizers` library reads it |
//!
//! Reading checks all of it once, before anything is used: the length of the file against the header, every token
//! against V, and that the tokenizer is JSON. A file that is damaged afterwards, while it is mapped, gives other
//! tokens; the model refuses those outside its vocabulary.

mod header;
mod shared;
mod view;
mod write;

use std::path::{Path, PathBuf};

use header::{HEADER_BYTES, Header};
pub use header::{MAGIC, TOKEN_VOCABULARY_MAX, TOKENIZER_BYTES_MAX, VERSION};
pub use shared::SharedBytes;
pub use view::{Tokens, Width};
pub use write::{TokenSink, TokenSinkError};

use crate::mapped::MappedFile;

/// What is wrong with the bytes of a token file.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It ends within the header.
    #[error("it has {0} bytes, fewer than the header of a token file")]
    NoHeader(usize),
    /// It does not begin with [`MAGIC`].
    #[error("it is not a token file")]
    Magic,
    /// Another release wrote it.
    #[error("it has version {0} of the format; this program reads version {VERSION}")]
    Version(u16),
    /// Neither 2 nor 4 bytes.
    #[error("its tokens have {0} bytes each, not 2 or 4")]
    Width(u16),
    /// No vocabulary, or one larger than any.
    #[error("its vocabulary has {0} tokens; 1 to {TOKEN_VOCABULARY_MAX} are possible")]
    VocabularySize(u32),
    /// A tokenizer larger than any.
    #[error("its tokenizer has {0} bytes; at most {TOKENIZER_BYTES_MAX} are read")]
    TokenizerTooLarge(u64),
    /// Cut short, or with something behind it.
    #[error(
        "it has {found} bytes, but its header announces {count} tokens of {width} bytes and {tokenizer_bytes} bytes of tokenizer"
    )]
    Length {
        /// Bytes there are.
        found: usize,
        /// Tokens announced.
        count: u64,
        /// Bytes of each.
        width: usize,
        /// Bytes of tokenizer announced.
        tokenizer_bytes: u64,
    },
    /// A token outside the vocabulary.
    #[error("its token {place} is {token}, outside its vocabulary of {vocabulary_size}")]
    Token {
        /// Place in the sequence.
        place: usize,
        /// The token.
        token: u32,
        /// Tokens in the vocabulary.
        vocabulary_size: usize,
    },
    /// The tokenizer is not JSON.
    #[error("its tokenizer is not JSON: {0}")]
    Tokenizer(#[source] serde_json::Error),
}

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The system refuses.
    #[error("cannot read the token file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its bytes are wrong.
    #[error("the token file {path} cannot be used: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TokensError,
    },
}

/// A token file, checked.
#[derive(Clone, Debug)]
pub struct TokenFile {
    bytes: SharedBytes,
    header: Header,
}

impl TokenFile {
    /// Whether bytes, of which the first eight suffice, begin like a token file.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Maps a file and checks it.
    ///
    /// # Errors
    /// A [`TokenFileError`] that names the file.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        let file = MappedFile::open(path);
        let file = file.map_err(|source| TokenFileError::Unreadable { path: path.to_owned(), source })?;
        let checked = Self::from_bytes(file.into());
        checked.map_err(|source| TokenFileError::Malformed { path: path.to_owned(), source })
    }

    /// Checks the bytes of a token file.
    ///
    /// # Errors
    /// A [`TokensError`].
    pub fn from_bytes(bytes: SharedBytes) -> Result<Self, TokensError> {
        let header = Header::parse(&bytes)?;
        let file = Self { bytes, header };
        let vocabulary_size = file.vocabulary_size();
        if let Some((place, token)) =
            file.tokens().iter().enumerate().find(|&(_, token)| token as usize >= vocabulary_size)
        {
            return Err(TokensError::Token { place, token, vocabulary_size });
        }
        if let Some(tokenizer) = file.tokenizer_json() {
            serde_json::from_slice::<serde::de::IgnoredAny>(tokenizer).map_err(TokensError::Tokenizer)?;
        }
        Ok(file)
    }

    /// The file as it is.
    pub fn bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary_size(&self) -> usize {
        self.header.vocabulary_size as usize
    }

    /// The tokens.
    pub fn tokens(&self) -> Tokens {
        Tokens::new(self.bytes.clone(), HEADER_BYTES, self.header.count as usize, self.header.width)
    }

    /// The tokenizer that comes with it, if one does.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        let from = self.bytes.len() - self.header.tokenizer_bytes as usize;
        (from < self.bytes.len()).then(|| &self.bytes[from..])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn file(tokens: &[u32], vocabulary_size: usize, tokenizer: Option<&[u8]>) -> Vec<u8> {
        let mut sink = TokenSink::new(Cursor::new(Vec::new()), vocabulary_size).unwrap();
        tokens.chunks(7).for_each(|tokens| sink.push(tokens).unwrap());
        sink.finish(tokenizer).unwrap().into_inner()
    }

    #[test]
    fn bytes_are_as_documented() {
        let bytes = file(&[1, 0x0203], 0x0300, Some(b"{}"));
        let documented =
            b"\x89SNDTOK\n\x01\0\x02\0\0\x03\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x01\0\x03\x02{}";
        assert_eq!(bytes, documented);
        let wide = file(&[0x0001_0203], 0x0002_0000, None);
        assert_eq!(wide[8..16], [1, 0, 4, 0, 0, 0, 2, 0]);
        assert_eq!(wide[32..], [3, 2, 1, 0]);
        assert!(TokenFile::is_one(&wide) && !TokenFile::is_one(b"\x89PNG\r\n") && !TokenFile::is_one(b""));
        assert!(std::str::from_utf8(&MAGIC).is_err(), "no text begins like a token file");
    }

    #[test]
    fn every_fault_has_its_sentence() {
        let good = file(&[1, 2, 3], 10, Some(b"{\"a\": 1}"));
        let broken = |place: usize, value: &[u8]| {
            let mut bytes = good.clone();
            bytes[place..place + value.len()].copy_from_slice(value);
            TokenFile::from_bytes(bytes.into()).unwrap_err().to_string()
        };
        for (place, value, words) in [
            (0, &b"x"[..], "not a token file"),
            (8, b"\x02", "version 2"),
            (10, b"\x03", "3 bytes each"),
            (12, b"\0\0\0\0", "vocabulary has 0"),
            (12, b"\xff\xff\xff\xff", "vocabulary has 4294967295"),
            (12, b"\x03", "token 2 is 3, outside its vocabulary of 3"),
            (16, b"\x04", "announces 4 tokens"),
            (16, b"\xff\xff\xff\xff\xff\xff\xff\xff", "announces 18446744073709551615 tokens"),
            (24, b"\x07", "7 bytes of tokenizer"),
            (24, b"\0\0\0\0\0\0\0\x80", "at most"),
            (38, b"[", "not JSON"),
        ] {
            let error = broken(place, value);
            assert!(error.contains(words), "{place}: {error}");
        }
        for bytes in [&good[..31], &good[..good.len() - 1], &[&good[..], b" "].concat()[..]] {
            assert!(TokenFile::from_bytes(bytes.into()).is_err());
        }
    }

    #[test]
    fn a_file_is_mapped_and_errors_name_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tok");
        std::fs::write(&path, file(&[5, 6], 7, None)).unwrap();
        let opened = TokenFile::open(&path).unwrap();
        assert_eq!(opened.tokens().iter().collect::<Vec<_>>(), [5, 6]);
        assert_eq!((opened.vocabulary_size(), opened.tokenizer_json()), (7, None));
        std::fs::write(folder.path().join("b.tok"), b"").unwrap();
        for name in ["b.tok", "c.tok", "."] {
            let error = TokenFile::open(&folder.path().join(name)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            tokens in prop::collection::vec(0u32..100_000, 0..300),
            vocabulary_size in 1usize..=TOKEN_VOCABULARY_MAX as usize,
            text in prop::option::of(".{0,40}"),
        ) {
            let tokens: Vec<u32> = tokens.iter().map(|token| token % vocabulary_size as u32).collect();
            let tokenizer = text.map(|text| serde_json::to_vec(&text).unwrap());
            let bytes = file(&tokens, vocabulary_size, tokenizer.as_deref());
            let read = TokenFile::from_bytes(bytes.into()).unwrap();
            prop_assert_eq!(read.tokens().iter().collect::<Vec<_>>(), tokens);
            prop_assert_eq!(read.vocabulary_size(), vocabulary_size);
            prop_assert_eq!(read.tokenizer_json(), tokenizer.as_deref());
        }

        #[test]
        fn no_bytes_make_reading_panic(
            head in prop::collection::vec(any::<u8>(), 0..24),
            rest in prop::collection::vec(any::<u8>(), 0..64),
            width in 0u8..5,
            vocabulary_size: u8,
            count in 0u8..20,
            tokenizer_bytes in 0u8..8,
            well_headed: bool,
        ) {
            let mut bytes = head;
            if well_headed {
                bytes = [&MAGIC[..], &[1, 0, width, 0, vocabulary_size, 0, 0, 0]].concat();
                bytes.extend_from_slice(&u64::from(count).to_le_bytes());
                bytes.extend_from_slice(&u64::from(tokenizer_bytes).to_le_bytes());
            }
            bytes.extend_from_slice(&rest);
            if let Ok(file) = TokenFile::from_bytes(bytes.into()) {
                prop_assert!(file.tokens().iter().all(|token| (token as usize) < file.vocabulary_size()));
            }
        }
    }
}
