//! The driver around the worker's core: finds the server, says hello, and keeps exchanging until the run is over.
//!
//! One task drives one worker. Gradients are computed on tokio's blocking threads, so heartbeats and transfers go on
//! whatever the model is doing.

mod bulk;
mod connection;
mod member;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sanderling_common::config::ConfigError;
use sanderling_common::corpus::CorpusError;
use sanderling_common::ids::WorkerId;
use sanderling_common::join::JoinString;
use sanderling_common::model_config::ModelConfigError;
use sanderling_common::upcycle::UpcycleError;
use sanderling_common::wire::control::Welcome;
use sanderling_transport::{ClientIdentity, EndpointError};
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use crate::core::Diverged;
pub use crate::site::StandIn;
use crate::site::{Host, Place, Site};
use crate::storage::StateError;
use connection::{Link, Reception};
use member::{Member, Shelf};

/// The first wait after a lost connection; doubled each time.
const BACKOFF_FIRST: Duration = Duration::from_millis(250);

/// The longest wait between two tries.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Sessions in a row that diverge before their first exchange is answered, after which a worker gives up: the model of
/// the run is what diverged then, not what this worker had accumulated.
const DIVERGED_SESSIONS_MAX: u32 = 3;

/// A server gets at least this long to answer the first packets, also when the worker is about to give up.
const PATIENCE_MIN: Duration = Duration::from_millis(500);

/// A worker gives up after this long without a server by default.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(600);

/// How a worker works, apart from what the server tells it.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Gives up when no server took it in for this long.
    pub give_up_after: Duration,
    /// Gradients computed at a time by all workers that share it; `None` leaves that to the system. In one process
    /// with more workers than cores it keeps each computation at full speed instead of slicing them all.
    pub compute_permits: Option<Arc<Semaphore>>,
    /// The dense checkpoint of a run that upcycles one, if it is on this machine; without it, or if it is another one,
    /// the place that the run names is looked at, and then it is fetched from the server.
    pub dense: Option<PathBuf>,
    /// The client certificate to present to a server that admits workers by one.
    pub identity: Option<Arc<ClientIdentity>>,
    /// Where the worker computes, and keeps its model and what it accumulates.
    pub place: Place,
    /// What computes in place of the engine that a run describes on the CPU; for measurements, which know what a step costs.
    pub stand_in: Option<StandIn>,
    /// A folder in which the worker keeps what another process needs to go on in its session, before every push: 4 bytes
    /// per parameter for the model and for each vector of the method.
    pub state_dir: Option<PathBuf>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            give_up_after: GIVE_UP_AFTER,
            compute_permits: None,
            dense: None,
            identity: None,
            place: Place::Cpu,
            stand_in: None,
            state_dir: None,
        }
    }
}

/// What a worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerReport {
    /// Its last number.
    pub worker: Option<WorkerId>,
    /// Exchanges answered.
    pub exchanges: u64,
    /// Gradients that were not finite.
    pub skipped: u64,
    /// Connections lost and found again.
    pub reconnects: u64,
    /// Sessions begun; more than one when the server had forgotten the worker.
    pub sessions: u64,
    /// Whether it was told to stop before the run was over.
    pub stopped: bool,
}

/// Why a worker cannot work.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No socket, or no TLS.
    #[error(transparent)]
    Endpoint(EndpointError),
    /// The server is not the one of the join string, or speaks another version.
    #[error("the server cannot be joined: {0}")]
    Handshake(String),
    /// The server does not accept the token.
    #[error("the server refused the token; it is the last part of the join string that the server printed")]
    WrongToken,
    /// The server wants a token, and the join string has none.
    #[error(
        "the server asks for a token, and the join string has none; copy the whole line that the server printed, or put the \
         worker's own token behind it as &token=…"
    )]
    NoToken,
    /// The server has taken back what it admitted this worker by.
    #[error("this worker may not take part any more: {0}")]
    Revoked(String),
    /// The server does not want this worker.
    #[error("the server does not admit this worker: {0}")]
    NotAdmitted(String),
    /// The two programs derive different layouts from the same configuration.
    #[error("server and worker disagree about the model's layout; use the same release on both sides")]
    LayoutMismatch,
    /// The server sent a configuration that this worker refuses.
    #[error("the server's configuration cannot be used: {0}")]
    Config(#[from] ConfigError),
    /// Its model cannot be built.
    #[error("the server's model cannot be built: {0}")]
    Model(#[from] ModelConfigError),
    /// The dense model of the run cannot be upcycled.
    #[error("the server's dense model cannot be upcycled: {0}")]
    Upcycle(#[from] UpcycleError),
    /// The two programs make different models of the same seed, or of the same dense model.
    #[error("server and worker make different initial models; use the same release on both sides")]
    InitialMismatch,
    /// Its text cannot be used.
    #[error("the server's text cannot be used: {0}")]
    Corpus(#[from] CorpusError),
    /// No server for too long.
    #[error("gave up after {seconds} s without a server ({address}): {reason}")]
    GaveUp {
        /// How long it was tried.
        seconds: u64,
        /// What was tried.
        address: String,
        /// The last reason.
        reason: String,
    },
    /// Whatever this worker computes is too large.
    #[error("the training diverged; lower learning_rate ({0})")]
    Diverged(Diverged),
    /// Its state cannot be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// The run cannot be computed.
    #[error("the gradient cannot be computed: {0}")]
    Compute(#[from] crate::model::ModelError),
}

/// Why a connection came to its end.
#[derive(Debug)]
enum Lost {
    /// The run is over.
    Finished,
    /// Worth another try.
    ForNow(String),
    /// The session is void: another try begins a new one.
    Session(String),
    /// As [`Session`](Self::Session), for a reason that another session may have as well.
    Diverged(Diverged),
    /// No other try will do.
    ForGood(Box<WorkerError>),
}

impl From<WorkerError> for Lost {
    fn from(error: WorkerError) -> Self {
        Self::ForGood(Box::new(error))
    }
}

/// Works for the server of the join string until the run is over, `stop` becomes true, or no server was reached for
/// too long.
///
/// # Errors
/// A [`WorkerError`]; lost connections are not among them.
pub async fn work(
    join: &JoinString,
    options: &WorkerOptions,
    stop: watch::Receiver<bool>,
) -> Result<WorkerReport, WorkerError> {
    match &options.place {
        Place::Cpu => {
            let host = Host { stand_in: options.stand_in.clone() };
            work_at(&Arc::new(host), join, options, stop).await
        }
        Place::Gpu(gpu) => work_at(gpu, join, options, stop).await,
    }
}

/// As [`work`], at this site.
async fn work_at<S: Site>(
    site: &Arc<S>,
    join: &JoinString,
    options: &WorkerOptions,
    mut stop: watch::Receiver<bool>,
) -> Result<WorkerReport, WorkerError> {
    let mut report = WorkerReport::default();
    let mut member: Option<Member<S>> = None;
    let mut shelf = Shelf::open(options.state_dir.as_deref(), join.pin)?;
    let mut backoff = BACKOFF_FIRST;
    let mut last_contact = Instant::now();
    let mut diverged_sessions = 0;
    loop {
        let exchanges_before = report.exchanges;
        let state = (&mut member, &mut shelf, &mut last_contact);
        let outcome = connected((join, site), options, state, &mut report, &stop).await;
        if report.exchanges > exchanges_before {
            (backoff, diverged_sessions) = (BACKOFF_FIRST, 0);
        }
        let reason = match outcome {
            Ok(()) => {
                report.stopped = *stop.borrow();
                shelf.forget_session()?;
                return Ok(report);
            }
            Err(Lost::Finished) => {
                shelf.forget_session()?;
                return Ok(report);
            }
            Err(Lost::ForGood(error)) => return Err(*error),
            Err(Lost::ForNow(reason)) => reason,
            Err(Lost::Session(reason)) => {
                member = None;
                shelf.forget_session()?;
                reason
            }
            Err(Lost::Diverged(diverged)) => {
                member = None;
                shelf.forget_session()?;
                diverged_sessions += 1;
                if diverged_sessions >= DIVERGED_SESSIONS_MAX {
                    return Err(WorkerError::Diverged(diverged));
                }
                diverged.to_string()
            }
        };
        let waited = last_contact.elapsed();
        let left = options.give_up_after.saturating_sub(waited);
        if left.is_zero() {
            return Err(WorkerError::GaveUp { seconds: waited.as_secs(), address: join.to_string(), reason });
        }
        let pause = backoff.min(left);
        // What a stop cut short is nothing to warn of.
        if !*stop.borrow() {
            warn!("no exchange with {}:{} ({reason}); trying again in {pause:?}", join.host, join.port);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => {
                report.stopped = true;
                return Ok(report);
            }
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        report.reconnects += 1;
    }
}

/// Works over one connection. Returns when told to stop.
async fn connected<S: Site>(
    (join, site): (&JoinString, &Arc<S>),
    options: &WorkerOptions,
    (slot, shelf, last_contact): (&mut Option<Member<S>>, &mut Shelf, &mut Instant),
    report: &mut WorkerReport,
    stop: &watch::Receiver<bool>,
) -> Result<(), Lost> {
    let resume = slot.as_ref().map(Member::session).or(shelf.session());
    // Not so little that no server could answer in it.
    let patience = options.give_up_after.saturating_sub(last_contact.elapsed()).max(PATIENCE_MIN);
    let mut stopped = stop.clone();
    let reception = tokio::select! {
        reception = Link::open(join, options, resume, (report.reconnects, patience)) => reception?,
        _ = stopped.wait_for(|stop| *stop) => return Ok(()),
    };
    let (mut link, welcome) = match reception {
        Reception::Welcome(link, welcome) => (link, welcome),
        Reception::Finished => return Err(Lost::Finished),
    };
    let exchanges_before = report.exchanges;
    let outcome = taken_in((&mut link, site), &welcome, options, (slot, shelf), report, stop).await;
    // A server that has no room gives no sign of life, nor does one whose sessions are of no use.
    if report.exchanges > exchanges_before || matches!(outcome, Err(Lost::ForNow(_))) {
        *last_contact = Instant::now();
    }
    if matches!(outcome, Ok(()) | Err(Lost::Finished | Lost::Session(_) | Lost::Diverged(_))) {
        // Whatever the session holds goes back at once instead of when its lease runs out.
        link.goodbye().await;
    }
    outcome
}

/// Works for a server that has said welcome.
async fn taken_in<S: Site>(
    (link, site): (&mut Link, &Arc<S>),
    welcome: &Welcome,
    options: &WorkerOptions,
    (slot, shelf): (&mut Option<Member<S>>, &mut Shelf),
    report: &mut WorkerReport,
    stop: &watch::Receiver<bool>,
) -> Result<(), Lost> {
    report.worker = Some(welcome.worker);
    if !welcome.resumed {
        *slot = None;
        shelf.forget_session().map_err(WorkerError::State)?;
    }
    let member = match slot {
        Some(member) => member,
        None => slot.insert(Member::prepare((link, site), welcome, options, shelf).await?),
    };
    if let Some(past) = shelf.take_past() {
        member.restore(past)?;
    }
    match link.confirm(member.ready()).await? {
        Some(step) if !member.has_begun() => {
            report.sessions += u64::from(!member.awaits_base());
            member.await_base(step);
            info!("{} begins at {step}", welcome.worker);
        }
        None if !member.has_begun() => {
            return Err(Lost::Session("the server resumes a session that has not begun".to_owned()));
        }
        _ => info!("{} resumes its session", welcome.worker),
    }
    let mut stopped = stop.clone();
    tokio::select! {
        fetched = member.fetch_base(link) => fetched?,
        _ = stopped.wait_for(|stop| *stop) => return Ok(()),
    }
    member.exchange_until_stopped(link, options, report, stop).await
}
