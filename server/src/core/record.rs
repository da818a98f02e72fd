//! What is written down of the core's decisions: enough to make them again, in the same order, with the same outcome.

use std::borrow::Cow;
use std::fmt::Debug;

use sanderling_common::ids::{Seq, SessionId, Step};
use sanderling_common::wire::Push;
use sanderling_common::wire::control::{ControlError, EvaluationReport, decode, encode};
use sanderling_common::wire::frame::WireError;

/// Where the core writes its decisions down.
pub trait Log: Debug + Send + Sync {
    /// Takes the next record, with what it did. It is called while the order of steps is held, so that the records have the order of the
    /// decisions; it must not wait for a disk. Nobody outside may learn of a decision before its record is kept, which
    /// is for the driver to see to.
    fn append(&self, record: &Record<'_>, effect: Effect);
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLog;

impl Log for NoLog {
    fn append(&self, _: &Record<'_>, _: Effect) {}
}

/// One decision.
#[derive(Clone, Debug, PartialEq)]
pub enum Record<'a> {
    /// A push got its step, or was noted as skipped.
    Pushed(Cow<'a, Push>),
    /// Any other.
    Noted(Cow<'a, Note>),
}

/// What a decision did, beyond what its record says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A push has its step.
    Pushed {
        /// The step of the model after it.
        step: Step,
        /// Its staleness.
        staleness: u32,
        /// Whether its update is applied.
        applies: bool,
        /// Whether the model after it is to be evaluated.
        snapshot: bool,
    },
    /// The end of training.
    Stopped {
        /// The step of the model that is still to be evaluated, if it is.
        snapshot: Option<Step>,
    },
    /// Anything else.
    Noted,
}

/// A decision that is told in a few bytes.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Note {
    /// A session began.
    Opened(SessionId),
    /// A session ended.
    Closed(SessionId),
    /// A push was answered, with what there was to do.
    Answered(SessionId, Seq),
    /// A session asked what there was to do.
    Asked(SessionId),
    /// The snapshot of a step can be fetched.
    SnapshotReady(Step),
    /// An evaluation came back.
    Reported(SessionId, Box<EvaluationReport>),
    /// No more batches are leased.
    Stopped,
}

/// Bytes that are no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// There are none, or the first names no kind of record.
    #[error("a record of kind {0:?}")]
    Kind(Option<u8>),
    /// Not a push.
    #[error("a push that cannot be read: {0}")]
    Push(#[from] WireError),
    /// Not a note.
    #[error("a note that cannot be read: {0}")]
    Note(#[from] ControlError),
}

const PUSHED: u8 = 1;
const NOTED: u8 = 2;

impl Record<'_> {
    /// Appends the record's bytes: one that tells the kind, then the push's frame or the note as control messages are
    /// encoded.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Pushed(push) => {
                out.push(PUSHED);
                push.encode(out);
            }
            Self::Noted(note) => {
                out.push(NOTED);
                out.extend_from_slice(&encode(note.as_ref()));
            }
        }
    }

    /// The record of these bytes.
    ///
    /// # Errors
    /// A [`RecordError`] for bytes that [`Self::encode`] does not write.
    pub fn decode(bytes: &[u8]) -> Result<Record<'static>, RecordError> {
        match bytes.split_first() {
            Some((&PUSHED, frame)) => Ok(Record::Pushed(Cow::Owned(Push::decode(frame)?))),
            Some((&NOTED, note)) => {
                // The length in front is the record's own, less what is in front of it.
                let (_, note) = note.split_at_checked(4).unwrap_or_default();
                Ok(Record::Noted(Cow::Owned(decode(note)?)))
            }
            other => Err(RecordError::Kind(other.map(|(kind, _)| *kind))),
        }
    }
}
