//! Streams that do not stand still: whoever sends or takes too slowly is given up on, so that nobody makes the server hold
//! a half-sent push, or an answer that is never read, for ever.

use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use sanderling_transport::MessageError;
use tokio::time::timeout_at;

use super::connection::PeerError;

/// A stream may stand still for this long, or a lease where that is shorter.
pub(super) const STREAM_WAIT_MAX: Duration = Duration::from_secs(60);

/// Beyond that, a stream moves at least so many bytes per second on average.
pub(super) const STREAM_BYTES_PER_S_MIN: u64 = 1024;

/// Read at a time.
const CHUNK_BYTES_MAX: usize = 64 << 10;

/// How long a stream has, from its beginning on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    begun: Instant,
    wait: Duration,
}

impl Pace {
    /// Of a stream that begins now.
    pub(super) fn begin(lease: Duration) -> Self {
        Self { begun: Instant::now(), wait: lease.min(STREAM_WAIT_MAX) }
    }

    /// When the next byte must have moved.
    fn deadline(&self, moved: usize) -> tokio::time::Instant {
        let earned = Duration::from_millis(moved as u64 * 1000 / STREAM_BYTES_PER_S_MIN);
        (self.begun + self.wait + earned).into()
    }

    /// Waits for a small message.
    pub(super) async fn message<T>(
        &self,
        received: impl Future<Output = Result<T, MessageError>>,
    ) -> Result<T, PeerError> {
        let received = timeout_at(self.deadline(0), received).await;
        Ok(received.map_err(|_| PeerError::TooSlow)??)
    }

    /// Receives everything up to the end of a stream, at most `bytes_max` bytes.
    pub(super) async fn receive_rest(
        &self,
        up: &mut RecvStream,
        bytes_max: usize,
    ) -> Result<Vec<u8>, PeerError> {
        let mut received = Vec::new();
        loop {
            let chunk = timeout_at(self.deadline(received.len()), up.read_chunk(CHUNK_BYTES_MAX, true)).await;
            let chunk = chunk.map_err(|_| PeerError::TooSlow)?;
            let Some(chunk) = chunk.map_err(|error| MessageError::Frame(error.into()))? else {
                return Ok(received);
            };
            let bytes = chunk.bytes;
            if bytes.len() > bytes_max - received.len() {
                return Err(MessageError::Frame(quinn::ReadToEndError::TooLong).into());
            }
            // Doubled as usual, but never beyond the longest frame.
            if received.capacity() - received.len() < bytes.len() {
                let wanted = (2 * received.len()).max(CHUNK_BYTES_MAX).min(bytes_max);
                received.reserve_exact(wanted.max(received.len() + bytes.len()) - received.len());
            }
            received.extend_from_slice(&bytes);
        }
    }

    /// Sends bytes without copying them.
    pub(super) async fn send(&self, down: &mut SendStream, bytes: Bytes) -> Result<(), PeerError> {
        let (length, mut left) = (bytes.len(), [bytes]);
        while !left[0].is_empty() {
            let deadline = self.deadline(length - left[0].len());
            let written = timeout_at(deadline, down.write_chunks(&mut left)).await;
            written.map_err(|_| PeerError::TooSlow)??;
        }
        Ok(())
    }
}
