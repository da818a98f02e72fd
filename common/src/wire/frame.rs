//! The messages of an exchange, laid out by hand. All numbers are little-endian, nothing is padded.
//!
//! One [`Push`] goes up a stream, one [`Reply`] comes down, each as the only message of its direction, so that the
//! end of the stream is the end of the frame; a frame whose length field disagrees was cut off, and is an error.
//!
//! Push: a header of 58 bytes, then the hash if it is present, then the payload.
//!
//! | offset | bytes | type | field | meaning |
//! | --- | --- | --- | --- | --- |
//! | 0 | 1 | u8 | kind | 1: a frame of another kind is not read as a push |
//! | 1 | 1 | u8 | flags | bit 0: skipped; bit 1: a replica hash is present; the others are 0 |
//! | 2 | 8 | u64 | session | who |
//! | 10 | 8 | u64 | seq | from 1; with the session it makes the update unique |
//! | 18 | 8 | u64 | batch | the batch that is done |
//! | 26 | 8 | u64 | step | server step of the model the gradient was taken at |
//! | 34 | 4 | f32 | loss | nats per token; finite unless skipped, when any value may come |
//! | 38 | 4 | u32 | tokens | predicted by the batch |
//! | 42 | 4 | f32 | dropped | share of the choices of experts that were dropped, in [0, 1] |
//! | 46 | 4 | u32 | known staleness | updates since that step that the worker knew of; any value |
//! | 50 | 8 | u64 | payload bytes | must be what is left of the frame; 0 if skipped |
//! | 58 | 0 or 32 | bytes | replica hash | SHA-256 of the worker's model before this push |
//! | 58 or 90 | | bytes | payload | tensor blocks ([`crate::sparse::codec`]) |
//!
//! Answer: a header of 30 bytes, then what the flags announce, in this order.
//!
//! | offset | bytes | type | field | meaning |
//! | --- | --- | --- | --- | --- |
//! | 0 | 1 | u8 | kind | 2 |
//! | 1 | 1 | u8 | flags | bit 0: batches; bit 1: an evaluation; bit 2: the run is over; the others are 0 |
//! | 2 | 8 | u64 | seq | the push that is answered, from 1 |
//! | 10 | 8 | u64 | step | updates applied, this one included |
//! | 18 | 4 | u32 | staleness | updates of others in between |
//! | 22 | 8 | u64 | payload bytes | must be what is left of the frame |
//! | 30 | 0 or 12 | u64, u32 | batches | the first and how many; at least 1, and the last has a number too |
//! | | 0 or 13 | u32, u64, u8 | evaluation | id, step, split (0 validation, 1 test) |
//! | | | bytes | payload | tensor blocks |
//!
//! Refusal: 3 bytes, the kind 3 and a u16, the number of the [`Refusal`].

use crate::ids::{BatchId, Seq, SessionId, Step};
use crate::layout::Layout;
use crate::sparse::payload_bytes_max;
use crate::wire::{Answer, BatchRange, EvaluationJob, Push, Refusal, Split, Work};

const KIND_PUSH: u8 = 1;
const KIND_ANSWER: u8 = 2;
const KIND_REFUSAL: u8 = 3;

const PUSH_SKIPPED: u8 = 1;
const PUSH_REPLICA_HASH: u8 = 1 << 1;

const ANSWER_BATCHES: u8 = 1;
const ANSWER_EVALUATION: u8 = 1 << 1;
const ANSWER_FINISHED: u8 = 1 << 2;

/// The longest header: a push with a hash.
const HEADER_BYTES_MAX: u64 = 90;

/// The header of a push, without a hash.
const PUSH_HEADER_BYTES: usize = 58;

/// The longest frame that a peer with this layout sends: the most that need be read from a stream.
pub fn frame_bytes_max(layout: &Layout) -> u64 {
    HEADER_BYTES_MAX + payload_bytes_max(layout)
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum WireError {
    /// The frame ends within its header.
    #[error("the frame of {0} bytes ends within its header")]
    Truncated(usize),
    /// Another kind of frame, or none.
    #[error("a frame of kind {0} is not expected here")]
    Kind(u8),
    /// Flags that no encoder sets.
    #[error("a frame of kind {kind} has the unknown flags {flags:#04x}")]
    Flags {
        /// What the frame is.
        kind: u8,
        /// Its flags.
        flags: u8,
    },
    /// The payload is not as long as announced.
    #[error("a payload of {announced} bytes was announced, {present} are present")]
    Length {
        /// By the header.
        announced: u64,
        /// Bytes after the header.
        present: usize,
    },
    /// Pushes are counted from 1.
    #[error("the sequence number is 0")]
    SeqZero,
    /// A loss that is infinite or not a number, of a push that is not skipped.
    #[error("the loss is {0}")]
    Loss(f32),
    /// A share of dropped choices that is no share.
    #[error("the share of dropped choices is {0}")]
    Dropped(f32),
    /// A skipped push with a payload.
    #[error("a skipped push has a payload of {0} bytes")]
    SkippedPayload(usize),
    /// No batch, or more than there are numbers for.
    #[error("a lease of {count} batches from {first} on")]
    Batches {
        /// The first batch.
        first: BatchId,
        /// How many.
        count: u32,
    },
    /// A part of the corpus that does not exist.
    #[error("an evaluation of the unknown split {0}")]
    Split(u8),
    /// A refusal without a name.
    #[error("the unknown refusal {0}")]
    Refusal(u16),
}

/// What comes back for a push.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It was applied, now or earlier.
    Answer(Answer),
    /// It was not.
    Refused(Refusal),
}

impl Push {
    /// Bytes of the frame.
    pub fn frame_bytes(&self) -> usize {
        PUSH_HEADER_BYTES + self.replica_hash.map_or(0, |hash| hash.len()) + self.payload.len()
    }

    /// Appends the frame.
    ///
    /// # Panics
    /// If the push breaks a rule that [`Self::decode`] checks.
    pub fn encode(&self, out: &mut Vec<u8>) {
        assert!(self.seq.0 > 0, "pushes are counted from 1");
        assert!(self.skipped || self.loss.is_finite(), "the loss of a push that is not skipped is finite");
        assert!(is_share(self.dropped), "the share of dropped choices is in [0, 1]");
        assert!(!self.skipped || self.payload.is_empty(), "a skipped push has no payload");
        let hash = self.replica_hash.as_ref().map_or(&[][..], |hash| hash);
        let flags = flag(self.skipped, PUSH_SKIPPED) | flag(!hash.is_empty(), PUSH_REPLICA_HASH);
        out.reserve(HEADER_BYTES_MAX as usize + self.payload.len());
        out.extend([KIND_PUSH, flags]);
        out.extend(self.session.0.to_le_bytes());
        out.extend(self.seq.0.to_le_bytes());
        out.extend(self.batch.0.to_le_bytes());
        out.extend(self.step.0.to_le_bytes());
        out.extend(self.loss.to_le_bytes());
        out.extend(self.tokens.to_le_bytes());
        out.extend(self.dropped.to_le_bytes());
        out.extend(self.known_staleness.to_le_bytes());
        out.extend((self.payload.len() as u64).to_le_bytes());
        out.extend_from_slice(hash);
        out.extend_from_slice(&self.payload);
    }

    /// Reads a whole frame. The payload is not looked into.
    ///
    /// # Errors
    /// A [`WireError`] for bytes that [`Self::encode`] does not write.
    pub fn decode(frame: &[u8]) -> Result<Self, WireError> {
        let mut header = Header { frame, position: 0 };
        let (kind, flags) = (header.u8()?, header.u8()?);
        if kind != KIND_PUSH {
            return Err(WireError::Kind(kind));
        }
        if flags & !(PUSH_SKIPPED | PUSH_REPLICA_HASH) != 0 {
            return Err(WireError::Flags { kind, flags });
        }
        let session = SessionId(header.u64()?);
        let seq = header.seq()?;
        let batch = BatchId(header.u64()?);
        let step = Step(header.u64()?);
        let loss = f32::from_bits(header.u32()?);
        let tokens = header.u32()?;
        let dropped = f32::from_bits(header.u32()?);
        let known_staleness = header.u32()?;
        let payload_bytes = header.u64()?;
        let replica_hash = if flags & PUSH_REPLICA_HASH != 0 { Some(header.bytes()?) } else { None };
        let payload = header.payload(payload_bytes)?;
        let skipped = flags & PUSH_SKIPPED != 0;
        if !skipped && !loss.is_finite() {
            return Err(WireError::Loss(loss));
        }
        if !is_share(dropped) {
            return Err(WireError::Dropped(dropped));
        }
        if skipped && !payload.is_empty() {
            return Err(WireError::SkippedPayload(payload.len()));
        }
        Ok(Self {
            session,
            seq,
            batch,
            step,
            loss,
            tokens,
            dropped,
            known_staleness,
            skipped,
            replica_hash,
            payload,
        })
    }
}

impl Reply {
    /// Appends the frame.
    ///
    /// # Panics
    /// If the reply breaks a rule that [`Self::decode`] checks.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Answer(answer) => answer.encode(out),
            Self::Refused(refusal) => {
                out.push(KIND_REFUSAL);
                out.extend((*refusal as u16).to_le_bytes());
            }
        }
    }

    /// Reads a whole frame. The payload is not looked into.
    ///
    /// # Errors
    /// A [`WireError`] for bytes that [`Self::encode`] does not write.
    pub fn decode(frame: &[u8]) -> Result<Self, WireError> {
        let mut header = Header { frame, position: 0 };
        match header.u8()? {
            KIND_ANSWER => Answer::decode_after_kind(header).map(Self::Answer),
            KIND_REFUSAL => {
                let number = u16::from_le_bytes(header.bytes()?);
                let refusal = refusal(number).ok_or(WireError::Refusal(number))?;
                header.payload(0)?;
                Ok(Self::Refused(refusal))
            }
            kind => Err(WireError::Kind(kind)),
        }
    }
}

impl Answer {
    /// Appends the frame.
    ///
    /// # Panics
    /// If the answer breaks a rule that [`Reply::decode`] checks.
    pub fn encode(&self, out: &mut Vec<u8>) {
        assert!(self.seq.0 > 0, "pushes are counted from 1");
        let Work { batches, evaluation, finished } = self.work;
        let flags = flag(batches.is_some(), ANSWER_BATCHES)
            | flag(evaluation.is_some(), ANSWER_EVALUATION)
            | flag(finished, ANSWER_FINISHED);
        out.reserve(HEADER_BYTES_MAX as usize + self.payload.len());
        out.extend([KIND_ANSWER, flags]);
        out.extend(self.seq.0.to_le_bytes());
        out.extend(self.step.0.to_le_bytes());
        out.extend(self.staleness.to_le_bytes());
        out.extend((self.payload.len() as u64).to_le_bytes());
        if let Some(range) = batches {
            assert!(is_batch_range(range), "a lease of {} batches from {} on", range.count, range.first);
            out.extend(range.first.0.to_le_bytes());
            out.extend(range.count.to_le_bytes());
        }
        if let Some(job) = evaluation {
            out.extend(job.id.to_le_bytes());
            out.extend(job.step.0.to_le_bytes());
            out.push(match job.split {
                Split::Validation => 0,
                Split::Test => 1,
            });
        }
        out.extend_from_slice(&self.payload);
    }

    fn decode_after_kind(mut header: Header<'_>) -> Result<Self, WireError> {
        let flags = header.u8()?;
        if flags & !(ANSWER_BATCHES | ANSWER_EVALUATION | ANSWER_FINISHED) != 0 {
            return Err(WireError::Flags { kind: KIND_ANSWER, flags });
        }
        let seq = header.seq()?;
        let step = Step(header.u64()?);
        let staleness = header.u32()?;
        let payload_bytes = header.u64()?;
        let mut work = Work { finished: flags & ANSWER_FINISHED != 0, ..Work::default() };
        if flags & ANSWER_BATCHES != 0 {
            let range = BatchRange { first: BatchId(header.u64()?), count: header.u32()? };
            if !is_batch_range(range) {
                return Err(WireError::Batches { first: range.first, count: range.count });
            }
            work.batches = Some(range);
        }
        if flags & ANSWER_EVALUATION != 0 {
            let (id, step) = (header.u32()?, Step(header.u64()?));
            let split = match header.u8()? {
                0 => Split::Validation,
                1 => Split::Test,
                other => return Err(WireError::Split(other)),
            };
            work.evaluation = Some(EvaluationJob { id, step, split });
        }
        Ok(Self { seq, step, staleness, work, payload: header.payload(payload_bytes)? })
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// Whether a number is in [0, 1]; one that is not a number is not.
fn is_share(share: f32) -> bool {
    (0.0..=1.0).contains(&share)
}

/// Whether a lease has a first batch and a last one.
fn is_batch_range(range: BatchRange) -> bool {
    range.count > 0 && range.first.0.checked_add(u64::from(range.count) - 1).is_some()
}

fn refusal(number: u16) -> Option<Refusal> {
    [
        Refusal::UnknownSession,
        Refusal::SequenceMismatch,
        Refusal::InFlight,
        Refusal::NotLeased,
        Refusal::BadPayload,
        Refusal::ReplicaMismatch,
        Refusal::Finished,
        Refusal::AbsurdNorm,
    ]
    .into_iter()
    .find(|refusal| *refusal as u16 == number)
}

/// Reads a frame from its start.
struct Header<'a> {
    frame: &'a [u8],
    position: usize,
}

impl Header<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let rest = &self.frame[self.position..];
        let bytes = *rest.first_chunk().ok_or(WireError::Truncated(self.frame.len()))?;
        self.position += N;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.bytes().map(u8::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn seq(&mut self) -> Result<Seq, WireError> {
        let seq = self.u64()?;
        if seq == 0 { Err(WireError::SeqZero) } else { Ok(Seq(seq)) }
    }

    /// All that is left, which must be as much as announced.
    fn payload(self, announced: u64) -> Result<Vec<u8>, WireError> {
        let rest = &self.frame[self.position..];
        if rest.len() as u64 != announced {
            return Err(WireError::Length { announced, present: rest.len() });
        }
        Ok(rest.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn push() -> impl Strategy<Value = Push> {
        let hash = prop::option::of(any::<[u8; 32]>());
        let payload = prop::collection::vec(any::<u8>(), 0..40);
        (any::<[u64; 4]>(), -1e9_f32..1e9, 0_f32..=1.0, any::<[u32; 2]>(), any::<bool>(), hash, payload)
            .prop_map(
                |(
                    [session, seq, batch, step],
                    loss,
                    dropped,
                    [tokens, known_staleness],
                    skipped,
                    replica_hash,
                    payload,
                )| Push {
                    session: SessionId(session),
                    seq: Seq(seq.max(1)),
                    batch: BatchId(batch),
                    step: Step(step),
                    loss,
                    tokens,
                    dropped,
                    known_staleness,
                    skipped,
                    replica_hash,
                    payload: if skipped { Vec::new() } else { payload },
                },
            )
    }

    fn work() -> impl Strategy<Value = Work> {
        let batches = prop::option::of((any::<u64>(), 1_u32..));
        let evaluation = prop::option::of((any::<u32>(), any::<u64>(), any::<bool>()));
        (batches, evaluation, any::<bool>()).prop_map(|(batches, evaluation, finished)| Work {
            batches: batches.map(|(first, count)| BatchRange { first: BatchId(first >> 1), count }),
            evaluation: evaluation.map(|(id, step, test)| EvaluationJob {
                id,
                step: Step(step),
                split: if test { Split::Test } else { Split::Validation },
            }),
            finished,
        })
    }

    fn answer() -> impl Strategy<Value = Answer> {
        let payload = prop::collection::vec(any::<u8>(), 0..40);
        (1_u64.., any::<u64>(), any::<u32>(), work(), payload).prop_map(
            |(seq, step, staleness, work, payload)| Answer {
                seq: Seq(seq),
                step: Step(step),
                staleness,
                work,
                payload,
            },
        )
    }

    fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut frame = Vec::new();
        encode(&mut frame);
        frame
    }

    proptest! {
        #[test]
        fn pushes_round_trip_and_any_other_length_is_refused(push in push()) {
            let mut frame = encoded(|out| push.encode(out));
            assert_eq!(push.frame_bytes(), frame.len());
            prop_assert_eq!(Push::decode(&frame), Ok(push));
            for cut in 0..frame.len() {
                prop_assert!(Push::decode(&frame[..cut]).is_err());
            }
            frame.push(0);
            let too_long = matches!(Push::decode(&frame), Err(WireError::Length { .. }));
            prop_assert!(too_long);
        }

        #[test]
        fn answers_round_trip_and_any_other_length_is_refused(answer in answer()) {
            let mut frame = encoded(|out| answer.encode(out));
            prop_assert_eq!(Reply::decode(&frame), Ok(Reply::Answer(answer)));
            for cut in 0..frame.len() {
                prop_assert!(Reply::decode(&frame[..cut]).is_err());
            }
            frame.push(0);
            let too_long = matches!(Reply::decode(&frame), Err(WireError::Length { .. }));
            prop_assert!(too_long);
        }

        #[test]
        fn what_can_be_decoded_encodes_to_the_same_bytes(
            mut frame in prop::collection::vec(any::<u8>(), 0..120),
            kind in 0_u8..5,
            flags in 0_u8..8,
        ) {
            // Most random frames would fail at their first byte or their length.
            let length_at = if kind == KIND_PUSH { 50 } else { 22 };
            let header = match kind {
                KIND_PUSH => PUSH_HEADER_BYTES + 32 * usize::from(flags >> 1 & 1),
                _ => 30 + 12 * usize::from(flags & 1) + 13 * usize::from(flags >> 1 & 1),
            };
            if frame.len() >= header {
                let payload_bytes = (frame.len() - header) as u64;
                frame[..2].copy_from_slice(&[kind, flags]);
                frame[length_at..length_at + 8].copy_from_slice(&payload_bytes.to_le_bytes());
            }
            if let Ok(push) = Push::decode(&frame) {
                prop_assert_eq!(encoded(|out| push.encode(out)), &frame[..]);
            }
            if let Ok(reply) = Reply::decode(&frame) {
                prop_assert_eq!(encoded(|out| reply.encode(out)), &frame[..]);
            }
        }
    }

    #[test]
    fn every_refusal_has_its_number() {
        for number in 0..1000_u16 {
            let frame = [&[KIND_REFUSAL], &number.to_le_bytes()[..]].concat();
            match Reply::decode(&frame) {
                Ok(reply) => assert_eq!(encoded(|out| reply.encode(out)), frame),
                Err(error) => assert_eq!(error, WireError::Refusal(number)),
            }
            assert_eq!(refusal(number).is_some(), (1..=8).contains(&number));
        }
        let long = [KIND_REFUSAL, 1, 0, 0];
        assert_eq!(Reply::decode(&long), Err(WireError::Length { announced: 0, present: 1 }));
    }

    #[test]
    fn refuses_what_no_encoder_writes() {
        let base = Push {
            session: SessionId(1),
            seq: Seq(1),
            batch: BatchId(0),
            step: Step(0),
            loss: 1.0,
            tokens: 1,
            dropped: 0.0,
            known_staleness: 0,
            skipped: false,
            replica_hash: None,
            payload: vec![5],
        };
        let frame = encoded(|out| base.encode(out));
        let check = |offset: usize, bytes: &[u8], expected| {
            let mut frame = frame.clone();
            frame[offset..offset + bytes.len()].copy_from_slice(bytes);
            assert_eq!(Push::decode(&frame), Err(expected));
        };
        check(0, &[2], WireError::Kind(2));
        check(1, &[4], WireError::Flags { kind: 1, flags: 4 });
        check(1, &[PUSH_SKIPPED], WireError::SkippedPayload(1));
        check(10, &[0], WireError::SeqZero);
        check(34, &f32::INFINITY.to_le_bytes(), WireError::Loss(f32::INFINITY));
        check(42, &1.5_f32.to_le_bytes(), WireError::Dropped(1.5));
        check(42, &(-0.5_f32).to_le_bytes(), WireError::Dropped(-0.5));
        check(42, &f32::INFINITY.to_le_bytes(), WireError::Dropped(f32::INFINITY));
        check(50, &u64::MAX.to_le_bytes(), WireError::Length { announced: u64::MAX, present: 1 });

        let work = Work {
            batches: Some(BatchRange { first: BatchId(3), count: 2 }),
            evaluation: Some(EvaluationJob { id: 1, step: Step(2), split: Split::Test }),
            finished: false,
        };
        let answer = Answer { seq: Seq(1), step: Step(1), staleness: 0, work, payload: Vec::new() };
        let frame = encoded(|out| answer.encode(out));
        let check = |offset: usize, bytes: &[u8], expected| {
            let mut frame = frame.clone();
            frame[offset..offset + bytes.len()].copy_from_slice(bytes);
            assert_eq!(Reply::decode(&frame), Err(expected));
        };
        check(1, &[8], WireError::Flags { kind: 2, flags: 8 });
        check(38, &[0], WireError::Batches { first: BatchId(3), count: 0 });
        check(30, &[0xff; 8], WireError::Batches { first: BatchId(u64::MAX), count: 2 });
        check(54, &[2], WireError::Split(2));
    }
}
