//! serde structures as bytes, little-endian with variable-length integers. The one module that knows bincode, so that
//! the format is pinned in one place.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not the structure that was expected.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// More than allowed.
    #[error("{bytes} bytes where at most {bytes_max} are allowed")]
    TooLong {
        /// How many there are.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// Another structure, or none.
    #[error(transparent)]
    Malformed(#[from] bincode::error::DecodeError),
    /// Bytes after its end.
    #[error("{0} bytes follow it")]
    Trailing(usize),
}

fn format<const BYTES_MAX: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<BYTES_MAX>()
}

/// The bytes of a structure.
///
/// # Errors
/// [`BinaryError::TooLong`].
///
/// # Panics
/// If the structure has no binary form, such as one with a flattened field.
pub fn encode<const BYTES_MAX: usize>(value: &impl Serialize) -> Result<Vec<u8>, BinaryError> {
    let bytes = bincode::serde::encode_to_vec(value, format::<BYTES_MAX>()).expect("it has a binary form");
    check_length::<BYTES_MAX>(&bytes)?;
    Ok(bytes)
}

/// The structure that all of these bytes are.
///
/// # Errors
/// A [`BinaryError`]; nothing was allocated beyond `BYTES_MAX`.
pub fn decode<T: DeserializeOwned, const BYTES_MAX: usize>(bytes: &[u8]) -> Result<T, BinaryError> {
    check_length::<BYTES_MAX>(bytes)?;
    let (value, used) = bincode::serde::decode_from_slice(bytes, format::<BYTES_MAX>())?;
    if used == bytes.len() { Ok(value) } else { Err(BinaryError::Trailing(bytes.len() - used)) }
}

fn check_length<const BYTES_MAX: usize>(bytes: &[u8]) -> Result<(), BinaryError> {
    let bytes = bytes.len();
    if bytes <= BYTES_MAX { Ok(()) } else { Err(BinaryError::TooLong { bytes, bytes_max: BYTES_MAX }) }
}
