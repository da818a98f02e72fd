//! The bytes on the wire, pinned: two versions that negotiate the same protocol name must agree on them.
//!
//! After an intended change of the format, change `ALPN` too, and write the files anew with
//! `SANDERLING_WRITE_GOLDEN=1 cargo test -p sanderling-common --test golden` (the tests that write fail, so that
//! a forgotten variable cannot make them pass).

use std::path::Path;

use sanderling_common::ids::{BatchId, Seq, SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{Compression, Compressor, Update, ValueFormat, decode};
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Answer, BatchRange, EvaluationJob, Push, Refusal, Split, Work};

fn check_golden(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("SANDERLING_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, bytes).expect("the folder of golden files can be written");
        panic!("wrote {}; run again without the variable", path.display());
    }
    let golden = std::fs::read(&path).expect("the golden file is in the tree");
    assert!(golden == bytes, "{name} is\n{golden:02x?}, encoding gives\n{bytes:02x?}");
}

/// Dense, sparse and empty tensors, with signs, zeros and a long gap.
fn example(format: ValueFormat) -> (Layout, Update, Vec<u8>) {
    let layout =
        Layout::new([("norm", vec![6]), ("weight", vec![40, 25]), ("bias", vec![3]), ("zero", vec![2000])])
            .expect("a valid layout");
    let mut values = vec![0.0; layout.len()];
    for (index, value) in values.iter_mut().take(1009).enumerate() {
        *value = (index * index % 97) as f32 * if index % 3 == 0 { -0.037 } else { 0.021 };
    }
    values[1005] = 40.0;
    let compression = Compression { keep: 0.02, dense_below: 10, format };
    let mut payload = Vec::new();
    let count = layout.tensors().len();
    let update = Compressor::without_zeros(compression)
        .compress(&layout, 0..count, &values, &mut payload)
        .expect("finite values");
    (layout, update, payload)
}

fn check_payload(name: &str, format: ValueFormat) {
    let (layout, update, payload) = example(format);
    check_golden(name, &payload);
    assert_eq!(decode(&layout, update.tensors(), &payload), Ok(update));
}

#[test]
fn payload_f32() {
    check_payload("payload-f32.bin", ValueFormat::F32);
}

#[test]
fn payload_bf16() {
    check_payload("payload-bf16.bin", ValueFormat::Bf16);
}

#[test]
fn payload_int8() {
    check_payload("payload-int8.bin", ValueFormat::Int8);
}

#[test]
fn payload_sign() {
    check_payload("payload-sign.bin", ValueFormat::Sign);
}

/// The table of the codec, followed by hand.
#[test]
fn payload_by_hand() {
    let layout = Layout::new([("a", vec![100]), ("b", vec![2])]).unwrap();
    let mut values = vec![0.0; 102];
    (values[10], values[13], values[31], values[101]) = (1.0, -127.0, 63.6, 0.5);
    let compression = Compression { keep: 0.03, dense_below: 2, format: ValueFormat::Int8 };
    let mut payload = Vec::new();
    Compressor::new(compression).compress(&layout, 0..2, &values, &mut payload).unwrap();
    // Gaps 10, 2 and 17 with p = 2: quotients 2, 0 and 4, low bits 2, 2 and 1. In the order of the bits:
    // 00 1 01, 1 01, 0000 1 10.
    let expected = [
        // int8, sparse, p = 2; three entries.
        &[0b0001_0110, 3][..],
        &[0b1011_0100, 0b0011_0000],
        &1_f32.to_le_bytes(),
        &[1, -127_i8 as u8, 64],
        // int8, dense.
        &[0b0000_0010],
        &(0.5_f32 / 127.0).to_le_bytes(),
        &[0, 127],
    ]
    .concat();
    assert_eq!(payload, expected);
}

fn push() -> Push {
    Push {
        session: SessionId(0x0123_4567_89ab_cdef),
        seq: Seq(17),
        batch: BatchId(4242),
        step: Step(65_537),
        loss: 1.875,
        tokens: 768,
        dropped: 0.015625,
        known_staleness: 5,
        skipped: false,
        replica_hash: Some(std::array::from_fn(|index| index as u8)),
        payload: example(ValueFormat::Int8).2,
    }
}

fn check_push(name: &str, push: &Push) {
    let mut frame = Vec::new();
    push.encode(&mut frame);
    check_golden(name, &frame);
    assert_eq!(Push::decode(&frame).as_ref(), Ok(push));
}

fn check_reply(name: &str, reply: &Reply) {
    let mut frame = Vec::new();
    reply.encode(&mut frame);
    check_golden(name, &frame);
    assert_eq!(Reply::decode(&frame).as_ref(), Ok(reply));
}

#[test]
fn push_with_hash() {
    check_push("push.bin", &push());
}

#[test]
fn push_skipped() {
    let skipped =
        Push { skipped: true, loss: f32::INFINITY, replica_hash: None, payload: Vec::new(), ..push() };
    check_push("push-skipped.bin", &skipped);
}

fn answer() -> Answer {
    Answer {
        seq: Seq(17),
        step: Step(65_541),
        staleness: 3,
        work: Work {
            batches: Some(BatchRange { first: BatchId(4300), count: 8 }),
            evaluation: Some(EvaluationJob { id: 5, step: Step(65_500), split: Split::Test }),
            finished: false,
        },
        payload: example(ValueFormat::Bf16).2,
    }
}

#[test]
fn answer_with_work() {
    check_reply("answer.bin", &Reply::Answer(answer()));
}

#[test]
fn answer_at_the_end() {
    let work = Work { finished: true, ..Work::default() };
    check_reply("answer-finished.bin", &Reply::Answer(Answer { work, payload: Vec::new(), ..answer() }));
}

#[test]
fn refusal() {
    check_reply("refusal.bin", &Reply::Refused(Refusal::ReplicaMismatch));
}
