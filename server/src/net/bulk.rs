//! Sending large objects from an offset on.

use bytes::Bytes;
use quinn::SendStream;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::SessionId;
use sanderling_common::wire::control::{BulkHeader, BulkObject, BulkRequest};
use sanderling_transport::send;
use sha2::{Digest, Sha256};

use super::connection::PeerError;
use super::hub::Hub;
use super::pace::Pace;
use crate::core::Base;

/// A large object, immutable, with its hash.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    bytes: Bytes,
    sha256: [u8; 32],
}

impl Blob {
    /// Little-endian `f32`.
    pub(crate) fn of_parameters(parameters: &[f32]) -> Self {
        let mut bytes = Vec::with_capacity(parameters.len() * 4);
        parameters.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
        Self { sha256: Sha256::digest(&bytes).into(), bytes: bytes.into() }
    }

    /// What a session begins with.
    pub(crate) fn of_base(base: Base) -> Self {
        match base {
            Base::Whole(parameters) => Self::of_parameters(&parameters),
            Base::Difference(payload) => Self::of_bytes(payload.into()),
        }
    }

    pub(crate) fn of_bytes(bytes: Bytes) -> Self {
        Self { sha256: Sha256::digest(&bytes).into(), bytes }
    }

    /// The text or token file as it is; one that is mapped is not copied.
    pub(crate) fn of_corpus(corpus: &Corpus) -> Self {
        Self { bytes: Bytes::from_owner(corpus.bytes().clone()), sha256: corpus.sha256() }
    }
}

/// Answers one request.
pub(super) async fn serve(
    hub: &Hub,
    session: SessionId,
    request: BulkRequest,
    down: &mut SendStream,
) -> Result<(), PeerError> {
    // Each is made for its session alone, so there is one at a time, until it is sent.
    let aside = match request.object {
        BulkObject::Snapshot(_) => Some(hub.aside(session)),
        _ => None,
    };
    let _turn = match &aside {
        Some(aside) => Some(aside.lock().await),
        None => None,
    };
    let blob = match request.object {
        BulkObject::Base => hub.base(session),
        BulkObject::Snapshot(job) => hub.snapshot_for(session, job).await,
        BulkObject::Text => Some(hub.text()),
        BulkObject::Dense => hub.dense(),
    };
    let found = blob.filter(|blob| request.session == session && request.offset <= blob.bytes.len() as u64);
    let Some(blob) = found else {
        return Ok(send(down, &BulkHeader::NotFound).await?);
    };
    let pace = Pace::begin(hub.lease());
    let header = BulkHeader::Found { bytes: blob.bytes.len() as u64, sha256: blob.sha256 };
    pace.message(send(down, &header)).await?;
    pace.send(down, blob.bytes.slice(request.offset as usize..)).await
}
