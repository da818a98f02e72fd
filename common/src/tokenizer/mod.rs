//! Subword tokenizers: reading any `tokenizer.json`, training byte-level BPE, text to tokens and back.
//!
//! The work is done by the `tokenizers` library of Hugging Face. Special tokens that it would add around a text
//! (`<s>`, `[CLS]`) are added to a prompt and to nothing else, and a tokenizer's own truncation and padding are turned
//! off: what is tokenised here is one long text.

mod documents;
mod pieces;
mod stream;
mod train;

use std::io::Cursor;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer as Pipeline;

pub use documents::{DOCUMENT_BYTES_MAX, DocumentError, Documents, Segment};
pub use pieces::{PIECE_BYTES, PieceError, PieceReader, pieces};
pub use stream::StreamDecoder;
pub use train::{END_OF_TEXT, TRAINED_VOCABULARY_MIN, TRAINING_BYTES_MAX};

use crate::tokens::{TOKEN_VOCABULARY_MAX, TOKENIZER_BYTES_MAX, TokenSink, TokenSinkError};

/// What the `tokenizers` library says.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Pieces that are tokenised at a time, in parallel where there are cores.
const PIECES_AT_ONCE: usize = 4;

/// Why a tokenizer cannot be used; where it came from a file, the message names it.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read the tokenizer {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Larger than any.
    #[error("{name} has {bytes} bytes; a tokenizer of at most {TOKENIZER_BYTES_MAX} is read")]
    TooLarge {
        /// The tokenizer.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// Not a `tokenizer.json`.
    #[error("{name} is not a tokenizer.json that can be used: {source}")]
    Malformed {
        /// The tokenizer.
        name: String,
        /// What the library said.
        source: Cause,
    },
    /// No vocabulary, or one larger than any.
    #[error("{name} has a vocabulary of {size} tokens; 1 to {TOKEN_VOCABULARY_MAX} are possible")]
    Vocabulary {
        /// The tokenizer.
        name: String,
        /// Its largest token, and one.
        size: usize,
    },
    /// A vocabulary that the model does not have room for.
    #[error("{name} has a vocabulary of {tokenizer} tokens, more than the model's {model}")]
    LargerThanModel {
        /// The tokenizer.
        name: String,
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Tokens of the model.
        model: usize,
    },
    /// A text that it cannot encode.
    #[error("{name} cannot encode the text: {source}")]
    Encode {
        /// The tokenizer.
        name: String,
        /// What the library said.
        source: Cause,
    },
    /// Tokens that it cannot decode.
    #[error("{name} cannot decode its tokens: {source}")]
    Decode {
        /// The tokenizer.
        name: String,
        /// What the library said.
        source: Cause,
    },
    /// A vocabulary that cannot be trained.
    #[error(
        "a vocabulary of {0} tokens cannot be trained; {TRAINED_VOCABULARY_MIN} to {TOKEN_VOCABULARY_MAX} are possible"
    )]
    TrainedVocabulary(usize),
    /// Training failed.
    #[error("the tokenizer cannot be trained: {0}")]
    Training(#[source] Cause),
    /// The tokens cannot be kept.
    #[error("{name} does not make a token file: {source}")]
    Tokens {
        /// The tokenizer.
        name: String,
        /// Why not.
        source: TokenSinkError,
    },
}

/// A tokenizer, ready to encode and decode.
#[derive(Debug)]
pub struct Tokenizer {
    pipeline: Pipeline,
    /// As it was read.
    json: Vec<u8>,
    /// For messages.
    name: String,
    vocabulary_size: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// A [`TokenizerError`] that names the file.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let unreadable = |source| TokenizerError::Unreadable { path: path.to_owned(), source };
        let name = path.display().to_string();
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > TOKENIZER_BYTES_MAX {
            return Err(TokenizerError::TooLarge { name, bytes });
        }
        Self::from_json(&std::fs::read(path).map_err(unreadable)?, &name)
    }

    /// The tokenizer of the content of a `tokenizer.json`; `name` is what messages call it.
    ///
    /// # Errors
    /// A [`TokenizerError`] that names it.
    pub fn from_json(json: &[u8], name: &str) -> Result<Self, TokenizerError> {
        let malformed = |source| TokenizerError::Malformed { name: name.to_owned(), source };
        let mut pipeline = Pipeline::from_bytes(json).map_err(malformed)?;
        pipeline.with_truncation(None).map_err(malformed)?;
        pipeline.with_padding(None);
        // Added tokens may leave gaps, so counting is not enough.
        let size = pipeline.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1);
        if !(1..=TOKEN_VOCABULARY_MAX as usize).contains(&size) {
            return Err(TokenizerError::Vocabulary { name: name.to_owned(), size });
        }
        Ok(Self { pipeline, json: json.to_owned(), name: name.to_owned(), vocabulary_size: size })
    }

    /// The `tokenizer.json` it was made from.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Tokens of the vocabulary, those that were added included: the largest and one.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The number of a token of the vocabulary by its text.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.pipeline.token_to_id(text)
    }

    /// A token of both that the two number differently, or one of `other` that this one does not know; `None` if `other`
    /// can stand for this one.
    pub fn differs_from(&self, other: &Self) -> Option<String> {
        if self.json == other.json {
            return None;
        }
        let own = self.pipeline.get_vocab(true);
        let theirs = other.pipeline.get_vocab(true).into_iter();
        // The first by number, so that messages do not depend on the order of a hash table.
        let different = theirs.filter(|(token, id)| own.get(token) != Some(id));
        different.min_by_key(|(_, id)| *id).map(|(token, _)| token)
    }

    /// Checks that a model with `vocabulary_size` tokens has all of this vocabulary.
    ///
    /// # Errors
    /// [`TokenizerError::LargerThanModel`].
    pub fn check_fits(&self, vocabulary_size: usize) -> Result<(), TokenizerError> {
        if self.vocabulary_size <= vocabulary_size {
            return Ok(());
        }
        let (name, tokenizer) = (self.name.clone(), self.vocabulary_size);
        Err(TokenizerError::LargerThanModel { name, tokenizer, model: vocabulary_size })
    }

    /// The tokens of a text, encoded as a whole; for a text that may be long, see [`encode`](Self::encode).
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.pipeline.encode_fast(text, false).map_err(|source| self.encode_error(source))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a prompt, with the special tokens that the tokenizer puts around a text, such as a first `<s>`.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.pipeline.encode_fast(text, true).map_err(|source| self.encode_error(source))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of each of several texts, encoded in parallel where there are cores.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_each(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let encodings = self.pipeline.encode_batch_fast(texts.to_vec(), false);
        let encodings = encodings.map_err(|source| self.encode_error(source))?;
        Ok(encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The tokens of a text, encoded in pieces of at most [`PIECE_BYTES`]: a pipeline takes some
    /// hundred bytes of memory for a byte of text. See [`pieces`] for when the tokens are those of the whole.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        self.encode_to(text, PIECE_BYTES, |piece| {
            tokens.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(tokens)
    }

    fn encode_to(
        &self,
        text: &str,
        piece_bytes: usize,
        mut take: impl FnMut(&[u32]) -> Result<(), TokenizerError>,
    ) -> Result<(), TokenizerError> {
        let mut pieces = pieces(text, piece_bytes);
        loop {
            let some: Vec<&str> = pieces.by_ref().take(PIECES_AT_ONCE).collect();
            if some.is_empty() {
                return Ok(());
            }
            self.encode_each(&some)?.iter().try_for_each(|tokens| take(tokens))?;
        }
    }

    /// A text as the bytes of a token file with this tokenizer, for a model of that many tokens.
    pub(crate) fn token_file(&self, text: &str, vocabulary_size: usize) -> Result<Vec<u8>, TokenizerError> {
        let failed = |source| TokenizerError::Tokens { name: self.name.clone(), source };
        let mut sink = TokenSink::new(Cursor::new(Vec::new()), vocabulary_size).map_err(failed)?;
        self.encode_to(text, PIECE_BYTES, |tokens| sink.push(tokens).map_err(failed))?;
        Ok(sink.finish(Some(&self.json)).map_err(failed)?.into_inner())
    }

    /// The text of tokens, special ones included; those outside the vocabulary have none.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let decoded = self.pipeline.decode(tokens, false);
        decoded.map_err(|source| TokenizerError::Decode { name: self.name.clone(), source })
    }

    /// Decodes tokens as they come.
    pub fn stream_decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    fn encode_error(&self, source: Cause) -> TokenizerError {
        TokenizerError::Encode { name: self.name.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::corpus::{Characters, Corpus, CorpusError, SHAKESPEARE};

    static TRAINED: LazyLock<Tokenizer> = LazyLock::new(train);

    fn train() -> Tokenizer {
        let texts = pieces(&SHAKESPEARE[..200_000], 10_000).map(str::to_owned);
        Tokenizer::train(texts, 600).unwrap()
    }

    #[test]
    fn training_is_deterministic_and_makes_the_vocabulary_asked_for() {
        assert_eq!(train().json(), TRAINED.json());
        assert_eq!(TRAINED.vocabulary_size(), 600);
        assert_eq!(TRAINED.token(END_OF_TEXT), Some(0));
        let tokens = TRAINED.encode(SHAKESPEARE).unwrap();
        assert!(tokens.len() * 2 < SHAKESPEARE.len(), "{} tokens", tokens.len());
        for size in [0, 256, TOKEN_VOCABULARY_MAX as usize + 1] {
            let error = Tokenizer::train(std::iter::empty(), size).unwrap_err().to_string();
            assert!(error.contains(&format!("vocabulary of {size} tokens")), "{error}");
        }
    }

    #[test]
    fn pieces_give_the_tokens_of_the_whole() {
        let whole = TRAINED.encode_whole(SHAKESPEARE).unwrap();
        for piece_bytes in [1 << 20, 4000, 300] {
            let mut tokens = Vec::new();
            TRAINED
                .encode_to(SHAKESPEARE, piece_bytes, |piece| {
                    tokens.extend_from_slice(piece);
                    Ok(())
                })
                .unwrap();
            assert_eq!(tokens, whole, "{piece_bytes}");
        }
        assert_eq!(TRAINED.decode(&whole).unwrap(), SHAKESPEARE);
    }

    #[test]
    fn the_character_level_tokenizer_gives_the_tokens_of_the_corpus() {
        let text = "\n Übermut tut\t\u{1F600} selten gut, — ещё?";
        let characters = Characters::of(text);
        let json = serde_json::to_vec(&characters.tokenizer_json()).unwrap();
        let tokenizer = Tokenizer::from_json(&json, "characters").unwrap();
        assert_eq!(tokenizer.vocabulary_size(), characters.len());
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokens, text.chars().map(|c| characters.token(c).unwrap()).collect::<Vec<_>>());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn added_tokens_count_and_truncation_does_not() {
        let mut json: serde_json::Value = serde_json::from_slice(TRAINED.json()).unwrap();
        json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": 1000, "content": "<|far|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        });
        let tokenizer = Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), "far.json").unwrap();
        let far = tokenizer.token("<|far|>").unwrap();
        assert_eq!(tokenizer.vocabulary_size(), far as usize + 1);
        let text = "one two three four<|far|> five";
        let tokens = tokenizer.encode(text).unwrap();
        assert!(tokens.len() > 3 && tokens.contains(&far), "{tokens:?}");
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        let error = tokenizer.check_fits(600).unwrap_err().to_string();
        assert!(error.contains("far.json") && error.contains("the model's 600"), "{error}");
    }

    /// As the tokenizers of Llama have it: a template that puts a first token before every text.
    #[test]
    fn a_prompt_gets_the_special_tokens_of_the_tokenizer_and_a_text_none() {
        assert_eq!(TRAINED.encode_prompt("one two").unwrap(), TRAINED.encode_whole("one two").unwrap());
        let mut json: serde_json::Value = serde_json::from_slice(TRAINED.json()).unwrap();
        let first = serde_json::json!({ "SpecialToken": { "id": END_OF_TEXT, "type_id": 0 } });
        let text = |name: &str| serde_json::json!({ "Sequence": { "id": name, "type_id": 0 } });
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "single": [first, text("A")], "pair": [first, text("A"), text("B")],
            "special_tokens": { END_OF_TEXT: { "id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT] } },
        });
        let tokenizer = Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), "template").unwrap();
        let plain = tokenizer.encode_whole("one two").unwrap();
        assert_eq!(plain, TRAINED.encode_whole("one two").unwrap());
        assert_eq!(tokenizer.encode_prompt("one two").unwrap(), [&[0], &plain[..]].concat());
        assert_eq!(tokenizer.encode_prompt("").unwrap(), [0]);
    }

    #[test]
    fn a_text_becomes_a_corpus_for_a_padded_model() {
        let text = &SHAKESPEARE[..5000];
        let corpus = Corpus::with_tokenizer(text.as_bytes(), &TRAINED, 640).unwrap();
        assert_eq!((corpus.vocabulary().len(), corpus.vocabulary().unit()), (640, "token"));
        assert_eq!(corpus.vocabulary().tokenizer_json().unwrap(), TRAINED.json());
        assert_eq!(corpus.len(), TRAINED.encode(text).unwrap().len());
        let refused = Corpus::with_tokenizer(text.as_bytes(), &TRAINED, 599).unwrap_err();
        assert!(matches!(refused, CorpusError::Tokenizer(TokenizerError::LargerThanModel { .. })));
        assert!(matches!(Corpus::with_tokenizer(b"\xff", &TRAINED, 600), Err(CorpusError::NotUtf8(0))));
    }

    #[test]
    fn what_is_no_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for text in ["", "{", "[]", "{\"version\": \"1.0\"}", "{\"model\": {\"type\": \"BPE\"}}", "\u{0}"] {
            std::fs::write(&path, text).unwrap();
            let error = Tokenizer::load(&path).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json"), "{error}");
        }
        let error = Tokenizer::load(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_survives_whole_and_streamed(text in "\\PC{0,60}|[a-z \n\t\u{1F600}\u{0}-\u{7f}]{0,80}") {
            let tokens = TRAINED.encode(&text).unwrap();
            prop_assert_eq!(&TRAINED.decode(&tokens).unwrap(), &text);
            let mut decoder = TRAINED.stream_decoder();
            let mut streamed = String::new();
            for &token in &tokens {
                let more = decoder.push(token).unwrap();
                streamed += &more;
                prop_assert!(text.starts_with(&streamed), "{streamed:?} of {text:?}");
            }
            streamed += &decoder.finish().unwrap();
            prop_assert_eq!(streamed, text);
        }
    }
}
