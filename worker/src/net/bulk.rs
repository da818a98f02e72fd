//! Fetching large objects: in pieces as they come, resumed by offset, verified by hash.

use quinn::Connection;
use sanderling_common::ids::SessionId;
use sanderling_common::wire::control::{BulkHeader, BulkObject, BulkRequest, StreamKind};
use sanderling_transport::{MessageError, receive, send};
use sha2::{Digest, Sha256};

/// What has arrived of an object so far. It outlives a lost connection, so that the next one goes on where the last
/// one broke off.
#[derive(Debug, Default)]
pub(super) struct Download {
    object: Option<BulkObject>,
    received: Vec<u8>,
}

/// Why an object did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum BulkError {
    /// The connection was lost; what has arrived is kept.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The connection cannot open another stream.
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    /// The stream broke off.
    #[error("a bulk transfer broke off: {0}")]
    Read(#[from] quinn::ReadError),
    /// The stream ended before the object did; what has arrived is kept.
    #[error("a bulk transfer ended after {received} of {announced} bytes")]
    Short {
        /// Bytes here.
        received: u64,
        /// Bytes announced.
        announced: u64,
    },
    /// The server does not have it (any more).
    #[error("the server does not have the object {0:?}")]
    NotFound(BulkObject),
    /// The server announced more than the object can have.
    #[error("the server announced {announced} bytes for an object of at most {allowed}")]
    TooLarge {
        /// What it announced.
        announced: u64,
        /// What is allowed.
        allowed: u64,
    },
    /// The bytes are not those that were announced.
    #[error("{object:?} arrived damaged: its hash is not the announced one")]
    Damaged {
        /// The object.
        object: BulkObject,
    },
}

impl Download {
    /// Fetches `object`, going on with what an earlier call left. The object has at most `bytes_max` bytes.
    ///
    /// # Errors
    /// A [`BulkError`]. After a lost connection, call again with the next one.
    pub(super) async fn fetch(
        &mut self,
        connection: &Connection,
        session: SessionId,
        object: BulkObject,
        bytes_max: u64,
    ) -> Result<Vec<u8>, BulkError> {
        if self.object != Some(object) {
            *self = Self { object: Some(object), received: Vec::new() };
        }
        let (mut up, mut down) = connection.open_bi().await?;
        up.write_all(&[StreamKind::Bulk as u8]).await.map_err(MessageError::from)?;
        send(&mut up, &BulkRequest { session, object, offset: self.received.len() as u64 }).await?;
        // Finishing a stream fails only when it was already reset, which reading will report.
        let _ = up.finish();
        let BulkHeader::Found { bytes, sha256 } = receive(&mut down).await? else {
            *self = Self::default();
            return Err(BulkError::NotFound(object));
        };
        if bytes > bytes_max {
            return Err(BulkError::TooLarge { announced: bytes, allowed: bytes_max });
        }
        let missing = (bytes as usize).saturating_sub(self.received.len());
        self.received.reserve_exact(missing);
        while (self.received.len() as u64) < bytes {
            let Some(chunk) = down.read_chunk(bytes as usize - self.received.len(), true).await? else {
                break;
            };
            self.received.extend_from_slice(&chunk.bytes);
        }
        if (self.received.len() as u64) < bytes {
            return Err(BulkError::Short { received: self.received.len() as u64, announced: bytes });
        }
        let received = std::mem::take(self).received;
        if <[u8; 32]>::from(Sha256::digest(&received)) == sha256 {
            Ok(received)
        } else {
            Err(BulkError::Damaged { object })
        }
    }
}

/// The parameters in a base model, little-endian `f32`; `None` unless there are exactly `count` finite
/// ones.
pub(super) fn parameters(bytes: &[u8], count: usize) -> Option<Vec<f32>> {
    if bytes.len() != count * 4 {
        return None;
    }
    let values: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    values.iter().all(|value| value.is_finite()).then_some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_must_be_as_many_as_expected_and_finite() {
        let bytes: Vec<u8> = [1.5f32, -0.0, 3e-40].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(parameters(&bytes, 3).unwrap(), [1.5, -0.0, 3e-40]);
        assert_eq!(parameters(&bytes, 2), None);
        assert_eq!(parameters(&bytes[..11], 3), None);
        assert_eq!(parameters(&f32::NAN.to_le_bytes(), 1), None);
    }
}
