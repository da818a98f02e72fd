//! Every decoder against arbitrary bytes: a function per family, which panics when a decoder does, or when what was
//! decoded does not encode to what it was decoded from.
//!
//! `cargo fuzz run TARGET --features libfuzzer` runs one for as long as it is let; the inputs that it found worth keeping
//! are in `corpus/TARGET`, and the tests run all of them, so that what was found once stays found.

pub mod memory;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use memory::MemoryDisk;
use sanderling_common::checkpoint::{CONFIG_FILE, Checkpoint, INDEX_FILE, TENSORS_FILE, parse_config};
use sanderling_common::config;
use sanderling_common::corpus::Corpus;
use sanderling_common::join::JoinString;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{decode, split_aside};
use sanderling_common::wire::control::{
    self, BulkHeader, BulkRequest, EvaluationReport, Goodbye, Greeting, Hello, Ready, Request, Response,
    Start,
};
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Push, Split};
use sanderling_server::admission::Passes;
use sanderling_server::core::Record;
use sanderling_server::storage::{Journal, JournalError, RestoredState, RunId, SEGMENT_BYTES, Stamp};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A function that must not panic, whatever it is given.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("payload", payload),
    ("frames", frames),
    ("control", control),
    ("journal", journal),
    ("state", state),
    ("tokens", tokens),
    ("checkpoint", checkpoint),
    ("texts", texts),
    ("shards", shards),
    ("passes", passes),
];

/// Shards of a fuzzed checkpoint, at most.
const SHARDS_MAX: usize = 8;

/// The run that journals and states are of.
pub const RUN: RunId = RunId([7; 16]);

/// The largest layout a fuzzed state is restored in.
pub fn layout() -> &'static Layout {
    static LAYOUT: LazyLock<Layout> = LazyLock::new(|| {
        let tensors = [("dense", vec![7]), ("matrix", vec![40, 30]), ("one", vec![1]), ("long", vec![5000])];
        let tensors = tensors.map(|(name, shape)| (name.to_owned(), shape));
        Layout::new(tensors).expect("the sizes are positive")
    });
    &LAYOUT
}

/// Payloads of pushes and answers, and what is sent for evaluations.
pub fn payload(bytes: &[u8]) {
    let layout = layout();
    let whole = 0..layout.tensors().len();
    if let Ok(update) = decode(layout, whole.clone(), bytes) {
        let dense = update.to_dense(layout);
        assert!(dense.iter().all(|value| value.is_finite()), "a value that is not finite was decoded");
        let mut model = vec![1.0; layout.len()];
        update.subtract_from(layout, &mut model);
        assert!(update.norm().is_finite() && update.entry_count() <= layout.len());
    }
    if let Some((first, second)) = split_aside(bytes) {
        let _ = (decode(layout, whole.clone(), first), decode(layout, whole, second));
    }
}

/// Pushes, answers and refusals.
pub fn frames(bytes: &[u8]) {
    if let Ok(push) = Push::decode(bytes) {
        let mut again = Vec::new();
        push.encode(&mut again);
        assert_eq!(again, bytes, "a push has two forms");
    }
    if let Ok(reply) = Reply::decode(bytes) {
        let mut again = Vec::new();
        reply.encode(&mut again);
        assert_eq!(again, bytes, "a reply has two forms");
    }
}

/// Control messages, of the kind that the first byte chooses.
pub fn control(bytes: &[u8]) {
    let Some((&kind, body)) = bytes.split_first() else { return };
    match kind % 10 {
        0 => message::<Hello>(body),
        1 => message::<Greeting>(body),
        2 => message::<Ready>(body),
        3 => message::<Start>(body),
        4 => message::<Goodbye>(body),
        5 => message::<Request>(body),
        6 => message::<Response>(body),
        7 => message::<EvaluationReport>(body),
        8 => message::<BulkRequest>(body),
        _ => message::<BulkHeader>(body),
    }
}

fn message<T: Serialize + DeserializeOwned>(body: &[u8]) {
    let Ok(message) = control::decode::<T>(body) else { return };
    let again = control::encode(&message);
    let twice = control::decode::<T>(&again[4..]).map(|message| control::encode(&message));
    assert_eq!(twice.ok(), Some(again), "a message changes on the way");
    // What a peer says of itself is checked before it is used.
    if let Ok(Greeting::Welcome(welcome)) = control::decode(body) {
        let _ = welcome.run.validate().and_then(|()| welcome.run.validate_model(&welcome.model));
    }
}

/// Records, and whole journals of two segments.
pub fn journal(bytes: &[u8]) {
    if let Some((stamp, record)) = Stamp::split(bytes)
        && let Ok(record) = Record::decode(record)
    {
        let mut again = Vec::new();
        stamp.encode(&mut again);
        record.encode(&mut again);
        let again = Record::decode(&again[Stamp::BYTES..]).map(|record| {
            let mut twice = Vec::new();
            record.encode(&mut twice);
            twice
        });
        let mut once = Vec::new();
        record.encode(&mut once);
        assert_eq!(again.ok(), Some(once), "a record changes on the way");
    }
    let Some((&share, content)) = bytes.split_first() else { return };
    let (first, second) = content.split_at(content.len() * usize::from(share) / 255);
    let disk = Arc::new(MemoryDisk::new([
        ("journal-00000000000000000000", first),
        ("journal-00000000000000000002", second),
    ]));
    let journal = Journal::new(disk, RUN, SEGMENT_BYTES);
    let read = |journal: &Journal<MemoryDisk>| {
        let mut records = 0;
        let read = journal.read::<JournalError>(0, |_, _| {
            records += 1;
            Ok(())
        });
        read.map(|read| (read.next, records))
    };
    if let Ok(once) = read(&journal) {
        assert_eq!(read(&journal).ok(), Some(once), "a journal that was read is read again the same");
        assert!(journal.write_from(once.0).is_ok(), "a journal that was read can be gone on with");
    }
}

/// Checkpoints of a server's state, and workers' places.
pub fn state(bytes: &[u8]) {
    let _ = RestoredState::read(RUN, bytes, bytes.len() as u64);
    // The hash at the end would stop almost everything; a right one lets it through to what comes before.
    let mut hashed = bytes.to_vec();
    hashed.extend(RestoredState::hash(bytes));
    if let Ok(state) = RestoredState::read(RUN, &hashed[..], hashed.len() as u64) {
        assert!(state.image.theta.len() <= bytes.len());
    }
    let _ = sanderling_worker::storage::decode(bytes, [7; 32]);
    let mut summed = bytes.to_vec();
    summed.extend(sanderling_worker::storage::checksum(bytes).to_le_bytes());
    let _ = sanderling_worker::storage::decode(&summed, [7; 32]);
}

/// Texts and token files.
pub fn tokens(bytes: &[u8]) {
    let Ok(corpus) = Corpus::from_bytes(bytes) else { return };
    let vocabulary = corpus.vocabulary().len();
    let inside =
        |tokens: sanderling_common::tokens::Tokens| tokens.iter().all(|token| (token as usize) < vocabulary);
    assert!(inside(corpus.training()));
    assert!(inside(corpus.held_out(Split::Validation)) && inside(corpus.held_out(Split::Test)));
}

/// Directories of checkpoints: a `config.json`, a zero byte, and a `model.safetensors`.
pub fn checkpoint(bytes: &[u8]) {
    let Some(end) = bytes.iter().position(|&byte| byte == 0) else {
        return drop(parse_config(Path::new(CONFIG_FILE), bytes));
    };
    let (config, tensors) = (&bytes[..end], &bytes[end + 1..]);
    // Most configurations are none, and writing files takes long.
    if parse_config(Path::new(CONFIG_FILE), config).is_err() {
        return;
    }
    open(&[(CONFIG_FILE.to_owned(), config), (TENSORS_FILE.to_owned(), tensors)]);
}

/// The same in shards: a `config.json`, a zero byte, an index, a zero byte, and the shards, each after its length in four
/// bytes, the last as far as it goes.
pub fn shards(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |&byte| byte == 0);
    let (Some(config), Some(index), Some(mut rest)) = (parts.next(), parts.next(), parts.next()) else {
        return;
    };
    if parse_config(Path::new(CONFIG_FILE), config).is_err() {
        return;
    }
    let mut shards = Vec::new();
    while let Some((length, following)) = rest.split_first_chunk::<4>()
        && shards.len() < SHARDS_MAX
    {
        let length = (u32::from_le_bytes(*length) as usize).min(following.len());
        let (shard, following) = following.split_at(length);
        shards.push(shard);
        rest = following;
    }
    let count = shards.len();
    let name = |place: usize| format!("model-{:05}-of-{count:05}.safetensors", place + 1);
    let mut files: Vec<_> = shards.iter().enumerate().map(|(place, shard)| (name(place), *shard)).collect();
    files.extend([(CONFIG_FILE.to_owned(), config), (INDEX_FILE.to_owned(), index)]);
    open(&files);
}

/// Opens a checkpoint of these files.
fn open(files: &[(String, &[u8])]) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("the folder takes small files");
    }
    if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
        let loaded = checkpoint.load();
        let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(loaded.is_err() || checkpoint.layout().len() <= bytes);
    }
}

/// Files of who may take part.
pub fn passes(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("tokens.toml");
    if let Ok(passes) = Passes::parse(text, path) {
        let again = Passes::parse(&passes.to_toml(), path);
        assert_eq!(again.ok(), Some(passes), "a tokens file changes when it is written");
    }
}

/// Run files and join strings.
pub fn texts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(run) = config::parse(text).and_then(|run| run.resolve()) {
        let again = config::parse(&run.to_toml()).and_then(|run| run.resolve());
        assert_eq!(again.ok(), Some(run), "a resolved run resolves to another");
    }
    if let Ok(join) = text.parse::<JoinString>() {
        let again = join.reveal().parse::<JoinString>();
        assert_eq!(again.ok().map(|join| join.reveal()), Some(join.reveal()), "a join string changes");
    }
}
