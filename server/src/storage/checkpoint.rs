//! Checkpoints: the whole state at one position of the journal, so that a recovery need not replay what came before.
//!
//! All integers are little-endian.
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | `sndrstat` |
//! | 4 | format version, 1 |
//! | 16 | the run's id |
//! | 8 | position: how many records are covered |
//! | 8 | parameters of the model, P |
//! | 8 | length of the description |
//! | length | the description: stamp, books, sessions, order, leases, evaluations, and which of the following there are, in [`binary`]'s form |
//! | | the stored answers, then the answers under way, in the order of sessions |
//! | 4·P each | θ, then the workers' models, in ascending order, then those to be evaluated, likewise: float32 |
//! | 32 | SHA-256 of everything before it |
//!
//! What is read counts only when its hash is right. No length is believed beyond the bytes that there are.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use sanderling_common::binary::{self, BinaryError};
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sha2::{Digest, Sha256};

use super::journal::{Position, RunId};
use super::state::Stamp;
use crate::core::{CoreImage, Image, Restored, UnderWay};
use crate::recorder::Books;

const MAGIC: &[u8; 8] = b"sndrstat";

/// The version of the format.
pub const CHECKPOINT_VERSION: u32 = 1;

/// The longest description: it holds no models and no answers, a few kilobytes per evaluation and per session.
const DESCRIPTION_BYTES_MAX: usize = 256 << 20;

/// Floats that are turned into bytes at a time.
const FLOATS_AT_A_TIME: usize = 1 << 14;

/// Why bytes are no checkpoint of a run.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointFileError {
    /// They cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// They begin otherwise.
    #[error("it is not a checkpoint of a server's state")]
    Foreign,
    /// Of a newer release.
    #[error("it has format {0}; this release reads {CHECKPOINT_VERSION}")]
    Newer(u32),
    /// Of another run.
    #[error("it belongs to another run")]
    OtherRun,
    /// A length that cannot be.
    #[error("it announces {announced} bytes where {left} are left")]
    Length {
        /// The length.
        announced: u64,
        /// What there is.
        left: u64,
    },
    /// The description cannot be read.
    #[error("its description cannot be read: {0}")]
    Description(#[from] BinaryError),
    /// An answer without a session.
    #[error("it holds an answer to {0}, which it does not know")]
    Answer(SessionId),
    /// The hash is that of other bytes.
    #[error("it is damaged: its hash is wrong")]
    Damaged,
}

/// A state to be written down.
#[derive(Debug)]
pub struct StateCheckpoint {
    /// Records that it covers.
    pub position: Position,
    /// Of the last of them.
    pub stamp: Stamp,
    /// What they came to in the books.
    pub books: Books,
    /// What they came to in the core and the shards.
    pub image: Image,
}

/// A state that was read.
#[derive(Debug)]
pub struct RestoredState {
    /// Records that it covers.
    pub position: Position,
    /// Of the last of them.
    pub stamp: Stamp,
    /// What they came to in the books.
    pub books: Books,
    /// What they came to in the core and the shards.
    pub image: Restored,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Description {
    stamp: Stamp,
    books: Books,
    core: CoreImage,
    /// Lengths of the stored answers.
    answers: Vec<(SessionId, u64)>,
    /// Lengths of the answers under way, and the replicas' digests where they were asked for.
    under_way: Vec<(SessionId, u64, Option<[u8; 32]>)>,
    replicas: Vec<WorkerId>,
    snapshots: Vec<Step>,
}

impl StateCheckpoint {
    /// Writes it.
    ///
    /// # Errors
    /// What `out` says; a description that is too long, which would take millions of evaluations.
    pub fn write(&self, run: RunId, out: impl Write) -> Result<(), CheckpointFileError> {
        let mut out = Hashing { inner: out, hasher: Sha256::new(), left: u64::MAX };
        let Image { core, theta, replicas, under_way, snapshots } = &self.image;
        let description = Description {
            stamp: self.stamp,
            books: self.books.clone(),
            core: core.clone(),
            answers: core.answers().map(|(session, answer)| (session, answer.len() as u64)).collect(),
            under_way: under_way
                .iter()
                .map(|(session, push)| (*session, push.payload.len() as u64, push.replica_hash))
                .collect(),
            replicas: replicas.keys().copied().collect(),
            snapshots: snapshots.keys().copied().collect(),
        };
        let description = binary::encode::<DESCRIPTION_BYTES_MAX>(&description)?;
        let parameters: u64 = theta.iter().map(|part| part.len() as u64).sum();
        out.write_all(MAGIC)?;
        out.write_all(&CHECKPOINT_VERSION.to_le_bytes())?;
        out.write_all(&run.0)?;
        for number in [self.position, parameters, description.len() as u64] {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(&description)?;
        for (_, answer) in core.answers() {
            out.write_all(answer)?;
        }
        for push in under_way.values() {
            out.write_all(&push.payload)?;
        }
        for part in theta.iter().chain(replicas.values().flatten()) {
            write_floats(&mut out, part)?;
        }
        for model in snapshots.values() {
            write_floats(&mut out, model)?;
        }
        let Hashing { mut inner, hasher, .. } = out;
        inner.write_all(&hasher.finalize())?;
        Ok(inner.flush()?)
    }
}

impl RestoredState {
    /// The hash that ends a checkpoint with these bytes before it.
    pub fn hash(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    /// Reads the checkpoint of a run out of `bytes` bytes.
    ///
    /// # Errors
    /// A [`CheckpointFileError`].
    pub fn read(run: RunId, input: impl Read, bytes: u64) -> Result<Self, CheckpointFileError> {
        let mut input = Hashing { inner: input, hasher: Sha256::new(), left: bytes };
        if input.array()? != *MAGIC {
            return Err(CheckpointFileError::Foreign);
        }
        let version = u32::from_le_bytes(input.array()?);
        if version != CHECKPOINT_VERSION {
            return Err(CheckpointFileError::Newer(version));
        }
        if input.array()? != run.0 {
            return Err(CheckpointFileError::OtherRun);
        }
        let position = u64::from_le_bytes(input.array()?);
        let parameters = u64::from_le_bytes(input.array()?);
        let length = u64::from_le_bytes(input.array()?);
        let description = input.bytes(length)?;
        let description = binary::decode::<Description, DESCRIPTION_BYTES_MAX>(&description)?;
        let Description { stamp, books, mut core, answers, under_way, replicas, snapshots } = description;
        for (session, length) in answers {
            let answer = input.bytes(length)?.into();
            if !core.set_answer(session, answer) {
                return Err(CheckpointFileError::Answer(session));
            }
        }
        let mut payloads = BTreeMap::new();
        for (session, length, replica_hash) in under_way {
            payloads.insert(session, UnderWay { payload: input.bytes(length)?.into(), replica_hash });
        }
        let theta = input.floats(parameters)?;
        let replica = |worker| Ok((worker, input.floats(parameters)?));
        let replicas = replicas.into_iter().map(replica).collect::<Result<_, CheckpointFileError>>()?;
        let snapshot = |step| Ok((step, input.floats(parameters)?));
        let snapshots = snapshots.into_iter().map(snapshot).collect::<Result<_, CheckpointFileError>>()?;
        let computed: [u8; 32] = input.hasher.clone().finalize().into();
        if input.array()? != computed || input.left > 0 {
            return Err(CheckpointFileError::Damaged);
        }
        let image = Restored { core, theta, replicas, under_way: payloads, snapshots };
        Ok(Self { position, stamp, books, image })
    }
}

/// Hashes what passes, and knows how much is left.
struct Hashing<T> {
    inner: T,
    hasher: Sha256,
    left: u64,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Hashing<T> {
    fn claim(&mut self, bytes: Option<u64>) -> Result<usize, CheckpointFileError> {
        let announced = bytes.unwrap_or(u64::MAX);
        let too_long = CheckpointFileError::Length { announced, left: self.left };
        self.left = self.left.checked_sub(announced).ok_or(too_long)?;
        Ok(usize::try_from(announced).expect("what there is can be addressed"))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CheckpointFileError> {
        self.claim(Some(N as u64))?;
        let mut array = [0; N];
        self.inner.read_exact(&mut array)?;
        self.hasher.update(array);
        Ok(array)
    }

    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, CheckpointFileError> {
        let mut bytes = vec![0; self.claim(Some(length))?];
        self.inner.read_exact(&mut bytes)?;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    fn floats(&mut self, count: u64) -> Result<Vec<f32>, CheckpointFileError> {
        let count = self.claim(count.checked_mul(4))? / 4;
        let mut floats = Vec::with_capacity(count);
        let mut buffer = vec![0; 4 * FLOATS_AT_A_TIME.min(count)];
        while floats.len() < count {
            let bytes = &mut buffer[..4 * FLOATS_AT_A_TIME.min(count - floats.len())];
            self.inner.read_exact(bytes)?;
            self.hasher.update(&*bytes);
            let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
            floats.extend(bytes.chunks_exact(4).map(float));
        }
        Ok(floats)
    }
}

fn write_floats(out: &mut impl Write, floats: &[f32]) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4 * FLOATS_AT_A_TIME.min(floats.len()));
    for floats in floats.chunks(FLOATS_AT_A_TIME) {
        buffer.clear();
        floats.iter().for_each(|float| buffer.extend_from_slice(&float.to_le_bytes()));
        out.write_all(&buffer)?;
    }
    Ok(())
}
