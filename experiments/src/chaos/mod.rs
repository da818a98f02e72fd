//! A soak: a server and workers as processes, and somebody who kills them, `kill -9`, one after the other.
//!
//! What is left in the end is verified against the journal (`verify`): the model, the replicas, the sessions and the
//! stored answers of the server's last checkpoint are what the whole journal makes, bit for bit; no update was applied
//! twice and none left out; and the loss went down. The network can be a bad one (`relay`).

mod children;
mod processes;
mod verify;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rand_chacha::ChaCha12Rng;
use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::join::JoinString;
use sanderling_common::report::one_sentence;
use tokio::runtime::Runtime;
use tracing::info;

use crate::relay::{Conditions, Counts, Relay};
pub use children::{ServerArguments, WorkerArguments, join, serve};
use processes::{Place, Process, text, write_private};
pub use verify::{Acknowledged, Findings, verify};

/// The server is killed this often in a soak of any length.
pub const SERVER_KILLS: u32 = 24;

/// Of a soak that is too short for that, every so many seconds.
const SERVER_KILL_EVERY_MIN: Duration = Duration::from_secs(5);

/// On a bad network, the workers' ports change about this often,
const REBIND_EVERY: Duration = Duration::from_secs(2);

/// and everybody is cut off about this often,
const CUT_EVERY: Duration = Duration::from_secs(20);

/// for up to so long.
const CUT_MAX: Duration = Duration::from_secs(3);

/// How often the processes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What to do.
#[derive(Clone, Debug)]
pub struct Soak {
    /// How long.
    pub duration: Duration,
    /// Worker processes.
    pub workers: usize,
    /// Decides whom to kill when.
    pub seed: u64,
    /// A worker is killed about this often.
    pub kill_every: Duration,
    /// Where everything is put.
    pub folder: std::path::PathBuf,
    /// The run file.
    pub run: String,
    /// What the network is like; none: this machine's own.
    pub network: Option<Conditions>,
}

/// What came of it.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Seconds of the soak itself.
    pub seconds: f64,
    /// Servers that were killed.
    pub server_kills: u64,
    /// Workers that were killed.
    pub worker_kills: u64,
    /// Of those, workers that keep their place.
    pub place_kills: u64,
    /// Seconds from the start of each server's process until it was ready, the first one's first.
    pub ready_seconds: Vec<f64>,
    /// What the network did, where it was a bad one.
    pub network: Option<Counts>,
    /// What the journal and the last checkpoint say.
    pub findings: Findings,
    /// What did not hold, or kept the soak from its end.
    pub failure: Option<String>,
}

/// Lets everything run and kills, until the time is over or `is_stopped`; then verifies. `tell` is told of every kill.
///
/// # Errors
/// What did not hold, or could not be done.
pub fn soak(
    soak: &Soak,
    is_stopped: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&str),
) -> anyhow::Result<Report> {
    let mut scene = Scene::begin(soak, is_stopped)?;
    let held = scene.run(is_stopped, tell).and_then(|()| scene.end(is_stopped));
    scene.report.failure = held.as_ref().err().map(|error| one_sentence(error.as_ref()));
    let written = scene.write_report();
    // What did not hold is the more important of the two.
    held.and(written).map(|()| scene.report)
}

struct Scene<'a> {
    soak: &'a Soak,
    place: Place,
    network: Option<Network>,
    server: Process,
    workers: Vec<Process>,
    rng: ChaCha12Rng,
    started: Instant,
    /// The server's.
    pin: [u8; 32],
    /// What workers knew to be acknowledged when they were killed, and in the end.
    acknowledged: Vec<Acknowledged>,
    report: Report,
}

impl<'a> Scene<'a> {
    fn begin(soak: &'a Soak, is_stopped: &dyn Fn() -> bool) -> anyhow::Result<Self> {
        let place = Place { folder: soak.folder.clone() };
        std::fs::create_dir_all(&place.folder)
            .with_context(|| format!("cannot make {}", place.folder.display()))?;
        ensure!(
            !place.state().exists(),
            "there is a soak in {} already; name another folder with --out, or remove it",
            place.folder.display()
        );
        let settings = format!("[server]\nstate_dir = '{}'\n", text(&place.state())?);
        let runs = format!("[run]\nruns_dir = '{}'\n", text(&place.folder.join("runs"))?);
        let of_the_soak = sanderling_common::config::parse(&settings)?
            .or(sanderling_common::config::parse(&runs)?)
            .or(sanderling_common::config::parse(&soak.run)?);
        let run = of_the_soak.resolve()?;
        std::fs::write(place.run_file(), run.to_toml())
            .with_context(|| format!("cannot write {}", place.run_file().display()))?;
        let mut server = start_server(&place)?;
        let ready = server.ready(&place.join_file(), is_stopped)?;
        let pin = place.join()?.pin;
        let network =
            soak.network.map(|conditions| Network::begin(&place, conditions, soak.seed)).transpose()?;
        let workers = (0..soak.workers).map(|number| start_worker(&place, number));
        Ok(Self {
            workers: workers.collect::<Result<_, _>>()?,
            soak,
            network,
            server,
            rng: stream(soak.seed, Purpose::Simulation, 0),
            started: Instant::now(),
            pin,
            acknowledged: Vec::new(),
            report: Report { seed: soak.seed, ready_seconds: vec![ready.as_secs_f64()], ..Report::default() },
            place,
        })
    }

    fn run(&mut self, is_stopped: &dyn Fn() -> bool, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        let server_every = (self.soak.duration / (SERVER_KILLS + 1)).max(SERVER_KILL_EVERY_MIN);
        let (mut server_due, mut worker_due) = (server_every, self.soak.kill_every);
        while self.started.elapsed() < self.soak.duration && !is_stopped() {
            std::thread::sleep(LOOK_EVERY);
            self.nobody_gave_up()?;
            let elapsed = self.started.elapsed();
            if elapsed >= server_due {
                self.kill_server(is_stopped, tell)?;
                server_due += server_every;
            }
            if elapsed >= worker_due && !self.workers.is_empty() {
                self.kill_worker(tell)?;
                worker_due += self.soak.kill_every.mul_f64(0.5 + uniform(&mut self.rng));
            }
            if let Some(network) = &mut self.network {
                network.change(elapsed, &mut self.rng);
            }
        }
        self.report.seconds = self.started.elapsed().as_secs_f64();
        Ok(())
    }

    fn nobody_gave_up(&mut self) -> anyhow::Result<()> {
        let logs = self.place.folder.display();
        if let Some(status) = self.server.ended()? {
            anyhow::bail!("the server ended by itself ({status}); its log is in {logs}");
        }
        for (number, worker) in self.workers.iter_mut().enumerate() {
            if let Some(status) = worker.ended()? {
                anyhow::bail!("worker {number} ended by itself ({status}); its log is in {logs}");
            }
        }
        Ok(())
    }

    fn kill_server(
        &mut self,
        is_stopped: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        std::fs::remove_file(self.place.join_file()).context("cannot remove the join file")?;
        self.server.kill()?;
        self.server = start_server(&self.place)?;
        let ready = self.server.ready(&self.place.join_file(), is_stopped)?;
        self.report.server_kills += 1;
        self.report.ready_seconds.push(ready.as_secs_f64());
        let (count, seconds) = (self.report.server_kills, ready.as_secs_f64());
        tell(&format!("server killed ({count}), ready again after {seconds:.2} s"));
        Ok(())
    }

    fn kill_worker(&mut self, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        let number = (uniform(&mut self.rng) * self.workers.len() as f64) as usize;
        self.workers[number].kill()?;
        self.note_acknowledged(number)?;
        self.workers[number] = start_worker(&self.place, number)?;
        self.report.worker_kills += 1;
        self.report.place_kills += u64::from(keeps_place(number));
        let kept = if keeps_place(number) { ", which keeps its place" } else { "" };
        tell(&format!("worker {number} killed{kept}"));
        Ok(())
    }

    /// Of a worker that has ended.
    fn note_acknowledged(&mut self, number: usize) -> anyhow::Result<()> {
        if keeps_place(number) {
            self.acknowledged.extend(Acknowledged::of_place(&self.place.worker_state(number), self.pin)?);
        }
        Ok(())
    }

    fn end(&mut self, is_stopped: &dyn Fn() -> bool) -> anyhow::Result<()> {
        let status = self.server.end()?;
        ensure!(status.success(), "the server ended with {status}");
        // Without a server they would look for one for a long time.
        for worker in &mut self.workers {
            let status = worker.end()?;
            ensure!(status.success(), "a worker ended with {status}");
        }
        (0..self.workers.len()).try_for_each(|number| self.note_acknowledged(number))?;
        ensure!(!is_stopped(), "interrupted");
        self.report.network = self.network.as_ref().map(|network| network.relay.counts());
        info!("verifying against the whole journal");
        self.report.findings = verify(&self.place.state(), &self.acknowledged)?;
        Ok(())
    }

    fn write_report(&self) -> anyhow::Result<()> {
        let json = serde_json::to_vec_pretty(&self.report)?;
        let path = self.place.report();
        std::fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A bad network between the workers and the server.
struct Network {
    relay: Relay,
    next_rebind: Duration,
    next_cut: Duration,
    cut_until: Option<Duration>,
    /// The relay lives in it.
    _runtime: Runtime,
}

impl Network {
    fn begin(place: &Place, conditions: Conditions, seed: u64) -> anyhow::Result<Self> {
        let join = place.join()?;
        let server = SocketAddr::new(join.host.parse().context("the server is at an address")?, join.port);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let relay =
            runtime.block_on(Relay::start(server, conditions, seed)).context("cannot start the relay")?;
        let join = JoinString { port: relay.address().port(), ..join };
        write_private(&place.worker_join_file(), &join.reveal()).context("cannot write the join file")?;
        Ok(Self { relay, next_rebind: REBIND_EVERY, next_cut: CUT_EVERY, cut_until: None, _runtime: runtime })
    }

    /// Changes ports, and cuts everybody off for a while, when it is time to.
    fn change(&mut self, elapsed: Duration, rng: &mut ChaCha12Rng) {
        if elapsed >= self.next_rebind {
            self.relay.rebind();
            self.next_rebind += REBIND_EVERY.mul_f64(0.5 + uniform(rng));
        }
        if elapsed >= self.next_cut && self.cut_until.is_none() {
            self.relay.set(|link| link.is_cut = true);
            self.cut_until = Some(elapsed + CUT_MAX.mul_f64(uniform(rng)));
            self.next_cut += CUT_EVERY.mul_f64(0.5 + uniform(rng));
        }
        if self.cut_until.take_if(|until| elapsed >= *until).is_some() {
            self.relay.set(|link| link.is_cut = false);
        }
    }
}

/// Every other worker keeps its place on disk; the others begin new sessions.
fn keeps_place(worker: usize) -> bool {
    worker.is_multiple_of(2)
}

fn start_server(place: &Place) -> anyhow::Result<Process> {
    let (config, join) = (place.run_file(), place.join_file());
    let arguments = ["chaos-server", "--config", text(&config)?, "--join-file", text(&join)?];
    Process::start(&arguments, &place.log("server"))
}

fn start_worker(place: &Place, number: usize) -> anyhow::Result<Process> {
    let relayed = place.worker_join_file();
    let join = if relayed.exists() { relayed } else { place.join_file() };
    let state = place.worker_state(number);
    let mut arguments = vec!["chaos-worker", "--join-file", text(&join)?];
    if keeps_place(number) {
        arguments.extend(["--state-dir", text(&state)?]);
    }
    Process::start(&arguments, &place.log(&format!("worker-{number}")))
}
