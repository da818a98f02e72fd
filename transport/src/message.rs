//! Control messages on QUIC streams, bounded before anything is allocated.

use quinn::{ReadExactError, RecvStream, SendStream, WriteError};
use sanderling_common::wire::control::{self, CONTROL_BYTES_MAX, ControlError, StreamKind};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a message did not arrive or could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The stream ended, was reset, or its connection was lost.
    #[error("the stream ended early: {0}")]
    Read(#[from] ReadExactError),
    /// The bytes are not the expected message.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The message is longer than it may be.
    #[error("a control message of {bytes} bytes; at most {bytes_max} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The other side does not take more, or the connection was lost.
    #[error("cannot send: {0}")]
    Write(#[from] WriteError),
    /// More bytes than a frame of this kind may have, or a broken stream.
    #[error("cannot read a frame: {0}")]
    Frame(#[from] quinn::ReadToEndError),
}

impl MessageError {
    /// Whether the other side broke the protocol, as opposed to the network having broken the connection.
    pub fn is_violation(&self) -> bool {
        matches!(self, Self::Control(_) | Self::TooLong { .. } | Self::Frame(quinn::ReadToEndError::TooLong))
    }
}

/// Reads the first byte of a stream the other side opened.
///
/// # Errors
/// A [`MessageError`] if there is none or it names no kind of stream.
pub async fn read_kind(stream: &mut RecvStream) -> Result<StreamKind, MessageError> {
    let mut kind = [0];
    stream.read_exact(&mut kind).await?;
    Ok(StreamKind::try_from(kind[0])?)
}

/// Sends one control message.
///
/// # Errors
/// [`MessageError::Write`].
pub async fn send(stream: &mut SendStream, message: &impl Serialize) -> Result<(), MessageError> {
    Ok(stream.write_all(&control::encode(message)).await?)
}

/// Receives one control message.
///
/// # Errors
/// A [`MessageError`]; a length over [`CONTROL_BYTES_MAX`] is refused before any allocation.
pub async fn receive<T: DeserializeOwned>(stream: &mut RecvStream) -> Result<T, MessageError> {
    receive_at_most(stream, CONTROL_BYTES_MAX).await
}

/// Receives one control message of a peer that is trusted with no more than `bytes_max` bytes.
///
/// # Errors
/// As [`receive`].
pub async fn receive_at_most<T: DeserializeOwned>(
    stream: &mut RecvStream,
    bytes_max: usize,
) -> Result<T, MessageError> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > bytes_max {
        return Err(MessageError::TooLong { bytes: length, bytes_max });
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(control::decode(&body)?)
}

/// Receives everything up to the end of the stream, at most `bytes_max` bytes.
///
/// # Errors
/// A [`MessageError`], also for a stream that is longer.
pub async fn receive_rest(stream: &mut RecvStream, bytes_max: usize) -> Result<Vec<u8>, MessageError> {
    Ok(stream.read_to_end(bytes_max).await?)
}
