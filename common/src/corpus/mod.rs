//! What a run trains on, in three splits: a text at character level (bundled or the user's), or a token file.

mod vocabulary;

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use vocabulary::{Characters, Vocabulary};

#[cfg(feature = "tokenizers")]
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::tokens::{MAGIC, SharedBytes, TokenFile, TokenFileError, Tokens, TokensError};
use crate::wire::Split;

/// Shakespeare's plays as used by char-rnn and nanoGPT, 1 115 394 characters, public domain.
pub const SHAKESPEARE: &str = include_str!("../../assets/tinyshakespeare.txt");

/// The largest text or token file a run accepts: every worker that lacks it downloads the whole of it.
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
    #[error(
        "{path} has {bytes} bytes; at most {TEXT_BYTES_MAX} are supported, because every worker downloads them"
    )]
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
        "the text is too short: its {split} part has {tokens} {unit}s, but a context of {context} needs at least {}",
        context + 1
    )]
    TooShort {
        /// Which part.
        split: &'static str,
        /// What it has.
        tokens: usize,
        /// What a token is called.
        unit: &'static str,
        /// The window length in tokens.
        context: usize,
    },
    /// Too many distinct characters.
    #[error("the text has {0} distinct characters; at most {VOCABULARY_MAX} are supported")]
    VocabularyTooLarge(usize),
    /// A token file that cannot be opened.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
    /// Bytes of a token file that are damaged.
    #[error("the token file cannot be used: {0}")]
    Tokens(#[from] TokensError),
    /// The vocabulary makes the model too large.
    #[error(
        "a vocabulary of {vocabulary} gives the model {parameters} parameters; at most {most} are supported"
    )]
    ModelTooLarge {
        /// Tokens in the vocabulary.
        vocabulary: usize,
        /// Parameters of the model.
        parameters: usize,
        /// The limit.
        most: usize,
    },
    /// The tokenizer does not serve.
    #[cfg(feature = "tokenizers")]
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A text or a token file, checked, as a sequence of tokens.
#[derive(Clone, Debug)]
pub struct Corpus {
    bytes: SharedBytes,
    sha256: [u8; 32],
    vocabulary: Vocabulary,
    tokens: Tokens,
}

impl Corpus {
    /// The bundled Shakespeare.
    pub fn bundled() -> Self {
        Self::from_bytes(SHAKESPEARE.as_bytes()).expect("the bundled text is within every bound")
    }

    /// Opens a file: a token file by its first bytes, which is mapped, or a UTF-8 text, which is read.
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
        if metadata.len() > TEXT_BYTES_MAX {
            return Err(CorpusError::TooLarge { path: path.to_owned(), bytes: metadata.len() });
        }
        if begins_like_tokens(path).map_err(unreadable)? {
            return Ok(Self::from_token_file(TokenFile::open(path)?));
        }
        Self::from_bytes(std::fs::read(path).map_err(unreadable)?)
    }

    /// A corpus of the bytes of a token file or of a text, whichever they are.
    ///
    /// # Errors
    /// [`CorpusError::NotUtf8`], [`CorpusError::VocabularyTooLarge`] or [`CorpusError::Tokens`].
    pub fn from_bytes(bytes: impl Into<SharedBytes>) -> Result<Self, CorpusError> {
        let bytes = bytes.into();
        if TokenFile::is_one(&bytes) {
            return Ok(Self::from_token_file(TokenFile::from_bytes(bytes)?));
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| CorpusError::NotUtf8(error.valid_up_to()))?;
        let characters = Characters::of(text);
        if characters.len() > VOCABULARY_MAX {
            return Err(CorpusError::VocabularyTooLarge(characters.len()));
        }
        let token = |c| characters.token(c).expect("the vocabulary is of this text");
        let tokens = Tokens::collect(text.chars().map(token), characters.len());
        let sha256 = Sha256::digest(&bytes).into();
        Ok(Self { sha256, bytes, vocabulary: Vocabulary::Characters(characters), tokens })
    }

    /// A corpus of a token file.
    pub fn from_token_file(file: TokenFile) -> Self {
        let bytes = file.bytes().clone();
        let sha256 = Sha256::digest(&bytes).into();
        Self { sha256, bytes, tokens: file.tokens(), vocabulary: Vocabulary::Tokens(file) }
    }

    /// Tokenises a UTF-8 text for a model with a vocabulary of `vocabulary_size`, which may be larger than the
    /// tokenizer's: models are often padded. The result is a token file in memory that carries the tokenizer.
    ///
    /// # Errors
    /// [`CorpusError::NotUtf8`], or [`CorpusError::Tokenizer`] for a vocabulary larger than the model's and a text
    /// that cannot be tokenised.
    #[cfg(feature = "tokenizers")]
    pub fn with_tokenizer(
        text: &[u8],
        tokenizer: &Tokenizer,
        vocabulary_size: usize,
    ) -> Result<Self, CorpusError> {
        tokenizer.check_fits(vocabulary_size)?;
        let text = std::str::from_utf8(text).map_err(|error| CorpusError::NotUtf8(error.valid_up_to()))?;
        let bytes = tokenizer.token_file(text, vocabulary_size)?;
        Self::from_bytes(bytes)
    }

    /// The text or the token file as it was, for sending to workers.
    pub fn bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    /// SHA-256 of [`bytes`](Self::bytes); names the corpus.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// What its tokens stand for.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Number of tokens in all splits.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The first 90 %: what is trained on.
    pub fn training(&self) -> Tokens {
        self.part(0..90)
    }

    /// The next 5 % (validation) or the last 5 % (test).
    pub fn held_out(&self, split: Split) -> Tokens {
        match split {
            Split::Validation => self.part(90..95),
            Split::Test => self.part(95..100),
        }
    }

    fn part(&self, percent: Range<usize>) -> Tokens {
        let at = |percent: usize| (self.tokens.len() as u64 * percent as u64 / 100) as usize;
        self.tokens.slice(at(percent.start)..at(percent.end))
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
                let unit = self.vocabulary.unit();
                return Err(CorpusError::TooShort { split, tokens: tokens.len(), unit, context });
            }
        }
        Ok(())
    }
}

fn begins_like_tokens(path: &Path) -> io::Result<bool> {
    let mut first = Vec::with_capacity(MAGIC.len());
    File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut first)?;
    Ok(TokenFile::is_one(&first))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::tokens::TokenSink;

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
        let characters = corpus.vocabulary().characters().unwrap();
        let text: String = corpus.tokens.iter().map(|t| characters.character(t).unwrap()).collect();
        assert_eq!(text.as_bytes(), &corpus.bytes()[..]);
        assert_eq!(characters.token('Q'), None);
    }

    #[test]
    fn bad_texts_are_refused_with_a_sentence() {
        let error = Corpus::from_bytes(&b"abc\xff"[..]).unwrap_err();
        assert!(error.to_string().contains("byte 3"), "{error}");
        let error = Corpus::from_bytes(&b""[..]).unwrap().check_context(8).unwrap_err();
        assert!(error.to_string().contains("too short"), "{error}");
        let error = Corpus::read(&std::env::temp_dir()).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        let error = Corpus::read(Path::new("/no/such/file")).unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }

    #[test]
    fn a_token_file_is_a_corpus_on_disk_and_over_the_network() {
        let tokens: Vec<u32> = (0..200).map(|i| i * i % 301).collect();
        let mut sink = TokenSink::new(Cursor::new(Vec::new()), 301).unwrap();
        sink.push(&tokens).unwrap();
        let bytes = sink.finish(Some(b"{\"version\": \"1.0\"}")).unwrap().into_inner();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, &bytes).unwrap();

        let read = Corpus::read(&path).unwrap();
        let received = Corpus::from_bytes(bytes.clone()).unwrap();
        for corpus in [&read, &received] {
            assert_eq!((corpus.vocabulary().len(), corpus.vocabulary().unit()), (301, "token"));
            assert!(corpus.vocabulary().characters().is_none());
            assert_eq!(corpus.vocabulary().tokenizer_json().unwrap()[..], *b"{\"version\": \"1.0\"}");
            assert_eq!(corpus.bytes()[..], bytes);
            assert_eq!(corpus.sha256(), read.sha256());
            assert_eq!(corpus.training().iter().collect::<Vec<_>>(), tokens[..180]);
            assert_eq!(corpus.held_out(Split::Test).iter().collect::<Vec<_>>(), tokens[190..]);
            let error = corpus.check_context(64).unwrap_err().to_string();
            assert!(error.contains("validation part has 10 tokens"), "{error}");
        }
        std::fs::write(&path, &bytes[..100]).unwrap();
        let error = Corpus::read(&path).unwrap_err().to_string();
        assert!(error.contains("a.txt") && error.contains("header announces"), "{error}");
        assert!(Corpus::from_bytes(&bytes[..100]).is_err());
    }
}
