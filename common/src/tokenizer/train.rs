//! Training a tokenizer on a text.

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Pipeline};

use super::{Tokenizer, TokenizerError};
use crate::tokens::TOKEN_VOCABULARY_MAX;

/// Separates documents in the tokenizers that are trained here, and in many others.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The smallest vocabulary that can be trained: every byte, and [`END_OF_TEXT`].
pub const TRAINED_VOCABULARY_MIN: usize = 257;

/// A tokenizer is trained on the first so many bytes: what comes after changes little, and the counts of pairs, which
/// have 31 bits, cannot overflow.
pub const TRAINING_BYTES_MAX: u64 = 1 << 30;

impl Tokenizer {
    /// Trains a byte-level BPE tokenizer with GPT-2's rules for words. It can encode any text, and the same texts make
    /// the same tokenizer. The vocabulary has `vocabulary_size` tokens, or fewer if the texts have no more to merge;
    /// token 0 is [`END_OF_TEXT`].
    ///
    /// Of the texts, [`TRAINING_BYTES_MAX`] are read.
    ///
    /// # Errors
    /// [`TokenizerError::TrainedVocabulary`] for a size that cannot be, or [`TokenizerError::Training`].
    pub fn train(
        texts: impl Iterator<Item = String> + Send,
        vocabulary_size: usize,
    ) -> Result<Self, TokenizerError> {
        if !(TRAINED_VOCABULARY_MIN..=TOKEN_VOCABULARY_MAX as usize).contains(&vocabulary_size) {
            return Err(TokenizerError::TrainedVocabulary(vocabulary_size));
        }
        let mut pipeline = Pipeline::new(BPE::default());
        pipeline.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        pipeline.with_decoder(Some(ByteLevel::default()));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(vocabulary_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .show_progress(false)
            .build()
            .into();
        let mut bytes = 0;
        let texts = texts.take_while(move |text| {
            bytes += text.len() as u64;
            bytes <= TRAINING_BYTES_MAX
        });
        pipeline.train(&mut trainer, texts).map_err(TokenizerError::Training)?;
        let json = pipeline.to_string(true).map_err(TokenizerError::Training)?;
        Self::from_json(json.as_bytes(), "the trained tokenizer")
    }
}
