//! The scheduler: what happens next, and what breaks.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use sanderling_common::ids::{BatchId, SessionId};
use sanderling_common::init::{Purpose, normal_pair, stream, uniform};
use sanderling_common::layout::Layout;
use sanderling_common::method::{Decay, Method, MethodSettings, RateScaling};
use sanderling_common::schedule::Schedule;
use sanderling_common::sparse::{Compression, ValueFormat};
use sanderling_server::core::{ServerSettings, WorkSettings};
use sanderling_worker::core::{WorkerCore, WorkerSettings};

use super::disk::{Damage, SimulatedDisk};
use super::messages::{Down, Up};
use super::oracle::Oracle;
use super::server::{ConnectionId, ServerProcess, StartError, Stream, Subject};
use super::worker::{Next, WorkerProcess};
use super::{Mutation, Tally, Violation};
use crate::due::Due;

/// Sizes of the tensors: small enough for thousands of trials, and of every kind of encoding.
const SIZES: [usize; 4] = [40, 1, 23, 9];

/// Virtual milliseconds. A message takes up to this long, now and then several times that.
const DELAY: f64 = 20.0;
const COMPUTATION: f64 = 30.0;
/// A worker gives its connection up after this long without an answer.
const TIMEOUT: f64 = 250.0;
/// A server learns of a connection that was cut.
const NOTICE: f64 = 400.0;
const LEASE: f64 = 1500.0;
const RESTART: f64 = 300.0;
const SYNC: f64 = 4.0;
const CHECKPOINT: f64 = 120.0;

/// A trial that is not over after so many events never will be: without faults it takes a few thousand.
const EVENTS_MAX: u64 = 400_000;

/// What may happen.
enum Event {
    ToServer(Stream, Up),
    ToWorker(usize, Stream, Down),
    /// A worker looks at what there is to do, unless something else came up.
    Act(usize, u64),
    Timeout(usize, u64),
    WorkerStarts(usize),
    ServerStarts,
    Land,
    Write,
    Sync,
    Checkpoint,
    Tidy,
    /// The server learns that a connection is gone.
    Noticed(ConnectionId),
    Expire(SessionId, Option<ConnectionId>),
    RoomAgain,
}

impl Event {
    fn name(&self) -> String {
        match self {
            Self::ToServer(Stream { connection, number }, up) => {
                format!("to the server over {connection}, {number}: {}", beginning(up))
            }
            Self::ToWorker(worker, Stream { connection, number }, down) => {
                format!("to worker {worker} over {connection}, {number}: {}", beginning(down))
            }
            Self::Act(worker, _) => format!("worker {worker} acts"),
            Self::Timeout(worker, _) => format!("worker {worker} has waited long enough"),
            Self::WorkerStarts(worker) => format!("worker {worker} starts"),
            Self::ServerStarts => "the server starts".to_owned(),
            Self::Land => "a push is answered".to_owned(),
            Self::Write => "the journal is written".to_owned(),
            Self::Sync => "the journal is synced".to_owned(),
            Self::Checkpoint => "a checkpoint".to_owned(),
            Self::Tidy => "what is superfluous is removed".to_owned(),
            Self::Noticed(connection) => format!("the server misses connection {connection}"),
            Self::Expire(session, _) => format!("the lease of {session} is over"),
            Self::RoomAgain => "the disk has room again".to_owned(),
        }
    }
}

/// What a message begins with.
fn beginning(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.chars().take(60).collect()
}

/// Probabilities per event, each zero in some trials.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    server_kill: f64,
    power_cut: f64,
    full_disk: f64,
    worker_kill: f64,
    torn_place: f64,
    cut: f64,
    repeat: f64,
    /// How much longer than usual messages may take.
    slowness: f64,
}

pub(super) struct World<'a> {
    seed: u64,
    rng: ChaCha12Rng,
    subject: Subject,
    rates: Rates,
    /// After so many events nothing breaks any more.
    faults_until: u64,
    disk: SimulatedDisk,
    server: Option<ServerProcess>,
    incarnations: u64,
    is_writing: bool,
    is_landing: bool,
    workers: Vec<WorkerProcess>,
    turns: Vec<u64>,
    connections: u64,
    streams: u64,
    /// When the last message of a connection arrives, to tell which overtake.
    arrivals: BTreeMap<(ConnectionId, bool), f64>,
    oracle: Oracle,
    time: f64,
    scheduled: u64,
    schedule: BinaryHeap<Reverse<Due<Event>>>,
    tally: Tally,
    trace: &'a mut dyn FnMut(&str),
}

impl<'a> World<'a> {
    pub(super) fn new(seed: u64, mutation: Option<Mutation>, trace: &'a mut dyn FnMut(&str)) -> Self {
        let mut rng = stream(seed, Purpose::Simulation, 0);
        let (subject, settings) = draw_subject(&mut rng, mutation);
        let mut or_none = |rate: f64| if uniform(&mut rng) < 0.3 { 0.0 } else { rate };
        let rates = Rates {
            server_kill: or_none(0.002),
            power_cut: or_none(0.002),
            full_disk: or_none(0.0005),
            worker_kill: or_none(0.002),
            torn_place: or_none(0.02),
            cut: or_none(0.01),
            repeat: or_none(0.05),
            slowness: or_none(5.0),
        };
        let faults_until = (500.0 + 3500.0 * uniform(&mut rng)) as u64;
        let count = pick(&mut rng, &[1, 2, 3, 5]);
        let keeps = pick(&mut rng, &[false, true]);
        let worker = |_| {
            let initial = if subject.settings.workers_have_initial { &subject.initial[..] } else { &[] };
            WorkerProcess::new(&subject.layout, &settings, initial, seed, keeps)
        };
        let disk = SimulatedDisk::new(stream(seed, Purpose::Simulation, 1));
        let mut world = Self {
            seed,
            rng,
            rates,
            faults_until,
            disk,
            server: None,
            incarnations: 0,
            is_writing: false,
            is_landing: false,
            workers: (0..count).map(worker).collect(),
            turns: vec![0; count],
            connections: 0,
            streams: 0,
            arrivals: BTreeMap::new(),
            oracle: Oracle::default(),
            time: 0.0,
            scheduled: 0,
            schedule: BinaryHeap::new(),
            tally: Tally::default(),
            trace,
            subject,
        };
        world.after(0.0, Event::ServerStarts);
        for worker in 0..count {
            world.after(worker as f64, Event::WorkerStarts(worker));
        }
        world
    }

    /// Lets everything happen.
    pub(super) fn run(mut self) -> Result<Tally, Violation> {
        let (seed, outcome) = (self.seed, self.go());
        let mut tally = self.tally;
        let done = outcome.and_then(|()| self.conclude());
        tally.steps = self.server.as_ref().map_or(0, |server| server.core.standing().step.0);
        done.map(|()| tally).map_err(|what| Violation { seed, events: tally.events, what })
    }

    fn go(&mut self) -> Result<(), String> {
        while !self.is_over() {
            let Some(Reverse(due)) = self.schedule.pop() else {
                return Err("nothing is left to happen, and the run is not over".to_owned());
            };
            self.time = due.time;
            self.tally.events += 1;
            if self.tally.events > EVENTS_MAX {
                return Err(format!("the run is not over after {EVENTS_MAX} events"));
            }
            (self.trace)(&format!("{:9.1} {}", self.time, due.what.name()));
            self.happen(due.what)?;
            if self.tally.events < self.faults_until {
                self.break_something()?;
            }
            self.pump();
            self.check()?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let finished = self.server.as_ref().is_some_and(|server| server.core.standing().finished);
        finished && self.workers.iter().all(|worker| worker.is_over)
    }

    /// What must be true at the end.
    fn conclude(&mut self) -> Result<(), String> {
        self.restart()?;
        let server = self.server.as_ref().expect("it was just started");
        self.oracle.check(&self.subject.layout, &self.subject.initial, &server.theta())?;
        let total = self.subject.settings.work.total_batches;
        let done = self.oracle.batches()?;
        if done.iter().copied().eq((0..total).map(BatchId)) {
            Ok(())
        } else {
            Err(format!("{} of {total} batches are done", done.len()))
        }
    }

    /// Whatever was decided by the end must be recovered too.
    fn restart(&mut self) -> Result<(), String> {
        self.disk.set_room(None);
        if let Some(server) = &mut self.server {
            server.write().and_then(|()| server.sync()).map_err(|error| error.to_string())?;
            self.oracle.synced_by(server);
        }
        self.disk.kill();
        self.server = None;
        self.start_server()
    }

    fn after(&mut self, delay: f64, event: Event) {
        self.scheduled += 1;
        self.schedule.push(Reverse(Due { time: self.time + delay, order: self.scheduled, what: event }));
    }

    fn happens(&mut self, probability: f64) -> bool {
        uniform(&mut self.rng) < probability
    }

    fn delay(&mut self) -> f64 {
        let usual = DELAY * uniform(&mut self.rng);
        if self.happens(0.1) { usual * (1.0 + self.rates.slowness) } else { usual }
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::ToServer(stream, up) => {
                if let Some(server) = &mut self.server {
                    server.handle(stream, up);
                }
            }
            Event::ToWorker(worker, stream, down) => self.hear(worker, stream, down)?,
            Event::Act(worker, turn) if self.turns[worker] == turn => self.act(worker),
            Event::Timeout(worker, turn) if self.turns[worker] == turn => self.reconnect(worker),
            Event::Act(..) | Event::Timeout(..) => {}
            Event::WorkerStarts(worker) => self.reconnect(worker),
            Event::ServerStarts => self.start_server()?,
            Event::Land => {
                self.is_landing = false;
                if let Some(server) = self.server.as_mut().filter(|server| server.flights() > 0) {
                    let flight = (uniform(&mut self.rng) * server.flights() as f64) as usize;
                    server.land(flight);
                }
            }
            Event::Write => self.write(),
            Event::Sync => self.sync(),
            Event::Checkpoint => self.checkpoint(),
            Event::Tidy => self.server.iter_mut().for_each(ServerProcess::tidy),
            Event::Noticed(connection) => {
                if let Some(session) = self.server.as_ref().and_then(|server| server.session_of(connection)) {
                    self.after(LEASE, Event::Expire(session, Some(connection)));
                }
            }
            Event::Expire(session, connection) => {
                if let Some(server) = &mut self.server {
                    let before = server.core.worker(session).is_some();
                    server.expire(session, connection);
                    self.tally.expired_sessions += u64::from(before && server.core.worker(session).is_none());
                }
            }
            Event::RoomAgain => self.disk.set_room(None),
        }
        Ok(())
    }

    /// Sees to it that the server goes on with what it has begun.
    fn pump(&mut self) {
        let Some(server) = &mut self.server else { return };
        let (told, is_idle, flights) = (server.told(), server.is_idle(), server.flights());
        self.tell(told);
        if flights > 0 && !self.is_landing {
            self.is_landing = true;
            let delay = 3.0 * uniform(&mut self.rng);
            self.after(delay, Event::Land);
        }
        if !is_idle && !self.is_writing {
            self.is_writing = true;
            self.after(1.0, Event::Write);
        }
    }

    fn write(&mut self) {
        let Some(server) = &mut self.server else { return };
        match server.write() {
            Ok(()) => self.after(SYNC, Event::Sync),
            Err(_) => self.full_disk(),
        }
    }

    fn sync(&mut self) {
        self.is_writing = false;
        let Some(server) = &mut self.server else { return };
        match server.sync() {
            Ok(told) => {
                self.oracle.synced_by(server);
                self.tell(told);
            }
            Err(_) => self.full_disk(),
        }
    }

    fn checkpoint(&mut self) {
        if self.server.as_mut().is_some_and(ServerProcess::checkpoint) {
            self.tally.checkpoints += 1;
            self.after(1.0, Event::Tidy);
        }
        let next = CHECKPOINT * uniform(&mut self.rng);
        self.after(next, Event::Checkpoint);
    }

    fn tell(&mut self, told: Vec<(Stream, Down)>) {
        for (stream, down) in told {
            // Whoever has moved on hears nothing more over it.
            let worker = self.workers.iter().position(|worker| worker.connection == Some(stream.connection));
            let Some(worker) = worker else {
                self.tally.lost_messages += 1;
                continue;
            };
            let again = self.happens(self.rates.repeat) && matches!(down, Down::Reply(_));
            for _ in 0..1 + u64::from(again) {
                let delay = self.arrival((stream.connection, false));
                self.after(delay, Event::ToWorker(worker, stream, down.clone()));
            }
            self.tally.repeated_messages += u64::from(again);
        }
    }

    fn say(&mut self, worker: usize, up: Up) {
        let connection = self.workers[worker].connection.expect("it speaks over a connection");
        self.streams += 1;
        let stream = Stream { connection, number: self.streams };
        self.workers[worker].awaited = Some(stream);
        let again =
            self.happens(self.rates.repeat) && matches!(up, Up::Push(..) | Up::Ask(_) | Up::Report(..));
        for _ in 0..1 + u64::from(again) {
            let delay = self.arrival((connection, true));
            self.after(delay, Event::ToServer(stream, up.clone()));
        }
        self.tally.repeated_messages += u64::from(again);
    }

    /// How long a message takes.
    fn arrival(&mut self, direction: (ConnectionId, bool)) -> f64 {
        let delay = self.delay();
        let last = self.arrivals.entry(direction).or_insert(0.0);
        self.tally.overtaking_messages += u64::from(self.time + delay < *last);
        *last = last.max(self.time + delay);
        delay
    }

    fn hear(&mut self, worker: usize, stream: Stream, down: Down) -> Result<(), String> {
        let process = &mut self.workers[worker];
        if process.awaited.take_if(|awaited| *awaited == stream).is_none() {
            self.tally.lost_messages += 1;
            return Ok(());
        }
        let answers = |core: &Option<WorkerCore>| core.as_ref().map_or(0, |core| core.counters().answers);
        let before = answers(&process.core);
        process.handle(down, &mut self.oracle)?;
        self.tally.answers += answers(&process.core).saturating_sub(before);
        if process.connection.is_none() {
            self.reconnect(worker);
        } else {
            self.act(worker);
        }
        Ok(())
    }

    fn act(&mut self, worker: usize) {
        self.turns[worker] += 1;
        let turn = self.turns[worker];
        match self.workers[worker].next() {
            Next::SayFirst(_) if self.may_break(self.rates.torn_place) => {
                self.tally.torn_places += 1;
                self.kill_worker(worker, true);
            }
            Next::Say(up) | Next::SayFirst(up) => {
                self.say(worker, up);
                self.after(TIMEOUT, Event::Timeout(worker, turn));
            }
            Next::Compute => {
                let duration = COMPUTATION * (0.5 + uniform(&mut self.rng));
                self.after(duration, Event::Act(worker, turn));
            }
            Next::Leave => {
                if let (Some(session), Some(_)) =
                    (self.workers[worker].session, self.workers[worker].connection)
                {
                    self.say(worker, Up::Goodbye(session));
                }
            }
        }
    }

    /// A worker hangs up, if it has not, and says hello over another connection.
    fn reconnect(&mut self, worker: usize) {
        self.hang_up(worker);
        self.connections += 1;
        self.workers[worker].connection = Some(self.connections);
        self.act(worker);
    }

    /// A worker's connection ends; the server learns of it later.
    fn hang_up(&mut self, worker: usize) {
        self.turns[worker] += 1;
        if let Some(connection) = self.workers[worker].connection {
            self.after(NOTICE, Event::Noticed(connection));
        }
        self.workers[worker].hang_up();
    }

    fn kill_worker(&mut self, worker: usize, torn: bool) {
        self.tally.worker_kills += 1;
        (self.trace)(&format!(
            "{:9.1} ! worker {worker} is killed{}",
            self.time,
            if torn { ", writing" } else { "" }
        ));
        self.hang_up(worker);
        self.workers[worker].crash(torn);
        let delay = RESTART * 8.0 * uniform(&mut self.rng);
        self.after(delay, Event::WorkerStarts(worker));
    }

    fn may_break(&mut self, probability: f64) -> bool {
        self.tally.events < self.faults_until && self.happens(probability)
    }

    fn break_something(&mut self) -> Result<(), String> {
        if self.server.is_some() && self.happens(self.rates.server_kill) {
            self.tally.server_kills += 1;
            (self.trace)(&format!("{:9.1} ! the server is killed", self.time));
            self.disk.kill();
            self.server_is_gone();
        }
        if self.server.is_some() && self.happens(self.rates.power_cut) {
            self.tally.power_cuts += 1;
            let Damage { torn, garbled, names } = self.disk.crash();
            (self.trace)(&format!(
                "{:9.1} ! a power cut: {torn} files torn, {garbled} garbled, {names} names",
                self.time
            ));
            self.tally.torn_files += torn;
            self.tally.garbled_files += garbled;
            self.tally.lost_names += names;
            self.server_is_gone();
        }
        if self.happens(self.rates.full_disk) {
            (self.trace)(&format!("{:9.1} ! the disk is about to be full", self.time));
            let room = (4000.0 * uniform(&mut self.rng)) as usize;
            self.disk.set_room(Some(room));
            self.after(RESTART * 4.0, Event::RoomAgain);
        }
        for worker in 0..self.workers.len() {
            let is_up = self.workers[worker].connection.is_some() && !self.workers[worker].is_over;
            if is_up && self.happens(self.rates.worker_kill) {
                self.kill_worker(worker, false);
            } else if is_up && self.happens(self.rates.cut) {
                self.tally.cuts += 1;
                (self.trace)(&format!("{:9.1} ! worker {worker} loses its connection", self.time));
                self.cut(worker);
            }
        }
        Ok(())
    }

    /// A connection breaks with everything on it, or with some of what the worker has said still arriving.
    fn cut(&mut self, worker: usize) {
        let connection = self.workers[worker].connection;
        let events = std::mem::take(&mut self.schedule).into_sorted_vec();
        for Reverse(due) in events.into_iter().rev() {
            let is_lost = match &due.what {
                Event::ToServer(over, _) => Some(over.connection) == connection && self.happens(0.5),
                _ => false,
            };
            self.tally.lost_messages += u64::from(is_lost);
            if !is_lost {
                self.schedule.push(Reverse(due));
            }
        }
        self.reconnect(worker);
    }

    /// The server's process has ended, however.
    fn server_is_gone(&mut self) {
        self.server = None;
        (self.is_writing, self.is_landing) = (false, false);
        let events = std::mem::take(&mut self.schedule).into_sorted_vec();
        let of_the_process = |event: &Event| {
            matches!(
                event,
                Event::Land
                    | Event::Write
                    | Event::Sync
                    | Event::Checkpoint
                    | Event::Tidy
                    | Event::Noticed(_)
                    | Event::Expire(..)
                    | Event::ToServer(..)
                    | Event::ServerStarts
            )
        };
        for Reverse(due) in events.into_iter().rev() {
            if !of_the_process(&due.what) {
                self.schedule.push(Reverse(due));
            }
        }
        let delay = RESTART * uniform(&mut self.rng);
        self.after(delay, Event::ServerStarts);
    }

    /// The journal cannot be written any more: the process ends.
    fn full_disk(&mut self) {
        self.tally.full_disks += 1;
        (self.trace)(&format!("{:9.1} ! the disk is full, and the server ends", self.time));
        self.disk.kill();
        self.server_is_gone();
    }

    fn start_server(&mut self) -> Result<(), String> {
        self.incarnations += 1;
        match ServerProcess::start(&self.subject, &self.disk, &mut self.oracle, self.incarnations) {
            Ok(server) => {
                self.tally.recoveries += 1;
                self.tally.from_checkpoint += u64::from(server.recovered_from > 0);
                self.oracle.check(&self.subject.layout, &self.subject.initial, &server.theta())?;
                for session in server.core.sessions() {
                    self.after(LEASE, Event::Expire(session, None));
                }
                self.server = Some(server);
                self.after(CHECKPOINT, Event::Checkpoint);
                Ok(())
            }
            Err(StartError::Disk) => {
                self.after(RESTART, Event::ServerStarts);
                Ok(())
            }
            Err(StartError::Lost(what)) => Err(format!("the server cannot go on: {what}")),
        }
    }

    /// What must be true all the time: a worker that waits for nothing has the model that the server knows of it.
    fn check(&self) -> Result<(), String> {
        let Some(server) = &self.server else { return Ok(()) };
        for (number, worker) in self.workers.iter().enumerate() {
            let Some(core) = worker.core.as_ref().filter(|core| core.pending().is_none()) else { continue };
            let Some(replica) = server.replica(core.session()) else { continue };
            let differs = replica.iter().zip(core.theta()).position(|(a, b)| a.to_bits() != b.to_bits());
            if let Some(at) = differs {
                return Err(format!(
                    "element {at} of worker {number}'s model is {}, and the server takes it for {}",
                    core.theta()[at],
                    replica[at]
                ));
            }
        }
        Ok(())
    }
}

fn pick<T: Copy>(rng: &mut ChaCha12Rng, from: &[T]) -> T {
    from[(uniform(rng) * from.len() as f64) as usize]
}

/// A run of some kind.
fn draw_subject(rng: &mut ChaCha12Rng, mutation: Option<Mutation>) -> (Subject, WorkerSettings) {
    let tensors = SIZES.iter().enumerate();
    let tensors = tensors.map(|(number, &size)| (format!("tensor {number}"), vec![size]));
    let layout = Arc::new(Layout::new(tensors).expect("the sizes are positive"));
    let initial = (0..layout.len()).map(|_| normal_pair(rng).0 as f32).collect();
    let total_batches = pick(rng, &[30, 60, 120]);
    let compression = |keep, format| Compression { keep, dense_below: 4, format };
    let formats = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8, ValueFormat::Sign];
    let down = pick(rng, &[None, Some(0.1), Some(0.5)]);
    let settings = ServerSettings {
        work: WorkSettings {
            total_batches,
            lease_batches: pick(rng, &[1, 3, 4]),
            eval_every: pick(rng, &[5, 20, 1000]),
            norm_limit: 1000.0,
        },
        secondary: down.map(|keep| compression(keep, pick(rng, &formats))),
        sessions_max: 1000,
        shards: pick(rng, &[1, 2, 3]),
        workers_have_initial: pick(rng, &[true, false]),
    };
    let method = pick(rng, &[Method::DgsAdam, Method::Dgs, Method::DgcAsync, Method::Asgd]);
    let worker = WorkerSettings {
        method: MethodSettings {
            method,
            momentum: 0.5,
            beta2: 0.9,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip_norm: pick(rng, &[0.0, 1.0]),
            compression: compression(pick(rng, &[0.05, 0.3]), pick(rng, &formats)),
        },
        schedule: Schedule {
            learning_rate: 0.01,
            rate_scaling: RateScaling::Constant,
            learning_rate_max: 0.01,
            local_rate: pick(rng, &[0.0, 0.03]),
            warmup_steps: 0,
            warmup_exchanges: 0,
            decay: Decay::Cosine,
            total_steps: total_batches,
            final_fraction: 1.0,
        },
        replica_check_every: pick(rng, &[0, 1, 5]),
    };
    let segment_bytes = pick(rng, &[500, 5_000, 1 << 20]);
    (Subject { layout, initial, settings, segment_bytes, mutation }, worker)
}
