//! The names that people give to workers.

use std::fmt;
use std::str::FromStr;

/// The longest name, in characters: a label of a DNS name has no more.
pub const NAME_CHARACTERS_MAX: usize = 63;

/// The name of a worker's token or certificate: one that a certificate can carry as a DNS name, in lower case, so that a
/// name is written in one way only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be a worker's name: it has a to z, 0 to 9, - and . (none of the last two at an end, nor beside a .), at \
     most {NAME_CHARACTERS_MAX} characters, such as node-1"
)]
pub struct NameError(String);

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_plain = |label: &str| {
            let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
        };
        if text.len() <= NAME_CHARACTERS_MAX && text.split('.').all(is_plain) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.to_owned()))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl Name {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_in_one_way() {
        for good in ["node-1", "a", "gpu.example.org", "7", &"a".repeat(NAME_CHARACTERS_MAX)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        let long = "a".repeat(NAME_CHARACTERS_MAX + 1);
        for bad in [
            "", "Node", "a b", "a/b", "../a", "a..b", ".a", "a.", "-a", "a-", "a.-b", "a\n", "ä", "a_b",
            &long,
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}
