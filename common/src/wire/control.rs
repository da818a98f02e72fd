//! Small control messages: hello, welcome, requests for work and bulk data, evaluation reports.
//!
//! Their bytes are those of [`crate::binary`]. On a stream each message is preceded by its length as a little-endian
//! `u32`.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::binary::{self, BinaryError};
use crate::config::RunConfig;
use crate::ids::{SessionId, Step, WorkerId};
use crate::layout::LayoutHash;
use crate::model_config::{FeedForward, ModelConfig};
use crate::upcycle::Recipe;
use crate::wire::{EvaluationJob, Work};

/// The longest control message, in bytes. The largest is an evaluation report (a share per expert and layer).
pub const CONTROL_BYTES_MAX: usize = 1 << 20;

/// What a stream is for: its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamKind {
    /// Hello, ready and goodbye; the first stream of a connection, open as long as the connection.
    Control = 1,
    /// One exchange: a push frame up, a reply frame down ([`crate::wire::frame`]).
    Exchange = 2,
    /// One [`Request`] up, one [`Response`] down.
    Request = 3,
    /// One [`BulkRequest`] up; a [`BulkHeader`] and raw bytes down.
    Bulk = 4,
}

impl TryFrom<u8> for StreamKind {
    type Error = ControlError;

    fn try_from(byte: u8) -> Result<Self, ControlError> {
        [Self::Control, Self::Exchange, Self::Request, Self::Bulk]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(ControlError::UnknownStream(byte))
    }
}

/// Why bytes are not a control message.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A first byte that names no kind of stream.
    #[error("a stream started with {0}, which is no kind of stream")]
    UnknownStream(u8),
    /// Not exactly one message of the expected structure.
    #[error("a malformed control message: {0}")]
    Malformed(#[from] BinaryError),
}

/// The first message of a worker.
#[derive(Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Hello {
    /// Admits the worker; empty where its certificate does.
    pub token: String,
    /// The session to go on with, if there is one.
    pub resume: Option<SessionId>,
    /// The worker's software and version, for people.
    pub software: String,
}

/// Without the token.
impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut hello = f.debug_struct("Hello");
        hello.field("resume", &self.resume).field("software", &self.software).finish_non_exhaustive()
    }
}

/// The server's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Greeting {
    /// Come in.
    Welcome(Box<Welcome>),
    /// Stay out: the token is not this run's.
    WrongToken,
    /// No room: `sessions_max` sessions exist.
    Full {
        /// The limit.
        sessions_max: u32,
    },
    /// The run is over.
    Finished,
    /// No room for this name: it has as many sessions as one may.
    NameFull {
        /// The limit.
        sessions_max: u32,
    },
}

/// Everything a worker needs to know about the run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Welcome {
    /// The number people know it by.
    pub worker: WorkerId,
    /// Its session, for this and later connections.
    pub session: SessionId,
    /// Whether this is the session the worker asked to resume.
    pub resumed: bool,
    /// The resolved configuration.
    pub run: RunConfig,
    /// SHA-256 of the text.
    pub text_sha256: [u8; 32],
    /// The model that is trained.
    pub model: ModelConfig,
    /// How the worker comes by the model that the run began with.
    pub initial: Initial,
    /// The server's layout; the worker derives its own from `run` and compares.
    pub layout_hash: LayoutHash,
}

/// How a worker comes by the model that the run began with.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Initial {
    /// Not at all: it is sent the base of its session whole.
    Sent,
    /// By seeded initialisation; it is sent what differs from that.
    Seeded {
        /// [`crate::init::parameters_hash`] of it.
        sha256: [u8; 32],
    },
    /// It makes it of a dense model, and is sent what differs from it.
    Upcycled(Box<OnlineUpcycling>),
}

impl Initial {
    /// The hash of the model that a worker makes, if it makes one.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        match self {
            Self::Sent => None,
            Self::Seeded { sha256 } => Some(*sha256),
            Self::Upcycled(upcycling) => Some(upcycling.sha256),
        }
    }
}

/// A mixture that server and workers each make of the same dense model.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct OnlineUpcycling {
    /// The dense architecture.
    pub dense: ModelConfig,
    /// Names the dense parameters: [`crate::init::parameters_hash`].
    pub dense_sha256: [u8; 32],
    /// What is made of them.
    pub recipe: Recipe,
    /// The same hash of the mixture that comes of it.
    pub sha256: [u8; 32],
}

/// The worker's confirmation that it can take part.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Ready {
    /// The layout the worker derived.
    pub layout_hash: LayoutHash,
    /// The hash of the initial model that it made, where it is to make one.
    pub initial_sha256: Option<[u8; 32]>,
}

/// The server's answer to [`Ready`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Start {
    /// A session that has not pushed yet: fetch the base model, unless it is there already, then ask for work.
    Fetch {
        /// The server step of the base.
        step: Step,
    },
    /// A resumed session: repeat the unanswered push, or ask for work.
    Resume,
    /// The layouts differ; the two programs are not of the same version.
    LayoutMismatch,
    /// The initial models that the two made differ.
    InitialMismatch,
}

/// The last message of a worker that leaves of its own accord.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Goodbye;

/// What a worker may ask for outside an exchange.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Request {
    /// Something to do; the server may hold the answer back for a while when there is nothing yet.
    Work(SessionId),
    /// The result of an evaluation.
    Evaluated(SessionId, Box<EvaluationReport>),
}

/// The server's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Response {
    /// What to do. All fields empty means: nothing yet, ask again.
    Work(Work),
    /// The session is gone; start anew.
    UnknownSession,
}

/// The loss of the server's model at a step over a split, and how its routers behaved.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EvaluationReport {
    /// Which evaluation.
    pub job: EvaluationJob,
    /// Mean cross-entropy, nats per token.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Per layer, the share of routed token slots that went to each expert (sums to one); empty for dense models.
    pub expert_share: Vec<Vec<f32>>,
    /// Per layer, the mean entropy of the router's softmax over all experts, nats; empty for dense models.
    pub router_entropy: Vec<f32>,
}

impl EvaluationReport {
    /// Whether it has as many layers and experts as the model.
    pub fn fits(&self, model: &ModelConfig) -> bool {
        let (layers, experts) = match model.feed_forward {
            FeedForward::Dense => (0, 0),
            FeedForward::Moe { experts, .. } => (model.layers, experts),
        };
        (self.expert_share.len(), self.router_entropy.len()) == (layers, layers)
            && self.expert_share.iter().all(|shares| shares.len() == experts)
    }
}

/// Asks for bulk data from an offset on.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct BulkRequest {
    /// Whose session this is for.
    pub session: SessionId,
    /// What to send.
    pub object: BulkObject,
    /// Bytes the worker already has.
    pub offset: u64,
}

/// Something large that a worker may fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum BulkObject {
    /// The model this session starts from, little-endian `f32` in layout order; or of a run whose workers make the
    /// initial model, the tensor blocks of what is to be added to that.
    Base,
    /// What is to be added to a copy of the session's model to make the server's at an evaluation's step of it, in the two
    /// parts of [`crate::sparse::join_aside`]. The server sends it only to the session that is to do the evaluation.
    Snapshot(EvaluationJob),
    /// The text.
    Text,
    /// The dense model that the run's mixture is made of, as [`dense_bytes`] writes it.
    Dense,
}

/// Values that all fit bfloat16 exactly, 2 bytes each.
const DENSE_BFLOAT16: u8 = 2;

/// Values as they are, 4 bytes each.
const DENSE_FLOAT32: u8 = 4;

/// A dense model as it travels: a byte that tells the format, then the values in layout order, little-endian. A model
/// that was stored as bfloat16 takes half as long as its float32 form would.
pub fn dense_bytes(parameters: &[f32]) -> Vec<u8> {
    let short = parameters.iter().all(|value| value.to_bits() & 0xffff == 0);
    let mut bytes = Vec::with_capacity(1 + parameters.len() * if short { 2 } else { 4 });
    bytes.push(if short { DENSE_BFLOAT16 } else { DENSE_FLOAT32 });
    for value in parameters {
        let all = value.to_le_bytes();
        bytes.extend_from_slice(if short { &all[2..] } else { &all });
    }
    bytes
}

/// The most bytes that [`dense_bytes`] makes of so many parameters.
pub fn dense_bytes_max(count: usize) -> u64 {
    1 + 4 * count as u64
}

/// The parameters again; `None` unless there are exactly `count` finite ones.
pub fn dense_parameters(bytes: &[u8], count: usize) -> Option<Vec<f32>> {
    let (format, bytes) = bytes.split_first()?;
    let values: Vec<f32> = match *format {
        DENSE_BFLOAT16 if bytes.len() == 2 * count => {
            bytes.chunks_exact(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect()
        }
        DENSE_FLOAT32 if bytes.len() == 4 * count => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        _ => return None,
    };
    values.iter().all(|value| value.is_finite()).then_some(values)
}

/// Comes before the bytes of a bulk transfer.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum BulkHeader {
    /// The object follows, from the requested offset to its end.
    Found {
        /// Size of the whole object.
        bytes: u64,
        /// SHA-256 of the whole object.
        sha256: [u8; 32],
    },
    /// There is no such object, or the offset lies beyond its end.
    NotFound,
}

/// The bytes of a control message, its length first.
///
/// # Panics
/// If the message is longer than [`CONTROL_BYTES_MAX`], which the bounds on the model's size rule out.
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    let body = binary::encode::<CONTROL_BYTES_MAX>(message).expect("control messages are short");
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}

/// Reads the body of a control message, without its length.
///
/// # Errors
/// A [`ControlError`] for bytes that are not exactly one message of this type.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, ControlError> {
    Ok(binary::decode::<T, CONTROL_BYTES_MAX>(body)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{BatchId, SessionId};
    use crate::wire::{BatchRange, Split};

    fn body(message: &impl Serialize) -> Vec<u8> {
        let frame = encode(message);
        let (length, body) = frame.split_at(4);
        assert_eq!(u32::from_le_bytes(length.try_into().unwrap()) as usize, body.len());
        body.to_vec()
    }

    fn round_trips<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T) {
        let body = body(message);
        assert_eq!(&decode::<T>(&body).unwrap(), message);
        for length in 0..body.len() {
            assert!(decode::<T>(&body[..length]).is_err(), "{length} of {} bytes were enough", body.len());
        }
        let longer = [&body[..], &[0]].concat();
        assert!(matches!(decode::<T>(&longer), Err(ControlError::Malformed(BinaryError::Trailing(1)))));
    }

    fn report() -> EvaluationReport {
        EvaluationReport {
            job: EvaluationJob { id: 3, step: Step(500), split: Split::Validation },
            loss: 1.5,
            tokens: 55_769,
            expert_share: vec![vec![0.25; 4]; 2],
            router_entropy: vec![1.0, 0.5],
        }
    }

    #[test]
    fn messages_round_trip_and_any_other_length_is_refused() {
        let session = SessionId(u64::MAX);
        round_trips(&Hello { token: "a-token".to_owned(), resume: Some(session), software: String::new() });
        round_trips(&Greeting::Welcome(Box::new(Welcome {
            worker: WorkerId(7),
            session,
            resumed: true,
            run: RunConfig::default(),
            text_sha256: [9; 32],
            model: RunConfig::default().model_config(65),
            initial: Initial::Upcycled(Box::new(OnlineUpcycling {
                dense: RunConfig::default().model_config(65),
                dense_sha256: [8; 32],
                recipe: RunConfig::default().recipe(),
                sha256: [7; 32],
            })),
            layout_hash: LayoutHash([1; 32]),
        })));
        round_trips(&Greeting::Full { sessions_max: 300 });
        round_trips(&Greeting::NameFull { sessions_max: 3 });
        round_trips(&Start::Fetch { step: Step(1 << 40) });
        round_trips(&Request::Evaluated(session, Box::new(report())));
        let batches = Some(BatchRange { first: BatchId(1 << 33), count: 4 });
        round_trips(&Response::Work(Work { batches, evaluation: Some(report().job), finished: false }));
        round_trips(&BulkRequest { session, object: BulkObject::Snapshot(report().job), offset: 1 << 50 });
        round_trips(&BulkHeader::Found { bytes: 12, sha256: [3; 32] });
    }

    /// A length that no message can have is refused before anything of that size is allocated.
    #[test]
    fn lengths_inside_a_message_are_bounded() {
        // A string of 2^63 bytes where Hello's token is.
        let huge = [&[253][..], &(1_u64 << 63).to_le_bytes()].concat();
        assert!(decode::<Hello>(&huge).is_err());
        let too_long = decode::<Hello>(&vec![0; CONTROL_BYTES_MAX + 1]).unwrap_err();
        assert!(matches!(too_long, ControlError::Malformed(BinaryError::TooLong { .. })), "{too_long}");
    }

    #[test]
    fn a_dense_model_travels_in_the_shorter_format_that_holds_it() {
        // The largest number that bfloat16 has.
        let large = f32::from_bits(0x7f7f_0000);
        for (values, bytes) in [(vec![1.5f32, -0.0, large], 7), (vec![0.1, -0.0, 1.0e-40], 13)] {
            let sent = dense_bytes(&values);
            assert_eq!(sent.len(), bytes);
            assert!(sent.len() as u64 <= dense_bytes_max(3));
            let received = dense_parameters(&sent, 3).unwrap();
            assert!(received.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert_eq!(dense_parameters(&sent, 4), None);
            assert_eq!(dense_parameters(&sent[..bytes - 1], 3), None);
        }
        assert_eq!(dense_parameters(&[], 0), None);
        assert_eq!(dense_parameters(&[3, 0, 0], 1), None);
        assert_eq!(dense_parameters(&dense_bytes(&[f32::NAN]), 1), None);
    }

    #[test]
    fn a_hello_does_not_show_its_token() {
        let hello = Hello { token: "a-secret-token".to_owned(), resume: None, software: "x 1".to_owned() };
        let shown = format!("{hello:?}");
        assert!(!shown.contains("secret") && shown.contains("x 1"), "{shown}");
    }

    #[test]
    fn only_the_known_kinds_of_stream_exist() {
        let known = (0..=u8::MAX).filter(|&byte| StreamKind::try_from(byte).is_ok());
        assert_eq!(known.collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused_or_read_and_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index,
            byte: u8,
        ) {
            let _ = decode::<Hello>(&bytes);
            let _ = decode::<Greeting>(&bytes);
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Response>(&bytes);
            let _ = decode::<BulkRequest>(&bytes);
            let _ = decode::<BulkHeader>(&bytes);
            // A real message with one byte changed gets further.
            let mut changed = body(&Request::Evaluated(SessionId(5), Box::new(report())));
            let at = at.index(changed.len());
            changed[at] = byte;
            let _ = decode::<Request>(&changed);
        }
    }
}
