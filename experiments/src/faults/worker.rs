//! A worker's process: the shipped core, and a driver as small as can be.

use std::borrow::Cow;
use std::sync::Arc;

use sanderling_common::ids::{BatchId, SessionId};
use sanderling_common::init::{Purpose, normal_pair, stream};
use sanderling_common::layout::Layout;
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{EvaluationJob, Refusal, Work};
use sanderling_server::core::Base;
use sanderling_worker::core::{RestoredWorker, WorkerCore, WorkerImage, WorkerSettings};

use super::messages::{Down, Up};
use super::oracle::Oracle;
use super::server::{ConnectionId, Stream, frame};

/// What a worker does next.
pub(super) enum Next {
    /// It says something and waits for an answer.
    Say(Up),
    /// It has written its place down, and is about to send the push for the first time.
    SayFirst(Up),
    /// It computes for a while, and then looks again.
    Compute,
    /// The run is over.
    Leave,
}

/// A worker, through all of its processes.
pub(super) struct WorkerProcess {
    layout: Arc<Layout>,
    settings: WorkerSettings,
    initial: Vec<f32>,
    seed: u64,
    /// Whether it keeps its place on disk.
    keeps: bool,
    /// What is on its disk, by the parity of sequence numbers.
    kept: [Option<RestoredWorker>; 2],
    /// None while it is down.
    pub(super) connection: Option<ConnectionId>,
    /// The request that it waits for the answer to.
    pub(super) awaited: Option<Stream>,
    pub(super) session: Option<SessionId>,
    pub(super) core: Option<WorkerCore>,
    evaluation: Option<EvaluationJob>,
    /// The evaluation that is done, and not reported yet.
    report: Option<Box<EvaluationReport>>,
    computed: Option<BatchId>,
    welcomed: bool,
    awaits_base: bool,
    pub(super) is_over: bool,
}

impl WorkerProcess {
    pub(super) fn new(
        layout: &Arc<Layout>,
        settings: &WorkerSettings,
        initial: &[f32],
        seed: u64,
        keeps: bool,
    ) -> Self {
        Self {
            layout: layout.clone(),
            settings: *settings,
            initial: initial.to_vec(),
            seed,
            keeps,
            kept: [None, None],
            connection: None,
            awaited: None,
            session: None,
            core: None,
            evaluation: None,
            report: None,
            computed: None,
            welcomed: false,
            awaits_base: false,
            is_over: false,
        }
    }

    /// The process is killed; with `torn`, while it was writing its place down.
    pub(super) fn crash(&mut self, torn: bool) {
        if torn && let Some(push) = self.core.as_ref().and_then(WorkerCore::pending) {
            self.kept[(push.seq.0 % 2) as usize] = None;
        }
        self.forget();
        if self.keeps {
            let last = self.kept.iter().flatten().max_by_key(|kept| kept.push.seq).cloned();
            self.session = last.as_ref().map(RestoredWorker::session);
        }
    }

    /// The session is of no use any more.
    fn forget(&mut self) {
        (self.session, self.core, self.evaluation) = (None, None, None);
        (self.report, self.computed, self.awaits_base) = (None, None, false);
        self.hang_up();
    }

    pub(super) fn hang_up(&mut self) {
        (self.connection, self.awaited, self.welcomed) = (None, None, false);
    }

    /// What it does next, on a connection.
    pub(super) fn next(&mut self) -> Next {
        if self.is_over {
            return Next::Leave;
        }
        if !self.welcomed {
            return Next::Say(Up::Hello(self.session));
        }
        let session = self.session.expect("a welcome names the session");
        if self.awaits_base {
            return Next::Say(Up::Base(session));
        }
        let core = self.core.as_mut().expect("the base has arrived");
        if let Some(push) = core.pending() {
            let sent = Up::Push(session, frame(push));
            return if self.keep() { Next::SayFirst(sent) } else { Next::Say(sent) };
        }
        if let Some(report) = self.report.clone() {
            return Next::Say(Up::Report(session, report));
        }
        if let Some(job) = self.evaluation {
            return Next::Say(Up::Aside(session, job));
        }
        match (core.next_batch(), self.computed) {
            (Some(batch), Some(computed)) if batch == computed => {
                self.compute(batch);
                self.next()
            }
            (Some(batch), _) => {
                self.computed = Some(batch);
                Next::Compute
            }
            (None, _) => Next::Say(Up::Ask(session)),
        }
    }

    /// Writes down where it is, unless it has done so; returns whether it did.
    fn keep(&mut self) -> bool {
        let pending = self.core.as_ref().and_then(WorkerCore::pending).map(|push| push.seq);
        if !self.keeps || self.kept.iter().flatten().any(|kept| Some(kept.push.seq) == pending) {
            return false;
        }
        let Ok(image) = self.core.as_mut().expect("a push is pending").image();
        let WorkerImage { place, push, theta, vectors } = image.expect("a push is pending");
        let vectors = vectors.into_iter().map(Cow::into_owned).collect();
        let kept = RestoredWorker { place, push: push.clone(), theta: theta.into_owned(), vectors };
        let place = (kept.push.seq.0 % 2) as usize;
        self.kept[place] = Some(kept);
        true
    }

    /// A gradient that depends on the batch and on the model, so that every error shows in what follows.
    fn compute(&mut self, batch: BatchId) {
        self.computed = None;
        let core = self.core.as_mut().expect("the base has arrived");
        let mut rng = stream(self.seed, Purpose::Batch, batch.0);
        let view = core.view().iter();
        let gradient: Vec<f32> = view.map(|theta| 0.1 * theta + normal_pair(&mut rng).0 as f32).collect();
        let staleness = core.last_staleness();
        // Now and then a batch of several local steps.
        for _ in 0..batch.0 % 3 {
            let Ok(()) = core.handle_local_gradient(&gradient, 1.0);
        }
        // Now and then one that cannot be used.
        let loss = if batch.0 % 17 == 5 { f32::NAN } else { 1.0 };
        core.handle_gradient(batch, &gradient, loss, 0.0, 1, staleness).expect("the rate is small");
    }

    /// Takes what the server says. A session that is void ends the connection.
    ///
    /// # Errors
    /// What must not happen.
    pub(super) fn handle(&mut self, down: Down, oracle: &mut Oracle) -> Result<(), String> {
        match down {
            Down::Welcome { session, resumed, base_step } => {
                self.welcome(session, resumed, base_step.is_some())
            }
            Down::Base(Some((step, base))) => {
                let base =
                    match base {
                        Base::Whole(base) => base,
                        difference @ Base::Difference(_) => difference
                            .onto(&self.layout, self.initial.clone())
                            .map_err(|error| format!("a base cannot be decoded: {error}"))?,
                    };
                let session = self.session.expect("a base comes after the welcome");
                // It may come twice.
                if self.core.is_none() {
                    self.core =
                        Some(WorkerCore::new(self.layout.clone(), &self.settings, session, base, step));
                }
                self.awaits_base = false;
                Ok(())
            }
            Down::Base(None) => {
                self.begin_anew();
                Ok(())
            }
            Down::Reply(bytes) => {
                let reply = Reply::decode(&bytes).map_err(|error| format!("a reply: {error}"))?;
                self.reply(reply, oracle)
            }
            Down::Work(None) => {
                self.begin_anew();
                Ok(())
            }
            Down::Work(Some(work)) => {
                if self.report.take().is_some() {
                    self.evaluation = None;
                }
                let core = self.core.as_mut().expect("work is asked for with a core");
                core.add_work(&work).map_err(|error| format!("work: {error}"))?;
                self.take(&work);
                Ok(())
            }
            Down::Aside(payload) => self.evaluate(payload.as_deref()),
            Down::Finished => {
                self.is_over = true;
                Ok(())
            }
        }
    }

    fn welcome(&mut self, session: SessionId, resumed: bool, has_base: bool) -> Result<(), String> {
        self.welcomed = true;
        if !resumed {
            let connection = self.connection;
            self.forget();
            (self.connection, self.welcomed, self.kept) = (connection, true, [None, None]);
        }
        self.session = Some(session);
        if self.core.is_none() && resumed {
            let kept = std::mem::take(&mut self.kept);
            let last = kept.into_iter().flatten().max_by_key(|kept| kept.push.seq);
            if let Some(last) = last.filter(|last| last.session() == session) {
                self.kept[(last.push.seq.0 % 2) as usize] = Some(last.clone());
                let core = WorkerCore::restore(self.layout.clone(), &self.settings, last);
                self.core = Some(core.map_err(|error| format!("what a worker kept is of no use: {error}"))?);
            }
        }
        self.awaits_base = self.core.is_none();
        if self.awaits_base && !has_base {
            self.begin_anew();
        }
        Ok(())
    }

    /// The session cannot go on.
    fn begin_anew(&mut self) {
        self.forget();
        self.kept = [None, None];
    }

    fn reply(&mut self, reply: Reply, oracle: &mut Oracle) -> Result<(), String> {
        let answer = match reply {
            Reply::Answer(answer) => answer,
            Reply::Refused(Refusal::InFlight) => return Ok(()),
            Reply::Refused(Refusal::Finished) => {
                self.is_over = true;
                return Ok(());
            }
            Reply::Refused(Refusal::UnknownSession) => {
                self.begin_anew();
                return Ok(());
            }
            Reply::Refused(refusal) => return Err(format!("a push was refused: {refusal}")),
        };
        let core = self.core.as_mut().expect("an answer comes to a push");
        // The network repeats answers too.
        if core.pending().is_none_or(|push| push.seq != answer.seq) {
            return Ok(());
        }
        let work = core.handle_answer(&answer).map_err(|error| format!("an answer: {error}"))?;
        oracle.acknowledged(core.session(), answer.seq, answer.step)?;
        self.take(&work);
        Ok(())
    }

    fn take(&mut self, work: &Work) {
        self.evaluation = work.evaluation.or(self.evaluation);
        self.is_over |= work.finished;
    }

    fn evaluate(&mut self, payload: Option<&[u8]>) -> Result<(), String> {
        let (Some(payload), Some(job)) = (payload, self.evaluation) else {
            self.evaluation = None;
            return Ok(());
        };
        let core = self.core.as_mut().expect("an evaluation is leased to a session that has begun");
        if core.pending().is_some() {
            return Ok(());
        }
        let model = core.model_aside(payload).map_err(|error| format!("an evaluation: {error}"))?;
        let loss = model.iter().map(|value| f64::from(*value).powi(2)).sum();
        let (expert_share, router_entropy) = (Vec::new(), Vec::new());
        self.report = Some(Box::new(EvaluationReport { job, loss, tokens: 1, expert_share, router_entropy }));
        Ok(())
    }
}
