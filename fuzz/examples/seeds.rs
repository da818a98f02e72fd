//! Writes an input or more of every kind into `corpus/`, for the fuzzer to begin with.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use sanderling_common::checkpoint::{
    CONFIG_FILE, FlatParameters, INDEX_FILE, TENSORS_FILE, WriteOptions, save, write,
};
use sanderling_common::config::RunConfig;
use sanderling_common::ids::{BatchId, Seq, SessionId, Step, WorkerId};
use sanderling_common::init::initial_parameters;
use sanderling_common::join::{JoinString, hex};
use sanderling_common::model_config::ModelConfig;
use sanderling_common::sparse::{Compression, Compressor, ValueFormat, join_aside};
use sanderling_common::tokens::TokenSink;
use sanderling_common::wire::control::{
    BulkHeader, BulkObject, BulkRequest, EvaluationReport, Goodbye, Greeting, Hello, Initial, Ready, Request,
    Response, Start, Welcome, encode,
};
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Answer, BatchRange, EvaluationJob, Push, Refusal, Split, Work};
use sanderling_fuzz::memory::MemoryDisk;
use sanderling_fuzz::{RUN, layout};
use sanderling_server::admission::Passes;
use sanderling_server::core::{Note, Record, SerialServer, ServerSettings};
use sanderling_server::recorder::Books;
use sanderling_server::storage::{Disk, Journal, SEGMENT_BYTES, Stamp, StateCheckpoint};
use sanderling_worker::core::{WorkerCore, WorkerSettings};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome {
    payloads()?;
    frames()?;
    control()?;
    journals()?;
    states()?;
    tokens()?;
    checkpoints()?;
    shards()?;
    passes()?;
    texts()
}

fn keep(target: &str, name: &str, bytes: &[u8]) -> Outcome {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    Ok(std::fs::write(folder.join(format!("seed-{name}")), bytes)?)
}

fn run() -> Outcome<RunConfig> {
    let settings = "[run]\nworkers = 2\n[model]\nhidden_size = 8\nlayers = 1\nheads = 2\nkv_heads = 1\n\
                    intermediate_size = 8\nexperts = 2\ncontext = 8\n[training]\nsteps = 9\n";
    Ok(sanderling_common::config::parse(settings)?.resolve()?)
}

fn payload(format: ValueFormat, keep: f64) -> Outcome<Vec<u8>> {
    let layout = layout();
    let values: Vec<f32> =
        (0..layout.len()).map(|place| ((place * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let mut payload = Vec::new();
    let mut compressor = Compressor::new(Compression { keep, dense_below: 10, format });
    compressor.compress(layout, 0..layout.tensors().len(), &values, &mut payload)?;
    Ok(payload)
}

fn payloads() -> Outcome {
    for (name, format) in [
        ("f32", ValueFormat::F32),
        ("bf16", ValueFormat::Bf16),
        ("int8", ValueFormat::Int8),
        ("sign", ValueFormat::Sign),
    ] {
        for (share, kept) in [("sparse", 0.01), ("dense", 1.0)] {
            keep("payload", &format!("{name}-{share}"), &payload(format, kept)?)?;
        }
    }
    let (first, second) = (payload(ValueFormat::Int8, 0.05)?, payload(ValueFormat::Int8, 0.1)?);
    keep("payload", "aside", &join_aside(&first, &second))
}

fn push(seq: u64, skipped: bool) -> Outcome<Push> {
    Ok(Push {
        session: SessionId(9),
        seq: Seq(seq),
        batch: BatchId(seq - 1),
        step: Step(0),
        loss: 2.5,
        tokens: 64,
        dropped: 0.25,
        known_staleness: 1,
        skipped,
        replica_hash: (!skipped).then_some([3; 32]),
        payload: if skipped { Vec::new() } else { payload(ValueFormat::Int8, 0.01)? },
    })
}

fn frames() -> Outcome {
    for skipped in [false, true] {
        let mut bytes = Vec::new();
        push(4, skipped)?.encode(&mut bytes);
        keep("frames", if skipped { "skipped" } else { "push" }, &bytes)?;
    }
    let work = Work {
        batches: Some(BatchRange { first: BatchId(8), count: 4 }),
        evaluation: Some(EvaluationJob { id: 1, step: Step(5), split: Split::Test }),
        finished: false,
    };
    let payload = payload(ValueFormat::Bf16, 0.02)?;
    let answer = Answer { seq: Seq(4), step: Step(7), staleness: 2, work, payload };
    for (name, reply) in [("answer", Reply::Answer(answer)), ("refusal", Reply::Refused(Refusal::BadPayload))]
    {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        keep("frames", name, &bytes)?;
    }
    keep("frames", "nothing", &[])
}

fn report() -> EvaluationReport {
    let job = EvaluationJob { id: 3, step: Step(12), split: Split::Validation };
    let (expert_share, router_entropy) = (vec![vec![0.25, 0.75]], vec![0.5]);
    EvaluationReport { job, loss: 1.5, tokens: 99, expert_share, router_entropy }
}

fn control() -> Outcome {
    let run = run()?;
    let model = run.model_config(65);
    let welcome = Welcome {
        worker: WorkerId(2),
        session: SessionId(9),
        resumed: true,
        text_sha256: [1; 32],
        initial: Initial::Seeded { sha256: [2; 32] },
        layout_hash: model.layout()?.hash(),
        model,
        run,
    };
    let hello = Hello { token: "t".repeat(32), resume: Some(SessionId(9)), software: "worker 1".to_owned() };
    let request = BulkRequest { session: SessionId(9), object: BulkObject::Base, offset: 5 };
    let messages = [
        ("hello", encode(&hello)),
        ("welcome", encode(&Greeting::Welcome(Box::new(welcome.clone())))),
        ("ready", encode(&Ready { layout_hash: welcome.layout_hash, initial_sha256: Some([2; 32]) })),
        ("start", encode(&Start::Fetch { step: Step(4) })),
        ("goodbye", encode(&Goodbye)),
        ("request", encode(&Request::Evaluated(SessionId(9), Box::new(report())))),
        ("response", encode(&Response::Work(Work::default()))),
        ("report", encode(&report())),
        ("bulk", encode(&request)),
        ("header", encode(&BulkHeader::NotFound)),
    ];
    for (kind, (name, frame)) in messages.iter().enumerate() {
        keep("control", name, &[&[kind as u8], &frame[4..]].concat())?;
    }
    Ok(())
}

fn journals() -> Outcome {
    let records = [
        Record::Noted(std::borrow::Cow::Owned(Note::Opened(SessionId(9)))),
        Record::Pushed(std::borrow::Cow::Owned(push(1, true)?)),
        Record::Noted(std::borrow::Cow::Owned(Note::Answered(SessionId(9), Seq(1)))),
        Record::Noted(std::borrow::Cow::Owned(Note::Reported(SessionId(9), Box::new(report())))),
    ];
    let body = |record: &Record<'_>| {
        let mut body = Vec::new();
        Stamp { seconds: 1.5, bytes_up: 10, bytes_down: 20 }.encode(&mut body);
        record.encode(&mut body);
        body
    };
    for (number, record) in records.iter().enumerate() {
        keep("journal", &format!("record-{number}"), &body(record))?;
    }
    let disk = Arc::new(MemoryDisk::new([]));
    let journal = Journal::new(disk.clone(), RUN, SEGMENT_BYTES);
    for (first, records) in [(0, &records[..2]), (2, &records[2..])] {
        let mut writer = journal.write_from(first)?;
        records.iter().try_for_each(|record| writer.append(&body(record)).map(drop))?;
        writer.sync()?;
    }
    let segments =
        ["journal-00000000000000000000", "journal-00000000000000000002"].map(|name| disk.read(name));
    let [first, second] = segments;
    let (first, second) = (first?, second?);
    // The first byte tells where the second segment begins, in parts of 255.
    let length = first.len() + second.len();
    let share = (0..=255_u8).find(|share| length * usize::from(*share) / 255 >= first.len()).unwrap_or(255);
    keep("journal", "segments", &[&[share][..], &first, &second].concat())?;
    keep("journal", "segment", &[&[255][..], &first].concat())
}

fn states() -> Outcome {
    let run = run()?;
    let model = run.model_config(65);
    let layout = Arc::new(model.layout()?);
    let initial = initial_parameters(&model, 1)?;
    let mut server = SerialServer::new(&layout, &initial, &ServerSettings::from(&run));
    let write = |server: &mut SerialServer, name: &str| -> Outcome {
        let image = server.image(BTreeMap::new()).ok_or("nothing is under way")?;
        let mut bytes = Vec::new();
        let (stamp, books) = (Stamp::default(), Books::default());
        StateCheckpoint { position: 3, stamp, books, image }.write(RUN, &mut bytes)?;
        keep("state", name, &bytes)?;
        // Without its hash, which the target adds.
        keep("state", &format!("{name}-unhashed"), &bytes[..bytes.len() - 32])
    };
    write(&mut server, "empty")?;
    let session = SessionId(9);
    let (_, step, base) = server.open_session(session)?;
    let base = base.onto(&layout, initial)?;
    let mut worker = WorkerCore::new(layout.clone(), &WorkerSettings::from(&run), session, base, step);
    worker.add_work(&server.core().work(session).ok_or("the session exists")?)?;
    worker.view();
    let batch = worker.next_batch().ok_or("there is work")?;
    let push = worker.handle_gradient(batch, &vec![0.5; layout.len()], 1.0, 0.0, 8, 0)?.clone();
    server.handle_push(&push)?;
    write(&mut server, "answered")?;
    let folder = tempfile::tempdir()?;
    let image = worker.image()?.ok_or("a push is pending")?;
    sanderling_worker::storage::StateFolder::open(folder.path(), [7; 32])?.keep(&image)?;
    let bytes = std::fs::read(folder.path().join("push-1"))?;
    keep("state", "worker", &bytes)?;
    keep("state", "worker-unsummed", &bytes[..bytes.len() - 4])
}

fn tokens() -> Outcome {
    keep("tokens", "text", "To be, or not to be: that is the question. ".repeat(20).as_bytes())?;
    keep("tokens", "bytes", &(0..=255).collect::<Vec<u8>>().repeat(4))?;
    for (name, size, tokenizer) in
        [("narrow", 300, None), ("wide", 70_000, None), ("tokenizer", 300, Some(&b"{}"[..]))]
    {
        let mut sink = TokenSink::new(Cursor::new(Vec::new()), size)?;
        sink.push(&(0..250).collect::<Vec<u32>>())?;
        keep("tokens", name, sink.finish(tokenizer)?.get_ref())?;
    }
    Ok(())
}

fn checkpoints() -> Outcome {
    let run = run()?;
    let moe = run.model_config(65);
    let dense =
        ModelConfig { feed_forward: sanderling_common::model_config::FeedForward::Dense, ..moe.clone() };
    for (name, model) in [("moe", moe), ("dense", dense)] {
        let folder = tempfile::tempdir()?;
        let folder = folder.path().join("model");
        save(&folder, &model, &initial_parameters(&model, 1)?, &[])?;
        let (config, tensors) =
            (std::fs::read(folder.join(CONFIG_FILE))?, std::fs::read(folder.join(TENSORS_FILE))?);
        keep("checkpoint", &format!("{name}-config"), &config)?;
        keep("checkpoint", name, &[&config[..], &[0], &tensors].concat())?;
        keep(
            "checkpoint",
            &format!("{name}-cut"),
            &[&config[..], &[0], &tensors[..tensors.len() / 2]].concat(),
        )?;
    }
    Ok(())
}

fn shards() -> Outcome {
    let model = run()?.model_config(65);
    let (layout, values) = (model.layout()?, initial_parameters(&model, 1)?);
    let source = FlatParameters { layout: &layout, values: &values };
    for (name, shard_bytes_max) in
        [("few", 4 * layout.len() as u64 / 2), ("many", 4 * layout.len() as u64 / 5)]
    {
        let folder = tempfile::tempdir()?;
        let folder = folder.path().join("model");
        let options = WriteOptions { shard_bytes_max, ..WriteOptions::default() };
        write(&folder, &model, &options, &source, &mut |_| ControlFlow::Continue(()))?;
        let (config, index) =
            (std::fs::read(folder.join(CONFIG_FILE))?, std::fs::read(folder.join(INDEX_FILE))?);
        let mut names: Vec<_> =
            std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Outcome<_>>()?;
        names.retain(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
        names.sort();
        let mut bytes = [&config[..], &[0], &index, &[0]].concat();
        for shard in names {
            let shard = std::fs::read(shard)?;
            bytes.extend_from_slice(&u32::try_from(shard.len())?.to_le_bytes());
            bytes.extend_from_slice(&shard);
        }
        keep("shards", name, &bytes)?;
        keep("shards", &format!("{name}-cut"), &bytes[..bytes.len() - 100])?;
        if name == "few" {
            let elsewhere = String::from_utf8(index)?.replace("model-00001", "../model-00001");
            let escaping = [&config[..], &[0], elsewhere.as_bytes(), &[0]].concat();
            keep("shards", "elsewhere", &escaping)?;
        }
    }
    Ok(())
}

fn passes() -> Outcome {
    let mut passes = Passes::default();
    keep("passes", "nobody", passes.to_toml().as_bytes())?;
    passes.add(&"node-1".parse()?, &"the-first-token".parse()?)?;
    passes.add(&"gpu.example.org".parse()?, &"the-second-token".parse()?)?;
    keep("passes", "tokens", passes.to_toml().as_bytes())?;
    passes.revoke_certificate(&"node-3".parse()?);
    keep("passes", "both", passes.to_toml().as_bytes())?;
    passes.add(&"node-9".parse()?, &"the-first-token".parse()?)?;
    keep("passes", "same-token-twice", passes.to_toml().as_bytes())?;
    keep("passes", "unknown", b"tokenz = 1\n")?;
    keep("passes", "digest", b"[tokens]\nnode-1 = \"+12\"\n")
}

fn texts() -> Outcome {
    keep("texts", "default", RunConfig::default().to_toml().as_bytes())?;
    keep("texts", "small", run()?.to_toml().as_bytes())?;
    keep("texts", "unknown", b"[model]\nlayer = 2\n")?;
    let token = Some("a".repeat(32).parse()?);
    let join = |host: &str| JoinString { host: host.to_owned(), port: 4433, pin: [5; 32], token };
    let join = join("192.0.2.7").reveal();
    keep("texts", "join", join.as_bytes())?;
    keep("texts", "join-v6", join.replace("192.0.2.7", "[2001:db8::1]").as_bytes())?;
    keep("texts", "pin", hex(&[5; 32]).as_bytes())
}
