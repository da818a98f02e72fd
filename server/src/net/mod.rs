//! The driver around the server's core: accepts workers over QUIC and writes down what the run leaves behind.

mod admission;
mod bulk;
mod connection;
mod durable;
mod hub;
mod limits;
mod pace;
mod pipeline;
mod rate;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Endpoint, VarInt};
use sanderling_common::config::{ConfigError, Durability, RunConfig};
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::Step;
use sanderling_common::init::parameters_hash;
use sanderling_common::join::{JoinString, Token, hex};
use sanderling_common::model_config::{ModelConfig, ModelConfigError};
use sanderling_common::origin::{Origin, OriginError};
use sanderling_common::report::one_sentence;
use sanderling_transport::{Certificate, CloseCode, EndpointError, TlsError, secure_random, server_endpoint};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use crate::core::ImageError;
use crate::progress::Progress;
use crate::results::{Evaluation, ResultsError, RunFolder, Summary};
use crate::storage::{
    Directory, Disk, Identity, JournalError, JournalFailed, RunId, StateError, StateFolder, StoreError,
};
use admission::Admission;
pub use admission::AdmissionError;
use durable::{Beginnings, Subject};
use hub::{Hub, NOTICE_EVERY, idle};
pub use limits::MemoryExceeded;
use limits::{CONNECTIONS_PER_SESSION, Pinned, STRANGERS_MAX, megabytes};
use rate::HandshakeRate;

/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(150);

/// That handshakes are refused is said this often at most.
const REFUSALS_TOLD_EVERY: Duration = Duration::from_secs(10);

/// Workers that were told that the run is over may take this long to say goodbye.
const GOODBYES_WAIT: Duration = Duration::from_secs(3);

/// After an early stop, the final evaluation may take this long.
const FINAL_EVALUATION_WAIT: Duration = Duration::from_secs(15);

/// Why a run cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// `listen` is no address.
    #[error("cannot listen on {0:?}: give an address and a port, such as 0.0.0.0:4433")]
    Listen(String),
    /// The address is taken or not allowed.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody could be admitted as the settings say.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// Those who take part could make the server hold too much.
    #[error(transparent)]
    Memory(#[from] MemoryExceeded),
    /// The model cannot be built.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
    /// What the run starts from, or trains on, cannot be used.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// Settings that do not go together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state folder cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The token in the state folder is none.
    #[error("the token in the state folder is damaged; give it with --token")]
    Token,
    /// The journal cannot be read, or begun.
    #[error("the journal cannot be used: {0}")]
    Journal(#[from] JournalError),
    /// The journal cannot be written any more.
    #[error(transparent)]
    JournalFailed(#[from] JournalFailed),
    /// Checkpoints of the state cannot be kept, or looked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A checkpoint that does not belong to the run.
    #[error("the checkpoint of record {position} does not belong to this run: {source}")]
    Checkpoint {
        /// Its position.
        position: u64,
        /// What is wrong with it.
        source: ImageError,
    },
    /// A record of the journal does not follow from those before it.
    #[error(
        "record {position} of the journal is of no use ({what}): it is damaged, or this program has changed"
    )]
    Record {
        /// Its position.
        position: u64,
        /// What is wrong with it.
        what: String,
    },
    /// Results cannot be written.
    #[error(transparent)]
    Results(#[from] ResultsError),
    /// The system gave no local address.
    #[error("cannot tell the address listened on: {0}")]
    Address(#[from] std::io::Error),
}

/// What a finished run leaves behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The closing figures, also in `summary.json`.
    pub summary: Summary,
    /// The curve, also in `metrics.jsonl`.
    pub evaluations: Vec<Evaluation>,
    /// The run's folder.
    pub folder: PathBuf,
    /// The checkpoint in it.
    pub checkpoint: PathBuf,
    /// The architecture of the checkpoint.
    pub model: ModelConfig,
    /// Its parameters, flat.
    pub parameters: Vec<f32>,
    /// The text it was trained on, with its vocabulary.
    pub corpus: Corpus,
}

/// A server that listens.
pub struct Server {
    hub: Arc<Hub>,
    endpoint: Endpoint,
    join: JoinString,
    local_join: JoinString,
    folder: Arc<RunFolder>,
    model: ModelConfig,
    origin: Arc<Origin>,
    /// Lines of the curve that are written.
    lines_written: usize,
    /// The step of the checkpoint that is there, or being written.
    saved: Option<Step>,
    /// At most one checkpoint is being written, on a blocking thread.
    saving: Option<JoinHandle<Result<(), ResultsError>>>,
    /// Whether the run was over when the server started.
    was_over: bool,
    /// Locked for as long as the server lives.
    _state: Option<StateFolder>,
    /// Accepting and announcing; they end with the server.
    _tasks: JoinSet<()>,
}

impl Drop for Server {
    /// Workers learn at once that the server is gone.
    fn drop(&mut self) {
        // What its connections still decide is nobody's to learn.
        self.hub.close_journal();
        self.endpoint.close(VarInt::from_u32(CloseCode::ServerStopping as u32), b"the server stops");
    }
}

impl Server {
    /// Makes the run's folder, initialises the model and listens. The token admits workers, unless they have tokens or
    /// certificates of their own, when none may be given; without one a fresh one is drawn.
    ///
    /// # Errors
    /// A [`ServerError`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(run: RunConfig, token: Option<Token>) -> Result<Self, ServerError> {
        Self::start_on(run, token, |folder| folder)
    }

    /// [`start`](Self::start) with the journal on the disk that `disk` makes of the state folder.
    ///
    /// # Errors
    /// A [`ServerError`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_on<D: Disk + 'static>(
        mut run: RunConfig,
        token: Option<Token>,
        disk: impl FnOnce(Directory) -> D,
    ) -> Result<Self, ServerError> {
        admission::check_token(&run.server, token.as_ref())?;
        run.check_kept()?;
        let clients = admission::client_authority(&run.server)?;
        let state = match std::mem::take(&mut run.server.state_dir).as_str() {
            "" => None,
            path => Some(StateFolder::open(path.as_ref())?),
        };
        let known = state.as_ref().map(StateFolder::identity).transpose()?.flatten();
        if let Some(state) = &state {
            check_state(state, known.is_some(), &run)?;
        }
        let origin = Origin::open(&run)?;
        let corpus = origin.corpus(&run)?;
        let beginning = origin.begin(&run, corpus.vocabulary().len())?;
        if let Some(dense) = &beginning.dense {
            run.upcycle.dense_sha256 = hex(&dense.sha256);
        }
        let mut address = listen_address(&run.server.listen)?;
        let certificate = match &known {
            Some(known) => {
                // Workers look for the server where it was.
                if address.port() == 0 {
                    address.set_port(known.address.port());
                }
                Certificate::from_der(known.certificate.clone(), known.key.clone())
            }
            None => Certificate::generate()?,
        };
        let layout = Arc::new(beginning.model.layout()?);
        let pinned = Pinned::of(&layout, &run, state.is_some());
        pinned.check(run.server.memory_max_mb)?;
        let endpoint = server_endpoint(address, &certificate, clients.as_ref(), idle(&run))?;
        let bound = endpoint.local_addr()?;
        let given = token.is_some();
        let token = match token {
            Some(token) => token,
            None if known.is_some() => {
                let kept = known.as_ref().map_or("", |known| &known.token);
                kept.parse().map_err(|_| ServerError::Token)?
            }
            None => Token::draw(secure_random()),
        };
        let admission = Admission::of(&run.server, token.clone())?;
        let local_join = JoinString {
            host: reachable_host(bound),
            port: bound.port(),
            pin: certificate.pin(),
            token: admission.shared_token().cloned(),
        };
        let join = match run.server.advertise.as_str() {
            "" => local_join.clone(),
            host => JoinString { host: host.to_owned(), ..local_join.clone() },
        };
        let folder = Arc::new(match &known {
            Some(known) => RunFolder::reopen(&known.results, &mut run)?,
            None => RunFolder::create(&mut run)?,
        });
        let (model, origin) = (beginning.model.clone(), Arc::new(origin));
        let (initial, active_parameters) = (&beginning.parameters[..], model.active_parameters()?);
        let subject = Subject { layout: &layout, run: &run, initial, active_parameters };
        let beginnings = match &state {
            None => Beginnings::fresh(subject),
            Some(state) => {
                let initial_sha256 = parameters_hash(&layout, initial);
                let id = match &known {
                    Some(known) if known.initial_sha256 == initial_sha256 => {
                        if given && known.token != token.reveal() {
                            // It is the run's from now on.
                            let mut identity = known.clone();
                            token.reveal().clone_into(&mut identity.token);
                            state.keep(&identity)?;
                        }
                        known.run
                    }
                    Some(_) => return Err(StateError::OtherInitial(state.path().to_owned()).into()),
                    None => {
                        let id = RunId(secure_random());
                        let results =
                            std::path::absolute(folder.path()).unwrap_or_else(|_| folder.path().to_owned());
                        let (secrets, token) = (certificate.to_der(), token.reveal().to_owned());
                        let identity = Identity::new(id, token, secrets, (bound, results), initial_sha256);
                        state.begin(&run, &identity)?;
                        id
                    }
                };
                Beginnings::recover(state.path(), disk(Directory::new(state.path())), id, subject)?
            }
        };
        let sessions = beginnings.sessions.clone();
        info!(
            "peers can make this server hold at most {} MB: {} workers {} MB each, and strangers {} MB; usual is far less, and \
             memory_max_mb refuses to start above a limit",
            megabytes(pinned.total()),
            run.server.sessions_max,
            megabytes(pinned.session),
            megabytes(pinned.strangers)
        );
        let hub = Arc::new(Hub::new(run, corpus, admission, &beginning, layout.clone(), beginnings));
        hub.await_return(sessions);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(hub.clone(), endpoint.clone()));
        tasks.spawn(announce_steps(hub.clone()));
        let watched = hub.clone();
        tasks.spawn(async move { watched.admission().watch().await });
        tasks.spawn(write_checkpoints(hub.clone()));
        Ok(Self {
            was_over: hub.is_finished(),
            hub,
            endpoint,
            join,
            local_join,
            folder,
            model,
            origin,
            lines_written: 0,
            saved: None,
            saving: None,
            _state: state,
            _tasks: tasks,
        })
    }

    /// What workers need to join.
    pub fn join(&self) -> &JoinString {
        &self.join
    }

    /// What workers on this machine need: the address listened on, whatever is advertised to others.
    pub fn local_join(&self) -> &JoinString {
        &self.local_join
    }

    /// The run as it is served, under the name its folder has.
    pub fn run(&self) -> &RunConfig {
        self.hub.run()
    }

    /// The text it trains on.
    pub fn corpus(&self) -> &Corpus {
        self.hub.corpus()
    }

    /// Whether the run was over when this server started, which then only writes the results that are missing.
    pub fn was_over(&self) -> bool {
        self.was_over
    }

    /// Where the results go.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Waits until every batch and every evaluation is done, or the run was given up; the results may still have to be
    /// written then.
    pub fn over(&self) -> impl Future<Output = ()> + 'static {
        let hub = self.hub.clone();
        async move { hub.finished().await }
    }

    /// Serves until the run is over, or until `stop` becomes true: then a run with a state folder is left for another
    /// server to go on with, and of any other what was applied by then is evaluated. `show` is called several times a
    /// second.
    ///
    /// # Errors
    /// [`ServerError::Results`] if a result cannot be written, [`ServerError::JournalFailed`] if the journal cannot.
    pub async fn serve(
        mut self,
        stop: watch::Receiver<bool>,
        mut show: impl FnMut(&Progress),
    ) -> Result<Outcome, ServerError> {
        let mut ticks = tokio::time::interval(SHOW_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let hub = self.hub.clone();
        let (finished, failed, stopped) = (hub.finished(), hub.failed(), stopped(stop));
        tokio::pin!(finished, failed, stopped);
        let mut stopping = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.write_lines()?;
                    self.save_improvement().await;
                    show(&hub.progress());
                }
                () = &mut finished => break,
                failure = &mut failed => return Err(failure.into()),
                () = &mut stopped, if stopping.is_none() => {
                    if hub.is_kept() {
                        break;
                    }
                    stopping = Some(AbortOnDrop(tokio::spawn(stop_early(hub.clone()))));
                }
            }
        }
        drop(stopping);
        // Results and goodbyes tell of the last decisions too.
        tokio::select! {
            () = hub.kept() => {}
            failure = hub.failed() => return Err(failure.into()),
        }
        if hub.run().server.checkpoint_every_ms > 0 {
            // So that the next server need not replay anything.
            hub.write_checkpoint().await;
        }
        self.write_lines()?;
        show(&hub.progress());
        let outcome = self.conclude().await?;
        if hub.is_finished() {
            self.say_goodbye().await;
        } else {
            warn!("stopped; a server that is started on the same state folder goes on with the run");
        }
        Ok(outcome)
    }

    /// Writes the lines of the curve that are new.
    fn write_lines(&mut self) -> Result<(), ServerError> {
        for line in self.hub.lines(self.lines_written) {
            self.folder.append(&line)?;
            self.lines_written += 1;
        }
        Ok(())
    }

    /// Begins to write the best model if it is another than the one in the checkpoint, so that a server that is killed
    /// leaves the best so far.
    async fn save_improvement(&mut self) {
        if self.saving.as_ref().is_some_and(|saving| !saving.is_finished()) {
            return;
        }
        self.finish_saving().await;
        if let Some((step, parameters)) = self.hub.best()
            && self.saved != Some(step)
        {
            self.saved = Some(step);
            let write = self.checkpoint_writer();
            self.saving = Some(tokio::task::spawn_blocking(move || write(&parameters)));
        }
    }

    /// Waits for the checkpoint that is being written. A failure is not final: the run's end brings another one.
    async fn finish_saving(&mut self) {
        let Some(saving) = self.saving.take() else { return };
        if let Err(error) = saving.await.expect("writing a checkpoint does not panic") {
            warn!("the best model so far is not saved: {}", one_sentence(&error));
            self.saved = None;
        }
    }

    fn checkpoint_writer(&self) -> impl FnOnce(&[f32]) -> Result<(), ResultsError> + Send + 'static {
        let (folder, model, origin) = (self.folder.clone(), self.model.clone(), self.origin.clone());
        let corpus = self.hub.corpus().clone();
        move |parameters| folder.write_checkpoint(&model, parameters, (&corpus, &origin))
    }

    /// Writes the checkpoint, unless the best model is there already or, when none was evaluated, the last one; and the
    /// summary, which is small, also where there is no room for the checkpoint.
    async fn conclude(&mut self) -> Result<Outcome, ServerError> {
        self.finish_saving().await;
        let (step, parameters) = match self.hub.best() {
            Some((step, parameters)) => (Some(step), parameters.to_vec()),
            None => (None, self.hub.theta().await),
        };
        let parameters = if step.is_some() && self.saved == step {
            Ok(parameters)
        } else {
            let write = self.checkpoint_writer();
            let written = tokio::task::spawn_blocking(move || write(&parameters).map(|()| parameters)).await;
            written.expect("writing a checkpoint does not panic")
        };
        let mut summary = self.hub.summary(self.hub.seconds());
        let there = self.was_over.then(|| self.folder.summary()).flatten();
        match there.filter(|there| there.is_of_the_end(&summary)) {
            // The server that saw the end knows of bytes and seconds after the last decision, too.
            Some(there) => summary = there,
            None => self.folder.write_summary(&summary)?,
        }
        let parameters = parameters?;
        Ok(Outcome {
            summary,
            evaluations: self.hub.evaluations(),
            folder: self.folder.path().to_owned(),
            checkpoint: self.folder.checkpoint(),
            model: self.model.clone(),
            parameters,
            corpus: self.hub.corpus().clone(),
        })
    }

    async fn say_goodbye(&self) {
        self.hub.all_came_back().await;
        let deadline = Instant::now() + GOODBYES_WAIT;
        while self.hub.connected() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.hub.disconnect_all(CloseCode::Finished, "the run is over");
        self.endpoint.close(VarInt::from_u32(CloseCode::Finished as u32), b"the run is over");
        let _ = tokio::time::timeout(GOODBYES_WAIT, self.endpoint.wait_idle()).await;
    }
}

/// Takes in whoever may begin a handshake. Neither an address that is forged nor one that comes too often costs more than
/// a packet in answer.
async fn accept(hub: Arc<Hub>, endpoint: Endpoint) {
    let sessions_max = hub.run().server.sessions_max;
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let members = Arc::new(Semaphore::new(CONNECTIONS_PER_SESSION * sessions_max as usize));
    let mut rate = HandshakeRate::new(sessions_max, Instant::now());
    let (mut refused, mut told) = (0_u64, None);
    while let Some(incoming) = endpoint.accept().await {
        let address = incoming.remote_address().ip();
        if !incoming.remote_address_validated() {
            // It can be asked to show that its address is not forged, since it has not been.
            let _ = incoming.retry();
            continue;
        }
        let now = Instant::now();
        let admitted = rate.take(address, now).then(|| strangers.clone().try_acquire_owned().ok()).flatten();
        let Some(stranger) = admitted else {
            // A worker that is refused so tries again.
            incoming.refuse();
            refused += 1;
            if told.is_none_or(|told| now.duration_since(told) >= REFUSALS_TOLD_EVERY) {
                warn!("too many at a time want to connect: {refused} were refused, {address} was the last");
                (refused, told) = (0, Some(now));
            }
            continue;
        };
        tokio::spawn(connection::serve(hub.clone(), incoming, (stranger, members.clone())));
    }
}

async fn announce_steps(hub: Arc<Hub>) {
    let mut ticks = tokio::time::interval(NOTICE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut announced = Step(0);
    while !hub.is_finished() {
        ticks.tick().await;
        let step = hub.step();
        if step > announced {
            announced = step;
            hub.announce(step);
            hub.look_at_traffic();
        }
    }
}

/// Writes the whole state down every so often, if there is anything new.
async fn write_checkpoints(hub: Arc<Hub>) {
    let every = Duration::from_millis(hub.run().server.checkpoint_every_ms);
    if every.is_zero() {
        return;
    }
    loop {
        tokio::time::sleep(every).await;
        hub.write_checkpoint().await;
    }
}

/// A task that ends with whoever started it.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits until `stop` becomes true.
async fn stopped(mut stop: watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left to stop it.
        std::future::pending().await
    }
}

async fn stop_early(hub: Arc<Hub>) {
    info!("stopping early: evaluating what was trained so far");
    hub.stop_training().await;
    if hub.connected() > 0 {
        tokio::time::sleep(FINAL_EVALUATION_WAIT).await;
    }
    hub.abandon();
}

/// Checks that a run is begun in a folder without one, or is the one to be gone on with, before anything is written.
fn check_state(state: &StateFolder, is_known: bool, run: &RunConfig) -> Result<(), ServerError> {
    if is_known {
        state.check_run(run)?;
    } else {
        durable::check_beginning(&run.server)?;
    }
    if run.server.durability == Durability::None && state.holds_decisions()? {
        return Err(StateError::Kept(state.path().to_owned()).into());
    }
    Ok(())
}

fn listen_address(text: &str) -> Result<SocketAddr, ServerError> {
    let found = text.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    found.ok_or_else(|| ServerError::Listen(text.to_owned()))
}

/// The address listened on; this machine's loopback address where that is every address.
fn reachable_host(bound: SocketAddr) -> String {
    match bound {
        SocketAddr::V4(bound) if bound.ip().is_unspecified() => "127.0.0.1".to_owned(),
        SocketAddr::V6(bound) if bound.ip().is_unspecified() => "::1".to_owned(),
        bound => bound.ip().to_string(),
    }
}
