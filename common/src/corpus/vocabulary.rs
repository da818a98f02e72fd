//! What a corpus's tokens stand for.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::tokens::TokenFile;

/// The vocabulary of a corpus.
#[derive(Clone, Debug)]
pub enum Vocabulary {
    /// Of a text at character level.
    Characters(Characters),
    /// Of a token file, which may bring its tokenizer.
    Tokens(TokenFile),
}

impl Vocabulary {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Self::Characters(characters) => characters.len(),
            Self::Tokens(file) => file.vocabulary_size(),
        }
    }

    /// Whether the text was empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The characters, where a token is a character.
    pub fn characters(&self) -> Option<&Characters> {
        match self {
            Self::Characters(characters) => Some(characters),
            Self::Tokens(_) => None,
        }
    }

    /// The `tokenizer.json` that a checkpoint should carry; none for a token file without one.
    pub fn tokenizer_json(&self) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Characters(characters) => {
                let json = serde_json::to_vec_pretty(&characters.tokenizer_json());
                Some(json.expect("JSON values can be written").into())
            }
            Self::Tokens(file) => file.tokenizer_json().map(Cow::from),
        }
    }

    /// What one token is called.
    pub fn unit(&self) -> &'static str {
        match self {
            Self::Characters(_) => "character",
            Self::Tokens(_) => "token",
        }
    }
}

/// The distinct characters of a text in code point order; a token is a character's place among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Characters {
    characters: Vec<char>,
}

impl Characters {
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
