//! A worker as a member of a run: its state across connections, and the loop of exchanges.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sanderling_common::checkpoint::Checkpoint;
use sanderling_common::corpus::{Corpus, TEXT_BYTES_MAX};
use sanderling_common::ids::{BatchId, SessionId, Step};
use sanderling_common::init::{initial_parameters, parameters_hash};
use sanderling_common::layout::Layout;
use sanderling_common::origin::Dense;
use sanderling_common::report::one_sentence;
use sanderling_common::sparse::{aside_bytes_max, decode, payload_bytes_max};
use sanderling_common::wire::control::{
    BulkObject, Initial, OnlineUpcycling, Ready, Request, Response, Welcome, dense_bytes_max,
    dense_parameters,
};
use sanderling_common::wire::frame::{Reply, frame_bytes_max};
use sanderling_common::wire::{EvaluationJob, Refusal, Work};
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use super::bulk::{BulkError, Download, parameters};
use super::connection::Link;
use super::{Lost, WorkerError, WorkerOptions, WorkerReport};
use crate::core::replica::Replica;
use crate::core::{
    AnswerError, Diverged, ImageError, RestoredWorker, WorkerCore, WorkerSettings, means_over_steps,
};
use crate::data::Batch;
use crate::engine::Compute;
use crate::model::{ModelError, StepLoss};
use crate::site::Site;
use crate::storage::{StateError, StateFolder};

/// A push that the server is still applying is asked about again after this long.
const IN_FLIGHT_WAIT: Duration = Duration::from_millis(20);

/// How often a worker says what it does.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What is kept across sessions: a worker that starts anew does not fetch it again.
#[derive(Default)]
pub(super) struct Shelf {
    corpus: Option<Arc<Corpus>>,
    dense: Option<Dense>,
    download: Download,
    /// Apart from the text's, so that a connection that is lost during either costs nothing of the other.
    dense_download: Download,
    state: Option<Arc<Mutex<StateFolder>>>,
    /// The worker that was killed, until its session is taken up again.
    past: Option<RestoredWorker>,
}

/// The session that is kept on disk.
impl Shelf {
    /// With what a worker that was killed has left in the folder.
    pub(super) fn open(state_dir: Option<&Path>, pin: [u8; 32]) -> Result<Self, StateError> {
        let Some(path) = state_dir else { return Ok(Self::default()) };
        let state = StateFolder::open(path, pin)?;
        let past = state.load()?;
        if let Some(past) = &past {
            info!("going on from push {} in {}", past.push.seq.0, path.display());
        }
        Ok(Self { state: Some(Arc::new(Mutex::new(state))), past, ..Self::default() })
    }

    pub(super) fn session(&self) -> Option<SessionId> {
        self.past.as_ref().map(RestoredWorker::session)
    }

    pub(super) fn take_past(&mut self) -> Option<RestoredWorker> {
        self.past.take()
    }

    /// Nobody is to go on in the session.
    pub(super) fn forget_session(&mut self) -> Result<(), StateError> {
        if self.past.take().is_some() {
            info!("the session that was kept on disk cannot be gone on with; beginning another");
        }
        self.state.as_ref().map_or(Ok(()), |state| lock(state).clear())
    }
}

fn lock(state: &Mutex<StateFolder>) -> MutexGuard<'_, StateFolder> {
    state.lock().expect("nothing panics while it writes the state")
}

impl Shelf {
    /// The corpus of this hash: the one at hand, the bundled text, or what the server has, be it text or tokens.
    async fn text(&mut self, link: &Link, sha256: [u8; 32]) -> Result<Arc<Corpus>, Lost> {
        if let Some(corpus) = self.corpus.as_ref().filter(|corpus| corpus.sha256() == sha256) {
            return Ok(corpus.clone());
        }
        let bundled = Corpus::bundled();
        let corpus = if bundled.sha256() == sha256 {
            bundled
        } else {
            let bytes = link.fetch(&mut self.download, BulkObject::Text, TEXT_BYTES_MAX).await?;
            Corpus::from_bytes(bytes).map_err(WorkerError::Corpus)?
        };
        if corpus.sha256() != sha256 {
            return Err(Lost::ForNow("the server sent another text than it had announced".to_owned()));
        }
        Ok(self.corpus.insert(Arc::new(corpus)).clone())
    }
}

impl Shelf {
    /// The initial model of a run that is upcycled, made here: of the dense model at hand, the one on this machine, or
    /// the server's.
    async fn upcycled(
        &mut self,
        link: &Link,
        (welcome, upcycling): (&Welcome, &OnlineUpcycling),
        options: &WorkerOptions,
    ) -> Result<Vec<f32>, Lost> {
        let wanted = upcycling.dense_sha256;
        if self.dense.as_ref().is_none_or(|dense| dense.sha256 != wanted) {
            let (named, served) = (options.dense.clone(), welcome.run.upcycle.dense.clone());
            let found = tokio::task::spawn_blocking(move || {
                if let Some(named) = &named
                    && !named.is_dir()
                {
                    warn!("there is no checkpoint in {}", named.display());
                }
                let places = named.iter().map(PathBuf::as_path).chain([Path::new(&served)]);
                find_dense(places.filter(|place| place.is_dir()), wanted)
            })
            .await;
            let found = found.expect("reading a checkpoint does not panic");
            self.dense = Some(match found {
                Some(dense) => dense,
                None => self.fetch_dense(link, upcycling).await?,
            });
        }
        // Making it takes a while for a large model, and the connection must be kept alive meanwhile.
        let (dense, recipe) = (self.dense.take().expect("it was just found"), upcycling.recipe);
        let made = tokio::task::spawn_blocking(move || {
            let made = dense.upcycle(&recipe);
            (dense, made)
        });
        let (dense, made) = made.await.expect("upcycling does not panic");
        self.dense = Some(dense);
        let (model, parameters) = made.map_err(WorkerError::Upcycle)?;
        if model == welcome.model { Ok(parameters) } else { Err(WorkerError::InitialMismatch.into()) }
    }

    async fn fetch_dense(&mut self, link: &Link, upcycling: &OnlineUpcycling) -> Result<Dense, Lost> {
        let config = upcycling.dense.clone();
        let layout = config.layout().map_err(WorkerError::Model)?;
        let bytes_max = dense_bytes_max(layout.len());
        info!("fetching the dense model from the server");
        let bytes = link.fetch(&mut self.dense_download, BulkObject::Dense, bytes_max).await?;
        let parameters = dense_parameters(&bytes, layout.len()).ok_or_else(|| {
            Lost::ForNow("the server's dense model does not fit its description".to_owned())
        })?;
        let sha256 = parameters_hash(&layout, &parameters);
        if sha256 != upcycling.dense_sha256 {
            return Err(Lost::ForNow("the server sent another dense model than it had announced".to_owned()));
        }
        Ok(Dense { config, parameters, sha256 })
    }
}

/// The initial model of a run that begins with seeded initialisation.
async fn seeded(welcome: &Welcome) -> Result<Vec<f32>, Lost> {
    let (model, seed) = (welcome.model.clone(), welcome.run.run.seed);
    let made = tokio::task::spawn_blocking(move || initial_parameters(&model, seed)).await;
    Ok(made.expect("initialisation does not panic").map_err(WorkerError::Model)?)
}

/// The dense model of this hash, if one of the places has it.
fn find_dense<'a>(mut places: impl Iterator<Item = &'a Path>, sha256: [u8; 32]) -> Option<Dense> {
    places.find_map(|place| {
        let loaded = Checkpoint::open(place).and_then(|checkpoint| Dense::load(&checkpoint));
        let dense = match loaded {
            Ok(dense) => dense,
            Err(error) => {
                warn!("the dense model in {} cannot be read: {}", place.display(), one_sentence(&error));
                return None;
            }
        };
        if dense.sha256 == sha256 {
            return Some(dense);
        }
        warn!("{} holds another dense model than the run's", place.display());
        None
    })
}

/// What a worker keeps across connections.
pub(super) struct Member<S: Site> {
    site: Arc<S>,
    session: SessionId,
    state: Option<Arc<Mutex<StateFolder>>>,
    settings: WorkerSettings,
    overlap: bool,
    local_steps: u32,
    layout: Arc<Layout>,
    /// θ0 with its hash, where the worker makes it, until the base arrives that is added to it.
    initial: Option<Vec<f32>>,
    initial_sha256: Option<[u8; 32]>,
    reply_bytes_max: usize,
    download: Download,
    /// The step of a base model that has not arrived yet.
    awaited_base: Option<Step>,
    /// Away only while a blocking thread computes with it.
    desk: Option<Box<Desk<S>>>,
    evaluation: Option<EvaluationJob>,
    /// The tokens of a batch, of its first step if it has several, prepared while an exchange was under way.
    prepared: Option<(BatchId, Batch)>,
    /// A gradient that waits to be pushed, taken while an exchange was under way.
    computed: Option<Computed>,
}

/// What a computation needs.
struct Desk<S: Site> {
    engine: S::Engine,
    core: Option<WorkerCore<S::Replica>>,
}

impl<S: Site> Desk<S> {
    fn core(&mut self) -> &mut WorkerCore<S::Replica> {
        self.core.as_mut().expect("exchanges begin when the base model has arrived")
    }
}

/// A gradient in the engine's buffer.
#[derive(Clone, Copy, Debug)]
struct Computed {
    batch: BatchId,
    /// Means over the batch's local steps.
    loss: f32,
    dropped: f32,
    /// Of all of them.
    tokens: usize,
}

impl<S: Site> Member<S> {
    /// Gets the text, and what the initial model is made of, and builds the model that the server describes.
    pub(super) async fn prepare(
        (link, site): (&Link, &Arc<S>),
        welcome: &Welcome,
        options: &WorkerOptions,
        shelf: &mut Shelf,
    ) -> Result<Self, Lost> {
        welcome.run.validate().map_err(WorkerError::Config)?;
        welcome.run.validate_model(&welcome.model).map_err(WorkerError::Config)?;
        let corpus = shelf.text(link, welcome.text_sha256).await?;
        welcome.run.check_corpus(&corpus).map_err(WorkerError::Corpus)?;
        let (at, run, model) = (site.clone(), welcome.run.clone(), welcome.model.clone());
        let engine = tokio::task::spawn_blocking(move || at.engine(&run, model, corpus)).await;
        let engine = engine.expect("building a model does not panic").map_err(WorkerError::Compute)?;
        let layout = engine.layout().clone();
        let initial = match &welcome.initial {
            Initial::Sent => None,
            Initial::Seeded { .. } => Some(seeded(welcome).await?),
            Initial::Upcycled(upcycling) => Some(shelf.upcycled(link, (welcome, upcycling), options).await?),
        };
        Ok(Self {
            site: site.clone(),
            initial_sha256: initial.as_ref().map(|initial| parameters_hash(&layout, initial)),
            initial,
            session: welcome.session,
            state: shelf.state.clone(),
            settings: WorkerSettings::from(&welcome.run),
            overlap: welcome.run.training.overlap,
            local_steps: welcome.run.training.local_steps,
            reply_bytes_max: usize::try_from(frame_bytes_max(&layout)).unwrap_or(usize::MAX),
            layout,
            download: Download::default(),
            awaited_base: None,
            desk: Some(Box::new(Desk { engine, core: None })),
            evaluation: None,
            prepared: None,
            computed: None,
        })
    }

    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    /// Goes on where another process was in the same session.
    pub(super) fn restore(&mut self, past: RestoredWorker) -> Result<(), Lost> {
        let (site, layout, method) = (&self.site, self.layout.clone(), &self.settings.method);
        let make = |theta| site.replica(layout, method, theta);
        let core = WorkerCore::restore_with(self.layout.clone(), &self.settings, past, make);
        let core = apart::<S::Replica, _, ImageError>(core)
            .map_err(|error| WorkerError::Compute(self.desk().engine.explained(error)))?;
        let core =
            core.map_err(|error| Lost::Session(format!("what was kept on disk is of no use: {error}")))?;
        self.desk().core = Some(core);
        Ok(())
    }

    /// What this side has made of the server's description.
    pub(super) fn ready(&self) -> Ready {
        Ready { layout_hash: self.layout.hash(), initial_sha256: self.initial_sha256 }
    }

    /// The session starts from the server's model at `step`.
    pub(super) fn await_base(&mut self, step: Step) {
        self.awaited_base = Some(step);
    }

    /// Whether the base model is still to be fetched.
    pub(super) fn awaits_base(&self) -> bool {
        self.awaited_base.is_some()
    }

    /// Whether the base model is here.
    pub(super) fn has_begun(&self) -> bool {
        self.desk.as_ref().is_some_and(|desk| desk.core.is_some())
    }

    /// Fetches the base model, if it has not arrived yet; a lost connection is made good by calling again.
    pub(super) async fn fetch_base(&mut self, link: &Link) -> Result<(), Lost> {
        let Some(step) = self.awaited_base else { return Ok(()) };
        let count = self.layout.len();
        let misfit = || Lost::Session("the base model does not fit the layout".to_owned());
        let base = match &self.initial {
            None => {
                let bytes = link.fetch(&mut self.download, BulkObject::Base, count as u64 * 4).await?;
                parameters(&bytes, count).ok_or_else(misfit)?
            }
            Some(_) => {
                let bytes_max = payload_bytes_max(&self.layout);
                let payload = link.fetch(&mut self.download, BulkObject::Base, bytes_max).await?;
                let tensors = 0..self.layout.tensors().len();
                let difference = decode(&self.layout, tensors, &payload).map_err(|_| misfit())?;
                let mut base = self.initial.take().expect("it is there");
                difference.add_to(&self.layout, &mut base);
                if base.iter().any(|value| !value.is_finite()) {
                    return Err(misfit());
                }
                base
            }
        };
        let (site, layout) = (self.site.clone(), self.layout.clone());
        let (settings, session) = (self.settings, self.session);
        let begun = self.blocking(move |desk| {
            let replica = site.replica(layout.clone(), &settings.method, base).map_err(ModelError::device)?;
            desk.core = Some(WorkerCore::with(replica, layout, &settings, session, step));
            Ok(())
        });
        begun.await?;
        self.awaited_base = None;
        Ok(())
    }

    fn desk(&mut self) -> &mut Desk<S> {
        self.desk.as_mut().expect("nothing is being computed")
    }

    /// Exchanges over this connection until `stop` becomes true.
    pub(super) async fn exchange_until_stopped(
        &mut self,
        link: &Link,
        options: &WorkerOptions,
        report: &mut WorkerReport,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Lost> {
        let mut reported = Instant::now();
        while !*stop.borrow() {
            let core = self.desk().core();
            let (pending, next_batch) = (core.pending().is_some(), core.next_batch());
            if pending {
                self.exchange(link, options, report).await?;
            } else if let Some(job) = self.evaluation {
                self.evaluate(link, options, job, stop).await?;
            } else if let Some(batch) = next_batch {
                if self.computed.is_none() {
                    let (stop, is_over) = (stop.clone(), link.run_is_over());
                    self.compute(options, batch, move || !*stop.borrow() && !is_over()).await?;
                }
                if self.computed.is_none() {
                    return if *stop.borrow() { Ok(()) } else { Err(Lost::Finished) };
                }
                self.push(link).await?;
            } else {
                // The server holds its answer back for a while when there is nothing to do.
                let request = Request::Work(self.session);
                tokio::select! {
                    asked = self.ask(link, &request) => asked?,
                    () = stopped(stop) => {}
                }
            }
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                let step = self.desk().core().step().0;
                info!(exchanges = report.exchanges, server_step = step, "working");
            }
        }
        Ok(())
    }

    /// Takes the gradient of a batch on a blocking thread, under a permit where computations are rationed, and before it the local
    /// steps that it has. It is given up between two of them for `keep_going`, after which the session ends.
    async fn compute(
        &mut self,
        options: &WorkerOptions,
        batch: BatchId,
        keep_going: impl Fn() -> bool + Send + 'static,
    ) -> Result<(), Lost> {
        let mut prepared = self.prepared.take().filter(|(id, _)| *id == batch).map(|(_, tokens)| tokens);
        let local_steps = self.local_steps;
        let computed = self.at_desk(options, move |desk| {
            let (mut taken, mut tokens) = (Vec::new(), 0);
            for step in 0..local_steps {
                if step > 0 && !keep_going() {
                    return Ok(None);
                }
                let own = batch.of_local_step(local_steps, step);
                let sequences = prepared.take().unwrap_or_else(|| desk.engine.batch(own));
                let core = desk.core.as_mut().expect("the base model has arrived");
                let StepLoss { cross_entropy: loss, dropped, .. } =
                    desk.engine.take_gradient(core.view(), &sequences)?;
                taken.push((loss, dropped));
                tokens += sequences.tokens();
                if step + 1 < local_steps {
                    let handled = core.handle_local_gradient(desk.engine.gradient(), loss);
                    handled.map_err(ModelError::device)?;
                }
            }
            let (loss, dropped) = means_over_steps(&taken);
            Ok(Some(Computed { batch, loss, dropped, tokens }))
        });
        self.computed = computed.await?;
        Ok(())
    }

    /// Runs a computation on a blocking thread, under a permit where computations are rationed.
    async fn at_desk<T: Send + 'static>(
        &mut self,
        options: &WorkerOptions,
        work: impl FnOnce(&mut Desk<S>) -> Result<T, ModelError> + Send + 'static,
    ) -> Result<T, Lost> {
        let _permit = match &options.compute_permits {
            Some(permits) => Some(acquire(permits.clone()).await),
            None => None,
        };
        self.blocking(work).await
    }

    /// Runs on a blocking thread what is short beside a gradient, but too long for the threads that serve connections.
    async fn blocking<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Desk<S>) -> Result<T, ModelError> + Send + 'static,
    ) -> Result<T, Lost> {
        let mut desk = self.desk.take().expect("one computation at a time");
        let computation = tokio::task::spawn_blocking(move || {
            let result = work(&mut desk);
            (desk, result)
        });
        let (desk, result) = match computation.await {
            Ok(finished) => finished,
            // A panic there is a defect of ours and ends the worker as if it had happened here.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        // The replica's failures too: it has its memory beside the engine's.
        let result = result.map_err(|error| WorkerError::Compute(desk.engine.explained(error)).into());
        self.desk = Some(desk);
        result
    }

    /// Hands the computed gradient to the method; the push stays pending until it is answered.
    async fn push(&mut self, link: &Link) -> Result<(), Lost> {
        let Computed { batch, loss, dropped, tokens } = self.computed.take().expect("a gradient was taken");
        let staleness = self.staleness(link);
        let tokens = u32::try_from(tokens).expect("the configuration bounds a batch");
        let pushed = self.blocking(move |desk| {
            let core = desk.core.as_mut().expect("the base model has arrived");
            let gradient = desk.engine.gradient();
            let pushed = core.handle_gradient(batch, gradient, loss, dropped, tokens, staleness);
            apart::<S::Replica, _, Diverged>(pushed.map(|_| ()))
        });
        pushed.await?.map_err(Lost::Diverged)
    }

    /// τ of a gradient that was taken at the last view, as well as it is known.
    fn staleness(&mut self, link: &Link) -> u32 {
        let core = self.desk().core();
        let behind = |newest: Step| newest.0.max(core.step().0) - core.view_step().0;
        match link.announced_step() {
            Some(newest) => u32::try_from(behind(newest)).unwrap_or(u32::MAX),
            None => core.last_staleness().saturating_add(u32::try_from(behind(Step(0))).unwrap_or(u32::MAX)),
        }
    }

    /// Writes down what another process needs to go on, before the push is sent for the first time.
    async fn keep(&mut self, options: &WorkerOptions) -> Result<(), Lost> {
        let Some(state) = self.state.clone() else { return Ok(()) };
        let kept = self.at_desk(options, move |desk| {
            let (core, mut state) = (desk.core(), lock(&state));
            if core.pending().is_some_and(|push| state.keeps(push)) {
                return Ok(Ok(()));
            }
            let image = core.image().map_err(ModelError::device)?;
            Ok(state.keep(&image.expect("a push is pending")))
        });
        Ok(kept.await?.map_err(WorkerError::State)?)
    }

    /// Sends the pending push, again after a lost connection, and applies the answer.
    async fn exchange(
        &mut self,
        link: &Link,
        options: &WorkerOptions,
        report: &mut WorkerReport,
    ) -> Result<(), Lost> {
        self.keep(options).await?;
        let reply_bytes_max = self.reply_bytes_max;
        let core = self.desk().core();
        let push = core.pending().expect("a push is pending");
        let (frame, skipped) = (Link::frame(push), push.skipped);
        let next = core.next_batch().filter(|_| self.computed.is_none());
        let meanwhile = async {
            match next {
                // It has one step, which is not given up.
                Some(batch) if self.overlap => self.compute(options, batch, || true).await,
                Some(batch) => {
                    let first = batch.of_local_step(self.local_steps, 0);
                    let tokens = self.desk().engine.batch(first);
                    self.prepared = Some((batch, tokens));
                    Ok(())
                }
                None => Ok(()),
            }
        };
        let (reply, computed) = tokio::join!(link.exchange(frame, reply_bytes_max), meanwhile);
        computed?;
        match reply? {
            Reply::Answer(answer) => {
                let handled = move |desk: &mut Desk<S>| {
                    apart::<S::Replica, _, AnswerError>(desk.core().handle_answer(&answer))
                };
                let work = self.blocking(handled).await?;
                report.exchanges += 1;
                report.skipped += u64::from(skipped);
                let work = work.map_err(|error| Lost::Session(error.to_string()))?;
                self.take(&work)
            }
            Reply::Refused(Refusal::InFlight) => {
                tokio::time::sleep(IN_FLIGHT_WAIT).await;
                Ok(())
            }
            Reply::Refused(Refusal::Finished) => Err(Lost::Finished),
            Reply::Refused(Refusal::AbsurdNorm) => Err(Lost::Diverged(Diverged::Absurd)),
            Reply::Refused(refusal) => Err(Lost::Session(refusal.to_string())),
        }
    }

    /// Notes what the server wants beyond batches, which the core has queued already.
    fn take(&mut self, work: &Work) -> Result<(), Lost> {
        self.evaluation = work.evaluation.or(self.evaluation);
        if work.finished { Err(Lost::Finished) } else { Ok(()) }
    }

    /// A request outside an exchange.
    async fn ask(&mut self, link: &Link, request: &Request) -> Result<(), Lost> {
        match link.request(request).await? {
            Response::Work(work) => {
                let added = self.desk().core().add_work(&work);
                added.map_err(|error| Lost::Session(error.to_string()))?;
                self.take(&work)
            }
            Response::UnknownSession => Err(Lost::Session("the server has forgotten the session".to_owned())),
        }
    }

    /// Fetches what the model of an evaluation differs by, evaluates it and reports the result; gives up when it is told
    /// to stop, or the run is over.
    async fn evaluate(
        &mut self,
        link: &Link,
        options: &WorkerOptions,
        job: EvaluationJob,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Lost> {
        let bytes_max = aside_bytes_max(&self.layout);
        let fetched = tokio::select! {
            fetched = link.fetch(&mut self.download, BulkObject::Snapshot(job), bytes_max) => fetched,
            () = stopped(stop) => return Ok(()),
        };
        let payload = match fetched {
            Err(BulkError::NotFound(_)) => {
                warn!("the model of {} is gone; leaving its evaluation", job.step);
                self.evaluation = None;
                return Ok(());
            }
            fetched => fetched?,
        };
        let (stop, is_over) = (stop.clone(), link.run_is_over());
        let keep_going = move || !*stop.borrow() && !is_over();
        let evaluated = self.at_desk(options, move |desk| {
            Ok(match apart::<S::Replica, _, AnswerError>(desk.core().model_aside(&payload))? {
                Ok(model) => Ok(desk.engine.evaluate_while(&model, job, &keep_going)?),
                Err(error) => Err(error),
            })
        });
        let evaluated = evaluated.await?.map_err(|error| Lost::Session(error.to_string()))?;
        let Some(report) = evaluated else { return Ok(()) };
        let session = self.session;
        self.ask(link, &Request::Evaluated(session, Box::new(report))).await?;
        // A new evaluation may have come with the answer.
        self.evaluation = self.evaluation.filter(|next| next.id != job.id);
        Ok(())
    }
}

/// Tells what the exchange says from a failure of the place where the replica is.
fn apart<R: Replica, T, E>(outcome: Result<T, R::Failure<E>>) -> Result<Result<T, E>, ModelError> {
    match outcome {
        Ok(value) => Ok(Ok(value)),
        Err(failure) => R::cause(failure).map(Err).map_err(ModelError::device),
    }
}

/// Waits until a worker is told to stop.
async fn stopped(stop: &watch::Receiver<bool>) {
    if stop.clone().wait_for(|stop| *stop).await.is_err() {
        // Nobody is left to tell it.
        std::future::pending().await
    }
}

async fn acquire(permits: Arc<Semaphore>) -> tokio::sync::OwnedSemaphorePermit {
    permits.acquire_owned().await.expect("the permits are never closed")
}

impl From<BulkError> for Lost {
    fn from(error: BulkError) -> Self {
        match error {
            BulkError::Message(error) => error.into(),
            BulkError::Connection(error) => error.into(),
            BulkError::NotFound(_) | BulkError::TooLarge { .. } => Self::Session(error.to_string()),
            BulkError::Read(_) | BulkError::Short { .. } | BulkError::Damaged { .. } => {
                Self::ForNow(error.to_string())
            }
        }
    }
}
