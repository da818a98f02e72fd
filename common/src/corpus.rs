//! The text a run trains on: bundled or the user's, at character level, in three splits.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::wire::Split;

/// Shakespeare's plays as used by char-rnn and nanoGPT, 1 115 394 characters, public domain.
pub const SHAKESPEARE: &str = include_str!("../assets/tinyshakespeare.txt");

/// The largest text a run accepts; the whole of it is held in memory and sent to workers that lack it.
pub const TEXT_BYTES_MAX: u64 = 1 << 30;

/// The most distinct characters a text may have.
pub const VOCABULARY_MAX: usize = 1 << 16;

/// Why a text cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The file cannot be read.
    #[error("cannot read the text {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than [`TEXT_BYTES_MAX`].
    #[error("the text {path} has {bytes} bytes; at most {TEXT_BYTES_MAX} are supported")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The bytes are not UTF-8.
    #[error("the text is not valid UTF-8 (byte {0} is the first that is not); convert it and try again")]
    NotUtf8(usize),
    /// A split would not hold one window.
    #[error(
        "the text is too short: its {split} part has {characters} characters, but a context of {context} needs at \
         least {}", context + 1
    )]
    TooShort {
        /// Which part.
        split: &'static str,
        /// What it has.
        characters: usize,
        /// The window length in tokens.
        context: usize,
    },
    /// Too many distinct characters.
    #[error("the text has {0} distinct characters; at most {VOCABULARY_MAX} are supported")]
    VocabularyTooLarge(usize),
}

/// The distinct characters of a text in code point order; a token is a character's place among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    characters: Vec<char>,
}

impl Vocabulary {
    /// The vocabulary of a text.
    pub fn of(text: &str) -> Self {
        Self { characters: text.chars().collect::<BTreeSet<_>>().into_iter().collect() }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.characters.len()
    }

    /// Whether the text was empty.
    pub fn is_empty(&self) -> bool {
        self.characters.is_empty()
    }

    /// The characters in token order.
    pub fn characters(&self) -> &[char] {
        &self.characters
    }

    /// The token of a character, if the text had it.
    pub fn token(&self, character: char) -> Option<u32> {
        self.characters.binary_search(&character).ok().map(|place| place as u32)
    }

    /// The character of a token.
    pub fn character(&self, token: u32) -> Option<char> {
        self.characters.get(token as usize).copied()
    }

    /// A `tokenizer.json` that splits into characters, readable by the `tokenizers` library.
    pub fn tokenizer_json(&self) -> serde_json::Value {
        let vocabulary: serde_json::Map<_, _> = (self.characters.iter().enumerate())
            .map(|(token, character)| (character.to_string(), token.into()))
            .collect();
        serde_json::json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": false,
            },
            "post_processor": null,
            "decoder": {"type": "Fuse"},
            // WordLevel insists on naming an unknown token; characters outside the vocabulary map to the first one.
            "model": {
                "type": "WordLevel", "vocab": vocabulary, "unk_token": self.characters.first().map(char::to_string),
            },
        })
    }
}

/// A text, tokenised.
#[derive(Clone, Debug)]
pub struct Corpus {
    bytes: Arc<[u8]>,
    sha256: [u8; 32],
    vocabulary: Vocabulary,
    tokens: Arc<[u32]>,
}

impl Corpus {
    /// The bundled Shakespeare.
    pub fn bundled() -> Self {
        Self::from_text(SHAKESPEARE).expect("the bundled text is within every bound")
    }

    /// Reads a UTF-8 text file.
    ///
    /// # Errors
    /// A [`CorpusError`] that names the file or says what is wrong with its content.
    pub fn read(path: &Path) -> Result<Self, CorpusError> {
        let unreadable = |source| CorpusError::Unreadable { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if !metadata.is_file() {
            // Devices and pipes may never end, and say nothing of their size.
            return Err(unreadable(std::io::Error::other("it is not a regular file")));
        }
        let bytes = metadata.len();
        if bytes > TEXT_BYTES_MAX {
            return Err(CorpusError::TooLarge { path: path.to_owned(), bytes });
        }
        Self::from_bytes(&std::fs::read(path).map_err(unreadable)?)
    }

    /// Tokenises a text received as bytes.
    ///
    /// # Errors
    /// [`CorpusError::NotUtf8`] or [`CorpusError::VocabularyTooLarge`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CorpusError> {
        let text = std::str::from_utf8(bytes).map_err(|error| CorpusError::NotUtf8(error.valid_up_to()))?;
        Self::from_text(text)
    }

    fn from_text(text: &str) -> Result<Self, CorpusError> {
        let vocabulary = Vocabulary::of(text);
        if vocabulary.len() > VOCABULARY_MAX {
            return Err(CorpusError::VocabularyTooLarge(vocabulary.len()));
        }
        let tokens =
            text.chars().map(|c| vocabulary.token(c).expect("the vocabulary is of this text")).collect();
        Ok(Self {
            bytes: text.as_bytes().into(),
            sha256: Sha256::digest(text.as_bytes()).into(),
            vocabulary,
            tokens,
        })
    }

    /// The text as it was, for sending to workers.
    pub fn bytes(&self) -> &Arc<[u8]> {
        &self.bytes
    }

    /// SHA-256 of [`bytes`](Self::bytes); names the text.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// Its distinct characters.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The first 90 %: what is trained on.
    pub fn training(&self) -> &[u32] {
        &self.tokens[self.part(0..90)]
    }

    /// The next 5 % (validation) or the last 5 % (test).
    pub fn held_out(&self, split: Split) -> &[u32] {
        match split {
            Split::Validation => &self.tokens[self.part(90..95)],
            Split::Test => &self.tokens[self.part(95..100)],
        }
    }

    fn part(&self, percent: Range<usize>) -> Range<usize> {
        let at = |percent: usize| (self.tokens.len() as u64 * percent as u64 / 100) as usize;
        at(percent.start)..at(percent.end)
    }

    /// Checks that every split holds at least one window of `context` tokens and its targets.
    ///
    /// # Errors
    /// [`CorpusError::TooShort`].
    pub fn check_context(&self, context: usize) -> Result<(), CorpusError> {
        for (split, tokens) in [
            ("training", self.training()),
            ("validation", self.held_out(Split::Validation)),
            ("test", self.held_out(Split::Test)),
        ] {
            if tokens.len() < context + 1 {
                return Err(CorpusError::TooShort { split, characters: tokens.len(), context });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_text_is_the_published_one() {
        let corpus = Corpus::bundled();
        assert_eq!(corpus.bytes().len(), 1_115_394);
        assert_eq!(corpus.vocabulary().len(), 65);
        assert_eq!(corpus.sha256()[..4], [0x86, 0xc4, 0xe6, 0xaa]);
        assert_eq!(corpus.training().len(), 1_003_854);
        let held_out = corpus.held_out(Split::Validation).len() + corpus.held_out(Split::Test).len();
        assert_eq!(corpus.training().len() + held_out, 1_115_394);
    }

    #[test]
    fn tokens_and_characters_are_inverse() {
        let corpus = Corpus::from_bytes("Übermut tut selten gut — ещё".as_bytes()).unwrap();
        let text: String = corpus.tokens.iter().map(|&t| corpus.vocabulary().character(t).unwrap()).collect();
        assert_eq!(text.as_bytes(), &corpus.bytes()[..]);
        assert_eq!(corpus.vocabulary().token('Q'), None);
    }

    #[test]
    fn bad_texts_are_refused_with_a_sentence() {
        let error = Corpus::from_bytes(b"abc\xff").unwrap_err();
        assert!(error.to_string().contains("byte 3"), "{error}");
        let error = Corpus::from_bytes(b"").unwrap().check_context(8).unwrap_err();
        assert!(error.to_string().contains("too short"), "{error}");
        let folder = std::env::temp_dir();
        let error = Corpus::read(&folder).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        let error = Corpus::read(Path::new("/no/such/file")).unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }
}
