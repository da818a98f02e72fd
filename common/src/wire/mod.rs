//! Every byte that crosses the network is described here and in [`crate::sparse::codec`].
//!
//! Control messages (hello, welcome, evaluation reports) are small serde structures in [`control`]; the messages of
//! an exchange are laid out by hand in [`frame`], so that their size can be predicted and counted.

pub mod control;
pub mod frame;

use crate::ids::{BatchId, Seq, SessionId, Step};

/// The application protocol name negotiated by TLS. It changes with every incompatible change of any byte here or
/// in the codec, so two versions that disagree fail at the handshake instead of misreading each other.
pub const ALPN: &[u8] = b"sanderling/7";

/// The largest magnitude of an entry of an update. A server refuses a push with a larger one, and a worker makes none: a
/// training that wants such updates has diverged.
pub const UPDATE_MAGNITUDE_MAX: f32 = (1_u128 << 64) as f32;

/// A worker's half of an exchange: one sparse update, or the word that there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Push {
    /// Which session this belongs to.
    pub session: SessionId,
    /// The session's count of pushes, starting at 1. The same number again asks for the stored answer.
    pub seq: Seq,
    /// The batch whose gradient this is; the server marks it done.
    pub batch: BatchId,
    /// The server step of the worker's model when it took the gradient.
    pub step: Step,
    /// Mean cross-entropy of the batch, nats per token.
    pub loss: f32,
    /// Tokens the batch predicted.
    pub tokens: u32,
    /// Share of its tokens' choices of experts that were dropped because experts were full, mean over the layers.
    pub dropped: f32,
    /// Updates since [`step`](Self::step) that the worker knew of when it took the gradient in: the τ of its rate. With it, the
    /// order of a run's events is all that is needed to make it again.
    pub known_staleness: u32,
    /// The gradient was not finite: nothing is applied, the batch counts as done, `payload` is empty.
    pub skipped: bool,
    /// The hash of the worker's model before this push ([`crate::init::parameters_hash`]), when it wants it checked.
    pub replica_hash: Option<[u8; 32]>,
    /// Tensor blocks of the whole layout ([`crate::sparse`]); what the server subtracts from its model.
    pub payload: Vec<u8>,
}

/// The server's half of an exchange, which is also the acknowledgement of the push.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The push this answers.
    pub seq: Seq,
    /// Updates applied so far, this one included.
    pub step: Step,
    /// Updates of others applied between the worker's previous difference and this push.
    pub staleness: u32,
    /// What to do next.
    pub work: Work,
    /// Tensor blocks of the whole layout; what the worker adds to its model.
    pub payload: Vec<u8>,
}

/// What the server wants a worker to do: in an answer, in addition to what it already holds; in a response to a
/// request, what it already holds first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Work {
    /// Batches leased to this session: the first and how many follow one another.
    pub batches: Option<BatchRange>,
    /// A model to evaluate, before going on.
    pub evaluation: Option<EvaluationJob>,
    /// The run is over: say goodbye.
    pub finished: bool,
}

/// A run of consecutive batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BatchRange {
    /// The first batch.
    pub first: BatchId,
    /// How many; at least 1.
    pub count: u32,
}

/// The part of the corpus that an evaluation reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Held out to choose the best model.
    Validation,
    /// Held out to report it.
    Test,
}

/// One evaluation: the loss of the server's model at a stated step over a whole split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct EvaluationJob {
    /// Names the job within the run.
    pub id: u32,
    /// The server step whose model is evaluated; fetched as a snapshot over a bulk stream.
    pub step: Step,
    /// What to evaluate on.
    pub split: Split,
}

/// Why the server did not apply a push. The worker's session is void unless the text of the variant says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[repr(u16)]
pub enum Refusal {
    /// The server has no such session (it expired, or the server is another one).
    #[error("the server has no such session; start anew")]
    UnknownSession = 1,
    /// Neither the next push nor a repeat of the last one.
    #[error("the push has a sequence number that does not follow the last one")]
    SequenceMismatch = 2,
    /// The same push is being applied right now; ask again. The session goes on.
    #[error("the push is being applied")]
    InFlight = 3,
    /// The batch is not leased to this session.
    #[error("the batch is not leased to this session")]
    NotLeased = 4,
    /// The payload cannot be decoded or holds a value that may not be applied.
    #[error("the payload is malformed or has values out of range")]
    BadPayload = 5,
    /// The worker's model is not what the server knows it to be.
    #[error("the worker's model differs from the server's replica of it")]
    ReplicaMismatch = 6,
    /// The run is over. The session ends in peace.
    #[error("the run is over")]
    Finished = 7,
    /// The update is out of all proportion to the run's recent ones.
    #[error("the update is larger than the run's recent ones by more than norm_limit")]
    AbsurdNorm = 8,
}
